"""Positions made for another grid than the model's: embeddings, and tables of relative ones."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.models.attention import resize_table
from backbones.models.layers import PositionEmbedding, SpaceTimePositionEmbedding

__all__ = ["Grid", "grids_of", "is_table", "resize_positions", "resize_tables"]

Grid = tuple[int, int, int]  # T, H, W


def grids_of(model: nn.Module) -> dict[str, Grid]:
    """The grid that each position embedding of a model is made for, by its name."""
    grids: dict[str, Grid] = {}
    for name, module in model.named_modules():
        if isinstance(module, PositionEmbedding):
            grids[f"{name}.weight"] = (1, *module.grid)
        elif isinstance(module, SpaceTimePositionEmbedding):
            grids[f"{name}.temporal"] = (module.temporal.shape[1], 1, 1)
    return grids


def resize_positions(
    tensors: dict[str, Tensor], model: nn.Module, recorded: Mapping[str, Grid], foreign: bool
) -> dict[str, str]:
    """Resize the position embeddings among ``tensors``, in place, as models do at run time.

    Args:
        tensors: of a file, by the names of the model. What is no position embedding at all stays.
        model: says which grids are wanted.
        recorded: the grids in the file, of those embeddings of which they are known.
        foreign: whether the file is of another implementation; those train on squares.

    Returns:
        what was done, by the names of the tensors that it was done to.
    """
    resized = {}
    for name, grid in grids_of(model).items():
        value = tensors.get(name)
        if value is None or value.ndim != 3 or value.shape[0] != 1 or value.numel() == 0:
            continue
        made_for = _grid_in_file(value.shape[1], grid, recorded.get(name), foreign)
        if made_for is not None and made_for != grid:
            tensors[name] = _resize(value, made_for, grid)
            resized[name] = f"from {_show(made_for)} to {_show(grid)}"
    return resized


def _grid_in_file(rows: int, grid: Grid, recorded: Grid | None, foreign: bool) -> Grid | None:
    """The grid of a position embedding, of which often only the number of rows is known."""
    if recorded is not None and min(recorded) > 0 and prod(recorded) == rows:
        return recorded
    if grid[1:] == (1, 1):
        return rows, 1, 1
    # A plain state dict of ours may be of any shape: the most likely one is the model's.
    if not foreign and rows == prod(grid):
        return grid
    side = isqrt(rows)
    return (1, side, side) if side * side == rows else None


def _resize(weight: Tensor, made_for: Grid, grid: Grid) -> Tensor:
    """(1, T H W, C) from one grid to the other, linearly in time and bicubically in space."""
    x = _at_least_float32(weight)
    time, height, width = made_for
    channels = x.shape[-1]
    if time != grid[0]:
        x = x.view(1, time, height * width * channels).transpose(1, 2)
        x = F.interpolate(x, size=grid[0], mode="linear").transpose(1, 2)
    if (height, width) != grid[1:]:
        x = x.reshape(grid[0], height, width, channels).permute(0, 3, 1, 2)
        x = F.interpolate(x, size=grid[1:], mode="bicubic").permute(0, 2, 3, 1)
    return x.reshape(1, prod(grid), channels)


def _at_least_float32(weight: Tensor) -> Tensor:
    """Resized in half precision, an embedding would be visibly off."""
    return weight if weight.dtype == torch.float64 else weight.float()


def _show(grid: Grid) -> str:
    if grid[1:] == (1, 1):
        return f"{grid[0]} in time"
    return "×".join(str(side) for side in (grid if grid[0] > 1 else grid[1:]))


def is_table(name: str) -> bool:
    """Whether a tensor is a table of relative positions (backbones/models/attention.py)."""
    return name.rpartition(".")[2] in ("rel_pos_t", "rel_pos_h", "rel_pos_w")


def resize_tables(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """As :func:`resize_positions`, for tables of relative positions; ``own`` are the model's."""
    resized = {}
    for name in filter(is_table, own.keys() & tensors.keys()):
        value, length = tensors[name], own[name].shape[0]
        if value.ndim == 2 and value.numel() and value.shape[0] != length:
            tensors[name] = resize_table(_at_least_float32(value), length)
            resized[name] = f"from {value.shape[0]} to {length} distances"
    return resized
