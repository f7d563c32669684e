"""The keys of a video recipe, each with its type, its default, its bounds and its line of help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from backbones.common.recipes import Recipes
from backbones.common.settings import describe, key

RECIPES = Recipes(Path(__file__).parent, ("video", "image"), ".yaml")

_LOGGERS = ("tensorboard", "wandb", "mlflow")
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_POLICIES = ("store", "checkpoint", "reversible")


@dataclass
class DataConfig:
    """Which videos, and what a clip of them is."""

    root: str = key("", "folder of the videos; what lists name is found relative to it")
    layout: str = key(
        "auto",
        "folders: SPLIT/CLASS/FILE; list: lines `path label`; csv: Kinetics' annotations; images: "
        "SPLIT/CLASS/IMAGE, for models of images, by ImageNet's mean and deviation",
        choices=("auto", "folders", "list", "csv", "images"),
    )
    annotations: str = key("", "the list or csv of a split, with {split} for its name; '': found")
    train_split: str = key("train", "the split to train on")
    val_split: str = key("val", "the split to validate and test on")
    manifests: str = key("", "folder of what revvideo.scan wrote; '': root")
    num_frames: int = key(16, "frames of a clip", low=1)
    stride: int = key(4, "from one to the next, in frames at 30 per second; 0: a still", low=0)
    crop_size: int = key(224, "height and width of what the model sees, in pixels", low=8)
    decode_short_side: int = key(0, "shrink to this shorter side while decoding; 0: no", low=0)
    mean: float = key(0.45, "of videos: subtracted from pixels in [0, 1] …")
    std: float = key(0.225, "… which are then divided by this", low=1e-6)
    workers: int = key(8, "loader processes of each training process", low=0)


@dataclass
class AugmentConfig:
    """What training does to clips; the same to all frames of one."""

    clip_sampler: str = key(
        "exact",
        "which clips: anywhere; by PyTorchVideo's random; by its random_multi, so that repeats are "
        "different clips",
        choices=("exact", "random", "random_multi"),
    )
    repeats: int = key(1, "differently augmented copies of a clip (repeated augmentation)", low=1)
    scale: list[float] = key([0.08, 1.0], "area of the random crop over that of the frame")  # noqa: RUF009
    ratio: list[float] = key([0.75, 1.3333], "width over height of the random crop")  # noqa: RUF009
    flip: float = key(0.5, "probability of a horizontal flip", low=0, high=1)
    rand_augment: str = key("", "RandAugment in timm's words: rand-m7-n4-mstd0.5-inc1; '': none")
    color_jitter: float = key(
        0.0, "brightness, contrast and saturation vary by this; not beside rand_augment", low=0
    )
    erase: float = key(0.0, "probability that a box is filled with noise", low=0, high=1)
    mixup: float = key(0.0, "alpha of mixup; 0: none", low=0)
    cutmix: float = key(0.0, "alpha of cutmix; 0: none. With both, each batch draws one", low=0)
    label_smoothing: float = key(0.0, "share of the label spread over all classes", low=0, high=1)


@dataclass
class ModelConfig:
    """Which network, and from which weights it starts."""

    name: str = key("rev_mvit_base_16x4", "backbones.list_models() or a hub's: pytorchvideo/x3d_m")
    num_classes: int = key(0, "outputs of the head; 0: as many as the data has classes", low=0)
    weights: str = key("", "file, address or released model to start from; of images: inflated")
    drop_rate: float = key(0.0, "dropout before the head", low=0, high=1)
    drop_path_rate: float = key(0.0, "stochastic depth of the last block", low=0, high=1)
    arguments: dict[str, Any] = key({}, "others, such as arguments.depth=8; {}: none at all")  # noqa: RUF009


@dataclass
class OptimConfig:
    """AdamW; linear warm-up, then a cosine, step by step."""

    batch_size: int = key(256, "videos of one step, over all processes and accumulations", low=1)
    epochs: int = key(200, "passes over the training videos", low=1)
    max_steps: int = key(0, "stop after so many steps; 0: after the epochs", low=0)
    lr: float = key(1.6e-3, "learning rate after the warm-up", low=0)
    warmup_epochs: float = key(30.0, "length of the warm-up", low=0)
    start_factor: float = key(0.01, "learning rate of the first step, over lr", low=0, high=1)
    end_factor: float = key(0.01, "learning rate of the last step, over lr", low=0, high=1)
    weight_decay: float = key(0.05, "not applied to one-dimensional parameters", low=0)
    layer_decay: float = key(1.0, "learning rate of a block over that of the next", low=0, high=1)
    clip_grad_norm: float = key(0.0, "largest norm of all gradients together; 0: any", low=0)
    accumulate: int = key(1, "parts that each process splits its batch into, to save memory", low=1)
    ema: float = key(0.0, "decay of the averaged weights that are tested; 0: none", low=0, high=1)


@dataclass
class TrainConfig:
    """Where and how training runs."""

    output_dir: str = key("output/video", "where the results of the run go")
    seed: int = key(0, "of weights, clips, augmentation and dropout", low=0)
    device: str = key("auto", "cuda where there is one", choices=("auto", "cuda", "cpu"))
    devices: int = key(0, "processes on this machine; 0: one for each GPU, one on the CPU", low=0)
    nodes: int = key(1, "machines", low=1)
    strategy: str = key("auto", "auto: ddp for several processes", choices=("auto", "ddp", "fsdp"))
    precision: str = key("32-true", "float32, or autocast to a half one", choices=_PRECISIONS)
    memory: str = key("reversible", "what blocks keep for the backward pass", choices=_POLICIES)
    stored_blocks: int = key(0, "how many of the last blocks store whatever the policy", low=0)
    memory_keep: list[str] = key(  # noqa: RUF009
        [],
        "layers in a block whose outputs are kept, such as [g.mlp.fc2]; [products]: all products",
    )
    memory_slices: int = key(1, "parts of the batch in which the other blocks run", low=1)
    memory_budget: str = key("", "'12GB', or 'auto' on a GPU: chooses all four by what fits")
    loggers: list[str] = key(["tensorboard"], "of tensorboard, wandb, mlflow", choices=_LOGGERS)  # noqa: RUF009
    log_every: int = key(20, "steps between two lines of metrics.csv", low=1)
    checkpoint_every: int = key(500, "steps between two checkpoints", low=1)
    val_every: int = key(1, "epochs between two validations (one clip, one crop)", low=1)


@dataclass
class TestConfig:
    """How videos are tested: clips x crops, whose scores are averaged."""

    __test__ = False  # no test case, whatever pytest takes its name for

    views: str = key(
        "even",
        "even: first to last; published: the frames, resizing and crop of SlowFast's scores, for 5 "
        "clips and 1 crop; or PyTorchVideo's sampler of that name",
        choices=("even", "published", "constant_clips_per_video"),
    )
    clips: int = key(5, "clips of a video, evenly spread", low=1)
    crops: int = key(1, "crops of a clip: 1 (centre) or 3 (along the longer side)", low=1, high=3)
    short_side: int = key(256, "px of the shorter side before the crop; images: 8/7 of it", low=8)
    batch_size: int = key(8, "videos that a process tests at a time", low=1)
    published_top1: float = key(0.0, "of the paper, printed beside the own one; 0: none", low=0)


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)


def describe_schema() -> str:
    """Every key with its type, default and explanation, a line or two each."""
    sections = get_type_hints(Config).items()
    return "\n".join(f"\n{name}: {kind.__doc__}\n{describe(kind, name)}" for name, kind in sections)
