"""Positions made for another grid than the model's: embeddings, and tables of relative ones.

They are resized as the models do at run time. Patch embeddings too, to patches of another size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod

import torch
from torch import Tensor, nn

from backbones.models.attention import resize_table
from backbones.models.layers import PositionEmbedding, SpaceTimePositionEmbedding, resize_plane

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
    """Resize the position embeddings among a file's tensors, in place; say what was done, by name.

    Which grids are wanted, the model says; those of the file are ``recorded`` where they are known.
    A ``foreign`` file, of another implementation, was trained on squares.
    """
    resized = {}
    for name, (frames, height, width) in grids_of(model).items():
        value = tensors.get(name)
        if value is None or value.ndim != 3 or value.shape[0] != 1 or value.numel() == 0:
            continue
        rows, weight = value.shape[1], _at_least_float32(value)
        if name.endswith("temporal"):
            if rows != frames:
                tensors[name] = resize_table(weight[0], frames).unsqueeze(0)
                resized[name] = f"from {rows} in time to {frames} in time"
            continue
        grid = _grid_in_file(rows, (height, width), recorded.get(name), foreign)
        if grid is not None and grid != (height, width):
            tensors[name] = resize_plane(weight, grid, (height, width))
            resized[name] = f"from {grid[0]}×{grid[1]} to {height}×{width}"
    return resized


def _grid_in_file(
    rows: int, wanted: tuple[int, int], recorded: Grid | None, foreign: bool
) -> tuple[int, int] | None:
    """(H, W) of a position embedding, of which often only the number of rows is known."""
    if recorded is not None and recorded[0] == 1 and min(recorded) > 0 and prod(recorded) == rows:
        return recorded[1:]
    # A plain state dict of ours may be of any shape: the most likely one is the model's.
    if not foreign and rows == prod(wanted):
        return wanted
    side = isqrt(rows)
    return (side, side) if side * side == rows else None


def _at_least_float32(weight: Tensor) -> Tensor:
    """Resized in half precision, an embedding would be visibly off."""
    return weight if weight.dtype == torch.float64 else weight.float()


def is_table(name: str) -> bool:
    """Whether a tensor is a table of relative positions (backbones/models/attention.py)."""
    return name.rpartition(".")[2] in ("rel_pos_t", "rel_pos_h", "rel_pos_w")


def resize_tables(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """As :func:`resize_positions`, for tables of relative positions; ``own`` are the model's."""
    resized = {}
    for name in filter(is_table, own.keys() & tensors.keys()):
        value, rows = tensors[name], own[name].shape[0]
        if value.ndim == 2 and value.numel() and value.shape[0] != rows:
            tensors[name] = resize_table(_at_least_float32(value), rows)
            resized[name] = f"from {value.shape[0]} to {rows} distances"
    return resized


def resize_patches(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """As :func:`resize_tables`, for the patch embedding of a ViT made for patches of another size.

    A patch that was enlarged bicubically gives the same token as it gave before (FlexiViT, arXiv
    2212.08013, section 3.4); of one that was reduced, the nearest that there is.
    """
    name = "patch_embed.proj.weight"
    value, mine = tensors.get(name), own.get(name)
    if value is None or mine is None or not value.ndim == mine.ndim == 4 or 0 in value.shape:
        return {}
    side, wanted = value.shape[3], mine.shape[3]
    if value.shape != (*mine.shape[:2], side, side) or side == wanted:
        return {}
    basis = torch.eye(side**2, dtype=torch.float64).unsqueeze(0)
    enlarge = resize_plane(basis, (side, side), (wanted, wanted))[0]  # pixels of a patch, in rows
    resized = value.flatten(2).double() @ torch.linalg.pinv(enlarge)
    tensors[name] = resized.unflatten(2, (wanted, wanted))
    return {name: f"from patches of {side}×{side} to {wanted}×{wanted}"}
