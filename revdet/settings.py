"""The typed sections of a recipe: one line per key, with its default, meaning and bounds.

They are the help of ``train_net.py`` and the check of recipes and overrides. The other sections
are Detectron2's own: their keys are the arguments of what they build.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from backbones.common.settings import key

LOGGERS = ("tensorboard", "wandb", "mlflow")
STRATEGIES = ("ddp", "fsdp")
POLICIES = ("store", "checkpoint", "reversible")


@dataclass
class AmpConfig:
    enabled: bool = key(False, "autocast in training")
    dtype: str = key("bfloat16", "float16 scales the loss", choices=("bfloat16", "float16"))


@dataclass
class DdpConfig:
    broadcast_buffers: bool = key(False, "copy the buffers of the first process in each step")
    find_unused_parameters: bool = key(False, "for models of which a step may leave out parts")
    static_graph: bool = key(False, "every step uses the same parameters")
    gradient_as_bucket_view: bool = key(True, "hold one copy of the gradients less")
    fp16_compression: bool = key(False, "send gradients in half precision")


@dataclass
class CheckpointerConfig:
    period: int = key(5000, "iterations between checkpoints", low=1)
    max_to_keep: int = key(3, "how many of them are kept", low=1)


@dataclass
class TrainConfig:
    """Settings of the run."""

    output_dir: str = key("output/run", "where the results of the run go")
    init_checkpoint: str = key("", "weights to start from: a file, an address or vitdet_base, …")
    max_iter: int = key(90000, "iterations to train", low=1)
    epochs: float = key(0.0, "in its place: passes over the training images; 0: max_iter", low=0)
    warmup_iters: int = key(0, "iterations of warm-up; 0: the part that lr_multiplier has", low=0)
    seed: int = key(0, "of weights, order, augmentation and dropout", low=0)
    device: str = key("auto", "such as cpu or cuda; auto: cuda where there is one")
    memory: str = key("reversible", "what the trunk keeps for backward", choices=POLICIES)
    stored_blocks: int = key(0, "how many of its last blocks store whatever the policy", low=0)
    memory_keep: list[str] = key(  # noqa: RUF009
        [], "layers of blocks whose outputs are kept, such as [g.mlp.fc2]; [products]: all products"
    )
    memory_slices: int = key(1, "parts of the batch in which the other blocks run", low=1)
    heads_memory: str = key(
        "auto",
        "the same for pyramid, RPN and heads; auto: store with memory=store, else checkpoint",
        choices=("auto", "store", "checkpoint"),
    )
    heads_slices: int = key(0, "parts in which they run; 0: by 1 image, 128 boxes, 32 masks", low=0)
    memory_budget: str = key("", "such as 8GB: chooses these so that a step fits; slices no fewer")
    accumulate: int = key(1, "batches per iteration, of which gradients are averaged", low=1)
    reference_batch_size: int = key(
        0, "images of an iteration for which optimizer.lr is; it is scaled to others; 0: no", low=0
    )
    amp: AmpConfig = field(default_factory=AmpConfig)
    clip_grad_norm: float = key(0.0, "largest norm of all gradients together; 0: any", low=0)
    ema_decay: float = key(
        0.0, "evaluate and keep averaged weights, by such as 0.9999; 0: no", low=0, high=0.999999
    )
    deterministic: bool = key(False, "the same bits in every run; what cannot is an error")
    strategy: str = key("ddp", "fsdp: each process has a part of the weights", choices=STRATEGIES)
    ddp: DdpConfig = field(default_factory=DdpConfig)
    checkpointer: CheckpointerConfig = field(default_factory=CheckpointerConfig)
    eval_period: int = key(5000, "iterations between evaluations; 0: at the end only", low=0)
    log_period: int = key(20, "iterations between two lines of metrics.json", low=1)
    loggers: list[str] = key(["tensorboard"], "of tensorboard, wandb, mlflow", choices=LOGGERS)  # noqa: RUF009
    check_data: bool = key(True, "decode every image before training starts")
    pictures: int = key(8, "validation images drawn with their predictions at the end", low=0)


@dataclass
class DatasetConfig:
    """Your own data, in COCO format, in place of the recipe's."""

    train_json: str = key("", "annotation file to train on")
    train_images: str = key("", "folder that its file names start from")
    val_json: str = key("", "annotation file to evaluate on; the same one, if there is no other")
    val_images: str = key("", "folder that its file names start from")
    val_fraction: float = key(
        0.0, "evaluate on this part of train_json, drawn by seed; the rest trains", low=0, high=0.9
    )
    skip_broken: bool = key(False, "leave out what is broken, and count it, in place of stopping")
    categories: list[Any] = key([], "id and name of each class: the run fills them in")  # noqa: RUF009


SECTIONS = {"train": TrainConfig, "dataset": DatasetConfig}
