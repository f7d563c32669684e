"""What a run runs on: devices, processes and strategies, from the config and the environment."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from backbones.common.errors import UserError
from revvideo.settings import Config


def is_first_process() -> bool:
    """Whether this process writes files and lines."""
    return getattr(rank_zero_only, "rank", 0) == 0


def launched() -> bool:
    """Whether this is one of several processes that torchrun, SLURM or Lightning has started."""
    environments = (TorchElasticEnvironment, SLURMEnvironment)
    return "LOCAL_RANK" in os.environ or any(kind.detect() for kind in environments)


def trainer_arguments(config: Config, *, sharded: bool) -> dict[str, Any]:
    """Those of the trainer that training and testing share; ``sharded``: the weights are."""
    settings, (device, processes) = config.train, find_hardware(config)
    world_size = processes * settings.nodes
    strategy: str | Strategy = "auto"
    if sharded:
        parts: dict[str, Any] = {"data_parallel_size": world_size, "tensor_parallel_size": 1}
        strategy = ModelParallelStrategy(**parts, save_distributed_checkpoint=False)
    elif settings.strategy == "ddp" or world_size > 1:
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    return {
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "devices": processes,
        "num_nodes": settings.nodes,
        "strategy": strategy,
        "precision": settings.precision,
        "default_root_dir": settings.output_dir,
        "enable_model_summary": False,
        "enable_checkpointing": False,  # by Lightning itself
        "use_distributed_sampler": False,
    }


def find_hardware(config: Config) -> tuple[str, int]:
    """``"cuda"`` or ``"cpu"``, and how many processes on this machine; a UserError, with the
    remedy, if it cannot do what the config asks for."""
    settings, gpus = config.train, torch.cuda.device_count()
    device = settings.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise UserError("train.device=cuda, but no GPU is found: set train.device=cpu")
    if device == "cuda" and settings.devices > gpus:
        raise UserError(f"train.devices={settings.devices}, but {gpus} GPUs are there: set {gpus}")
    if settings.precision == "16-mixed" and device == "cpu":
        raise UserError("train.precision=16-mixed needs a GPU: set bf16-mixed or 32-true")
    if settings.strategy == "fsdp" and config.optim.ema:
        raise UserError("optim.ema does not go with train.strategy=fsdp: set optim.ema=0, or ddp")
    if settings.strategy == "fsdp" and settings.precision == "16-mixed":
        raise UserError("train.precision=16-mixed does not go with fsdp: set bf16-mixed")
    # torchrun says in a variable how many processes it has started here.
    given = settings.devices or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return device, given or (gpus if device == "cuda" else 1)
