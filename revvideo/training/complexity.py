"""What a network is made of: parameters and operations of its parts, counted by fvcore."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from fvcore.nn import FlopCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import get_shape
from torch import nn


def complexity_table(model: nn.Module, size: tuple[int, ...]) -> str:
    """Parameters and operations, the two uppermost levels of modules.

    Runs the model once in eval mode on one clip, where its parameters are.

    Args:
        model: any that takes clips.
        size: of the clip, (1, 3, T, H, W).

    Returns:
        a table; operations are multiply-adds of the forward pass.
    """
    training = model.training
    clip = torch.zeros(size, device=next(model.parameters()).device)
    analysis = FlopCountAnalysis(model.eval(), clip)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch.jit, on being old and on constants
            return cast(str, flop_count_table(analysis, max_depth=2, show_param_shapes=False))
    finally:
        model.train(training)


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """The two products of fused attention, which fvcore does not know."""
    query, key, value = (get_shape(entry) for entry in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
