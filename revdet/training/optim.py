"""What the optimizer gets: groups of parameters, and the learning rate for the batch at hand."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from omegaconf import DictConfig, OmegaConf
from torch import nn

from backbones.engine.policies import blocks_of
from revdet.models import find_trunk

logger = logging.getLogger("revdet")


def get_optimizer_params(
    model: nn.Module,
    base_lr: float,
    weight_decay_norm: float | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups as ViTDet and MViTv2 have them; Detectron2's, and two things more.

    The learning rate falls towards the input of the trunk (see :func:`layer_factors`), and
    position embeddings, absolute and relative, have no weight decay.

    Args:
        model: a detector; with ``layer_decay``, on a :class:`revdet.models.TrunkBackbone`.
        base_lr: learning rate of what lies behind the trunk.
        weight_decay_norm: weight decay of norm layers; None for the optimizer's.
        layer_decay: factor from one block of the trunk to the one before it, in (0, 1].
    """
    factors = layer_factors(model, layer_decay)
    groups = get_default_optimizer_params(
        model,
        base_lr,
        weight_decay_norm=weight_decay_norm,
        lr_factor_func=lambda name: factors[name.lstrip(".")],  # ".name" at the root of the model
    )
    positions = {
        parameter
        for name, parameter in model.named_parameters()
        if "pos_embed." in name or ".rel_pos_" in name
    }
    apart = []
    for group in groups:
        moved = [p for p in group["params"] if p in positions]
        apart.append({**group, "params": [p for p in group["params"] if p not in positions]})
        apart.append({**group, "params": moved, "weight_decay": 0.0})
    return reduce_param_groups(apart)


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """The factor of the learning rate of every parameter, by name.

    As in BEiT (arXiv 2106.08254) and ViTDet: with ``n`` blocks in the trunk, counted through all
    stages and with their transitions, block ``i`` from 1 on has ``decay ** (n + 1 - i)``, the
    patch and position embeddings ``decay ** (n + 1)``, everything else 1.

    Raises:
        ValueError: ``decay`` outside (0, 1], or no :class:`TrunkBackbone` in the detector.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {decay}")
    if decay == 1:
        return {name: 1.0 for name, _ in model.named_parameters()}
    prefix, trunk = find_trunk(model)
    blocks = [*blocks_of(trunk)]
    layers = {f"{prefix}{name}.": index for index, name in enumerate(["patch_embed", *blocks])}
    layers[f"{prefix}pos_embed."] = 0

    def factor(name: str) -> float:
        for start, layer in layers.items():
            if name.startswith(start):
                return float(decay ** (len(blocks) + 1 - layer))
        return 1.0

    return {name: factor(name) for name, _ in model.named_parameters()}


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
    logger.info(
        f"learning rate {cfg.optimizer.lr:.4g} = {recipe:.4g} × {batch} / {reference} images, the "
        "linear scaling rule (train.reference_batch_size=0 leaves it alone)"
    )
