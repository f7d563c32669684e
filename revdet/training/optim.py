"""What the optimizer gets: groups of parameters, and the learning rate for the batch at hand."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from omegaconf import DictConfig, OmegaConf
from torch import nn

from backbones.common.errors import UserError
from backbones.models.trunk import layer_decay_factors
from revdet.models import find_trunk

logger = logging.getLogger("revdet")


def get_optimizer_params(
    model: nn.Module,
    base_lr: float,
    weight_decay_norm: float | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups as ViTDet and MViTv2 have them; Detectron2's, and two things more.

    The learning rate, ``base_lr`` behind the trunk, falls towards its input by ``layer_decay`` (see
    :func:`backbones.models.trunk.layer_decay_factors`), and position embeddings, absolute and
    relative, have no weight decay. ``weight_decay_norm`` is that of norm layers; None for the
    optimizer's. A ValueError says that ``layer_decay`` is outside (0, 1], or, where it is not 1,
    that the detector is not on a :class:`revdet.models.TrunkBackbone`.
    """
    factors = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    if layer_decay != 1:
        prefix, trunk = find_trunk(model)
        decayed = layer_decay_factors(trunk, layer_decay)
        factors |= {f"{prefix}{name}": factor for name, factor in decayed.items()}
    groups = get_default_optimizer_params(
        model,
        base_lr,
        weight_decay_norm=weight_decay_norm,
        lr_factor_func=lambda name: factors[name.lstrip(".")],  # ".name" at the root of the model
    )
    named = model.named_parameters()
    positions = {p for name, p in named if "pos_embed." in name or ".rel_pos_" in name}
    apart = []
    for group in groups:
        moved = [p for p in group["params"] if p in positions]
        apart.append({**group, "params": [p for p in group["params"] if p not in positions]})
        apart.append({**group, "params": moved, "weight_decay": 0.0})
    return reduce_param_groups(apart)


def scale_learning_rate(cfg: DictConfig) -> None:
    """Apply the linear scaling rule (Goyal et al., arXiv 1706.02677) to ``cfg.optimizer.lr``.

    The rate in a recipe belongs to ``train.reference_batch_size`` images; with another
    ``dataloader.train.total_batch_size`` it changes in proportion. 0 switches the rule off.
    """
    reference = cfg.train.reference_batch_size
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if not reference or not batch or batch == reference:
        return
    recipe = cfg.optimizer.lr
    cfg.optimizer.lr = recipe * batch / reference
    rate = f"learning rate {cfg.optimizer.lr:.4g} = {recipe:.4g} × {batch} / {reference} images"
    rule = "the linear scaling rule (train.reference_batch_size=0 leaves it alone)"
    logger.info(f"{rate}, {rule}")


def build_optimizer(cfg: DictConfig, model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """Optimizer and schedule of a recipe, after linear scaling; a UserError if they do not fit."""
    scale_learning_rate(cfg)
    cfg.optimizer.params.model = model
    kind = cfg.optimizer.get("_target_")
    if next(model.parameters()).is_cuda and kind in (torch.optim.AdamW, "torch.optim.AdamW"):
        # The kernels of several tensors at once, torch's default, make a copy of all parameters.
        cfg.optimizer.setdefault("fused", True)
    try:
        return instantiate(cfg.optimizer), instantiate(cfg.lr_multiplier)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"the optimizer cannot be built: {error}") from error
