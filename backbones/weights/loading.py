"""Weights in and out: checked as a whole before a single one is copied."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isqrt, prod
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.common.errors import some_of
from backbones.models.attention import resize_table
from backbones.models.layers import PositionEmbedding, SpaceTimePositionEmbedding
from backbones.weights.checkpoint import (
    Checkpoint,
    WeightsError,
    read_checkpoint,
    write_safetensors,
)
from backbones.weights.download import download
from backbones.weights.formats import Layout, convert_state_dict, recognise

__all__ = ["CONFIG", "LoadReport", "load_checkpoint", "load_weights", "save_weights"]

# Entries of a safetensors file's metadata, both JSON: the model's name and arguments, and the
# grids of its position embeddings, which the number of their rows does not tell.
CONFIG = "backbones.config"
_GRIDS = "backbones.grids"

_HEAD = "head."

# The last part of the names of the tables of relative positions (backbones/rel_pos.py).
_REL_POS = ("rel_pos_t", "rel_pos_h", "rel_pos_w")

Grid = tuple[int, int, int]


@dataclass
class LoadReport:
    """What :func:`load_weights` did. Names are the model's own; ``str()`` gives a summary.

    Attributes:
        source: the path or address.
        format: whose layout the file has, ``"own"``, ``"PySlowFast"`` or ``"mmpretrain"``.
        loaded: tensors that were copied into the model.
        resized: those among them that were resized to the model's grid, each with what was done.
        left_out: tensors of the file that were not used, each with the reason.
        missing: tensors of the model that keep the values they had: those of the head, and tables
            of relative positions where the file has none.
    """

    source: str
    format: Layout
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.format}): {len(self.loaded)} tensors loaded"]
        lines += [f"resized {name}: {what}" for name, what in self.resized.items()]
        lines += [f"left out {name}: {why}" for name, why in self.left_out.items()]
        tables = [name for name in self.missing if _is_table(name)]
        if others := [name for name in self.missing if not _is_table(name)]:
            lines.append(f"left unchanged: {', '.join(others)}")
        if tables:
            lines.append(
                f"not in the file, unchanged: {len(tables)} tables of relative positions "
                f"({some_of(sorted(tables))})"
            )
        return "\n  ".join(lines)


def load_weights(model: nn.Module, path_or_url: str | PathLike[str]) -> LoadReport:
    """Load a checkpoint of PySlowFast, mmpretrain or this package into ``model``.

    Which of them it is shows in the file. Position embeddings made for another grid are resized,
    bicubically in space and linearly in time, tables of relative positions linearly. Where a file
    has no such tables, those of the model stay as they are: zeros, in a new one. A head for
    another number of classes is left out, and so are the class token and its position that early
    mmpretrain files carry without using them. Anything else that does not fit is an error, and
    then the model is as it was. No code in the file is run.

    >>> print(load_weights(model, "REV_VIT_S.pyth"))
    REV_VIT_S.pyth (PySlowFast): 151 tensors loaded

    Args:
        model: a model of this package. Its dtype and device stay.
        path_or_url: a file, or an address, which is downloaded once (see
            :func:`backbones.weights.download.download`).

    Raises:
        WeightsError: a file that cannot be had or read, or does not fit the model.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    source = str(path_or_url)
    path = download(source) if "://" in source else Path(source).expanduser()
    return load_checkpoint(model, read_checkpoint(path), source)


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint, source: str) -> LoadReport:
    """As :func:`load_weights`, for a checkpoint that was read already from ``source``.

    Raises:
        WeightsError: it does not fit the model.
    """
    own: dict[str, Tensor] = model.state_dict()
    report = LoadReport(source, recognise(checkpoint.tensors))
    try:
        tensors = convert_state_dict(checkpoint.tensors, model)
        _drop_class_token(tensors, report)
        _resize_positions(tensors, model, checkpoint, report)
        _resize_tables(tensors, own, report)
        _drop_head(tensors, own, report)
        has_tables = any(map(_is_table, tensors))
        report.missing = [
            name
            for name in own
            if name not in tensors
            and (name.startswith(_HEAD) or (_is_table(name) and not has_tables))
        ]
        _check(tensors, own, report.missing)
    except WeightsError as error:
        kind = type(model).__name__
        raise WeightsError(f"{source} does not fit this {kind}: {error}") from error
    # To dtype and device first, since that may still fail; the copies below cannot.
    ready = {name: tensors[name].to(own[name]) for name in own if name in tensors}
    with torch.no_grad():
        for name, value in ready.items():
            own[name].copy_(value)
    report.loaded = list(ready)
    return report


def _drop_class_token(tensors: dict[str, Tensor], report: LoadReport) -> None:
    """Early mmpretrain allocated a class token and its position and used neither."""
    position = tensors.get("pos_embed.weight")
    if report.format != "mmpretrain" or "cls_token" not in tensors or position is None:
        return
    if position.ndim != 3 or isqrt(position.shape[1] - 1) ** 2 != position.shape[1] - 1:
        return
    # Extra tokens stand before those of the patches.
    tensors["pos_embed.weight"] = position[:, 1:]
    del tensors["cls_token"]
    report.left_out["cls_token"] = "not used by the model"
    report.left_out["pos_embed.weight[:, 0]"] = "the position of cls_token"


def _resize_positions(
    tensors: dict[str, Tensor], model: nn.Module, checkpoint: Checkpoint, report: LoadReport
) -> None:
    recorded = _recorded_grids(checkpoint.metadata)
    own = model.state_dict()
    for name, grid in _position_grids(model).items():
        value = tensors.get(name)
        if value is None or not _plain(value, own[name]):
            continue  # _check() will say so
        if value.ndim != 3 or value.shape[0] != 1 or value.numel() == 0:
            continue
        made_for = _grid_of(value.shape[1], grid, recorded.get(name), report.format)
        if made_for is not None and made_for != grid:
            tensors[name] = _resize(value, made_for, grid)
            report.resized[name] = f"from {_show(made_for)} to {_show(grid)}"


def _recorded_grids(metadata: dict[str, str]) -> dict[str, Grid]:
    """What :func:`save_weights` wrote of the grids; nothing if it was not this function."""
    try:
        items = json.loads(metadata.get(_GRIDS, "{}")).items()
        return {name: (int(t), int(h), int(w)) for name, (t, h, w) in items}
    except (AttributeError, TypeError, ValueError) as error:
        raise WeightsError("its metadata is damaged") from error


def _position_grids(model: nn.Module) -> dict[str, Grid]:
    """The (T, H, W) that each position embedding of the model is made for, by name."""
    grids: dict[str, Grid] = {}
    for name, module in model.named_modules():
        if isinstance(module, PositionEmbedding):
            grids[f"{name}.weight"] = (1, *module.grid)
        elif isinstance(module, SpaceTimePositionEmbedding):
            grids[f"{name}.temporal"] = (module.temporal.shape[1], 1, 1)
    return grids


def _grid_of(rows: int, grid: Grid, recorded: Grid | None, layout: Layout) -> Grid | None:
    """The grid of a position embedding in a file, of which often only the rows are known."""
    if recorded is not None and min(recorded) > 0 and prod(recorded) == rows:
        return recorded
    if grid[1:] == (1, 1):
        return rows, 1, 1
    # Both foreign implementations train on squares. A plain state dict of ours may be of any
    # shape: the most likely one is the model's.
    if layout == "own" and rows == prod(grid):
        return grid
    side = isqrt(rows)
    return (1, side, side) if side * side == rows else None


def _resize(weight: Tensor, made_for: Grid, grid: Grid) -> Tensor:
    """(1, T H W, C) from one grid to the other; as the models do at run time."""
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


def _resize_tables(tensors: dict[str, Tensor], own: dict[str, Tensor], report: LoadReport) -> None:
    """As the models do at run time where the grid is another than the tables were made for."""
    for name, mine in own.items():
        value = tensors.get(name)
        if value is None or not _is_table(name) or not _plain(value, mine):
            continue
        if value.ndim != 2 or value.numel() == 0 or value.shape[0] == mine.shape[0]:
            continue
        tensors[name] = resize_table(_at_least_float32(value), mine.shape[0])
        report.resized[name] = f"from {value.shape[0]} to {mine.shape[0]} distances"


def _is_table(name: str) -> bool:
    return name.rpartition(".")[2] in _REL_POS


def _drop_head(tensors: dict[str, Tensor], own: dict[str, Tensor], report: LoadReport) -> None:
    """Leave a head out that the model has not, or has for another number of classes."""
    for name in [name for name in tensors if name.startswith(_HEAD)]:
        value, mine = tensors[name], own.get(name)
        if mine is None and any(key.startswith(_HEAD) for key in own):
            continue  # not the kind of head that these models have
        if mine is None:
            why = "the model has no head"
        elif value.ndim and value.shape[0] != mine.shape[0] and value.shape[1:] == mine.shape[1:]:
            why = f"{value.shape[0]} classes, the model has {mine.shape[0]}"
        else:
            continue
        del tensors[name]
        report.left_out[name] = why


def _check(tensors: dict[str, Tensor], own: dict[str, Tensor], allowed: Iterable[str]) -> None:
    """Raise an error with everything that does not fit."""
    if any(value.is_meta for value in own.values()):
        raise WeightsError("the model is on the meta device and has no values")
    problems = {
        "not in the file": own.keys() - tensors.keys() - set(allowed),
        "not in the model": tensors.keys() - own.keys(),
        "of another shape": {
            f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if tensors[name].shape != own[name].shape
        },
        "not plain numbers": {
            name for name in own.keys() & tensors.keys() if not _plain(tensors[name], own[name])
        },
    }
    if found := [f"{what}: {some_of(sorted(names))}" for what, names in problems.items() if names]:
        raise WeightsError("; ".join(found))


def _plain(value: Tensor, mine: Tensor) -> bool:
    """Whether copying ``value`` into ``mine`` is sure to work."""
    return (
        value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.is_floating_point() == mine.is_floating_point()
        and value.is_complex() == mine.is_complex()
    )


def _show(grid: Grid) -> str:
    if grid[1:] == (1, 1):
        return f"{grid[0]} in time"
    return "×".join(str(side) for side in (grid if grid[0] > 1 else grid[1:]))


def save_weights(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the weights of ``model`` as a safetensors file.

    The file remembers the name and the arguments that :func:`create_model` was given, so that
    :func:`load_model` builds the model again, and the grids of its position embeddings. A model
    that was built without ``create_model`` is saved without its name.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written. A file that was there before is still there.
        TypeError: arguments that JSON cannot hold.
    """
    metadata = {_GRIDS: json.dumps(_position_grids(model))}
    config = getattr(model, "config", None)
    if config is not None:
        metadata[CONFIG] = json.dumps(config)
    write_safetensors(Path(path).expanduser(), model.state_dict(), metadata)
