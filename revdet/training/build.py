"""Model and optimizer of a recipe."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig

import backbones
from backbones.common.errors import UserError
from revdet.training.optim import scale_learning_rate
from revdet.training.trainer import AMP_DTYPES

logger = logging.getLogger("revdet")


def build_model(cfg: DictConfig, device: str = "cpu") -> torch.nn.Module:
    """The detector of a recipe with its memory policy, on a device.

    Raises:
        UserError: the recipe does not fit together.
    """
    try:
        model = instantiate(cfg.model)
        backbones.set_memory(model.backbone, cfg.train.memory, cfg.train.stored_blocks)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the model cannot be built: {type(error).__name__}: {error}") from error
    trunk = sum(p.numel() for p in model.backbone.parameters())
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        f"model: {total / 1e6:.2f} M parameters, {trunk / 1e6:.2f} M of them in the trunk and "
        f"pyramid; memory policy {cfg.train.memory}, {cfg.train.stored_blocks} blocks stored"
    )
    return model.to(device)


def amp_dtype(cfg: DictConfig) -> torch.dtype | None:
    """The dtype of autocast in training, None for none."""
    return AMP_DTYPES[cfg.train.amp.dtype] if cfg.train.amp.enabled else None


def build_optimizer(cfg: DictConfig, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """Optimizer and learning-rate schedule of a recipe, after the linear scaling rule.

    Raises:
        UserError: the recipe does not fit together.
    """
    scale_learning_rate(cfg)
    cfg.optimizer.params.model = model
    try:
        return instantiate(cfg.optimizer), instantiate(cfg.lr_multiplier)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"the optimizer cannot be built: {error}") from error
