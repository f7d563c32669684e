"""The optimizer of the recipes: parameter groups for AdamW, and its learning rate step by step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fvcore.common import param_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from backbones.models.trunk import layer_depths
from revvideo.settings import OptimConfig


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, warmup_steps: int, total_steps: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW and its schedule, which is to be stepped after every step of the optimizer."""
    groups = param_groups(model, config.lr, config.weight_decay, config.layer_decay)
    start, end = config.start_factor, config.end_factor
    factor = partial(lr_factor, warmup=warmup_steps, total=total_steps, start=start, end=end)
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    return optimizer, LambdaLR(optimizer, factor)


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer, with their own weight decay and learning rate.

    One-dimensional parameters (biases, norms) are not decayed. With layer decay (ELECTRA, arXiv
    2003.10555, section 3.1, as ViTs are fine-tuned) the learning rate falls from the head to the
    patch embedding; see :func:`backbones.models.trunk.layer_depths`.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    depths = layer_depths(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth, decays = depths[name], parameter.ndim > 1
        rate, decay = lr * layer_decay**depth, weight_decay if decays else 0.0
        new = {"params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((depth, decays), new)["params"].append(parameter)
    # The head first: its learning rate is the one that is logged.
    return [groups[key] for key in sorted(groups)]


def lr_factor(step: int, *, warmup: int, total: int, start: float, end: float) -> float:
    """The learning rate of ``step`` (from 0) over the base one.

    From ``start`` in a line to 1 at step ``warmup``, then along half a cosine to ``end`` at step
    ``total`` (SGDR, arXiv 1608.03983, equation 5, without restarts).
    """
    total = max(total, 1)
    where = min(step / total, 1.0)
    line, cosine = param_scheduler.LinearParamScheduler, param_scheduler.CosineParamScheduler
    if warmup >= total:
        return float(line(start, start + (1 - start) * total / warmup)(where))
    parts, lengths = [line(start, 1.0), cosine(1.0, end)], [warmup / total, 1 - warmup / total]
    both = param_scheduler.CompositeParamScheduler(parts, lengths, ["rescaled", "rescaled"])
    return float(both(where))
