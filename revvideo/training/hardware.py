"""What a run runs on: devices, processes and strategies, from the config and the environment."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from backbones.common.errors import UserError
from revvideo.config import Config
from revvideo.training.callbacks import AtomicCheckpointIO


def is_first_process() -> bool:
    """Whether this process writes files and lines."""
    return getattr(rank_zero_only, "rank", 0) == 0


def launched() -> bool:
    """Whether this is one of several processes that torchrun, SLURM or Lightning has started."""
    environments = (TorchElasticEnvironment, SLURMEnvironment)
    return "LOCAL_RANK" in os.environ or any(kind.detect() for kind in environments)


def _on_gpu(config: Config) -> bool:
    return config.train.device != "cpu" and torch.cuda.is_available()


def _processes(config: Config) -> int:
    """On this machine; torchrun says it in a variable."""
    given = config.train.devices or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return given or (torch.cuda.device_count() if _on_gpu(config) else 1)


def check_hardware(config: Config) -> None:
    """Find out whether this machine can do what the config asks for.

    Raises:
        UserError: with the setting and the remedy.
    """
    settings, found = config.train, torch.cuda.device_count()
    if settings.device == "cuda" and not found:
        raise UserError("train.device=cuda, but no GPU is found: set train.device=cpu")
    if _on_gpu(config) and settings.devices > found:
        raise UserError(
            f"train.devices={settings.devices}, but {found} GPUs are there: set {found}"
        )
    if settings.precision == "16-mixed" and not _on_gpu(config):
        raise UserError("train.precision=16-mixed needs a GPU: set bf16-mixed or 32-true")
    if settings.strategy == "fsdp" and config.optim.ema:
        raise UserError("optim.ema does not go with train.strategy=fsdp: set optim.ema=0, or ddp")
    if settings.strategy == "fsdp" and settings.precision == "16-mixed":
        raise UserError("train.precision=16-mixed does not go with fsdp: set bf16-mixed")


def trainer_arguments(config: Config, *, sharded: bool = True) -> dict[str, Any]:
    """Arguments of the trainer that training and testing share."""
    settings = config.train
    processes = _processes(config)
    world_size = processes * settings.nodes
    strategy: str | Strategy = "auto"
    if settings.strategy == "fsdp" and sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    elif settings.strategy == "ddp" or world_size > 1:
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    return {
        "accelerator": "gpu" if _on_gpu(config) else "cpu",
        "devices": processes,
        "num_nodes": settings.nodes,
        "strategy": strategy,
        "precision": settings.precision,
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": settings.output_dir,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
