"""What each named model costs and has reached: the facts behind ``python -m backbones``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.download import RELEASED_WEIGHTS
from backbones.measure import saved_bytes
from backbones.memory import MemoryManaged, set_memory
from backbones.models import create_model, list_models

__all__ = [
    "PUBLISHED_TOP1",
    "PUBLISHED_TOP5",
    "ZooEntry",
    "describe",
    "input_shape",
    "name_of",
    "zoo_table",
]

# Percent, one view of ImageNet-1k at 224 px; of rev_mvit_base_16x4 Kinetics-400, 1 x 5 views. From
# arXiv 2302.04869, but of the two Rev-MViTs that of the weights released later (the paper: 82.5
# and 78.5). The paper's MViT-B has no row: mvit_base differs from it in more than a class token.
PUBLISHED_TOP1: dict[str, float] = {
    "rev_vit_small": 79.9,
    "rev_vit_base": 81.8,
    "rev_vit_large": 81.4,
    "rev_mvit_base": 82.9,
    "rev_mvit_base_16x4": 78.4,
    "vit_small": 79.9,
    "vit_base": 81.8,
    "vit_large": 81.5,
}

# Likewise. mmpretrain's of the released weights, converted; the paper and its authors give none.
PUBLISHED_TOP5: dict[str, float] = {"rev_vit_small": 94.9, "rev_vit_base": 95.56}

_HEADER = (
    "name",
    "params (M)",
    "GFLOPs",
    "input",
    "top-1",
    "weights",
    "stored (MB)",
    "reversed (MB)",
)
_LEFT = {0, 3, 5}  # columns of words

_NOTES = """\
GFLOPs: multiply-accumulates of convolutions, linear layers and attention, as the papers count.
top-1: published, ImageNet-1k (rev_mvit_base_16x4: Kinetics-400); of vit_*, the paper's own ViTs.
stored, reversed: activations held for the backward pass, per image or clip in float32, under the
"store" and the "reversible" memory policy, without parameters (1 MB = 1e6 bytes)."""


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo.

    Attributes:
        name: as :func:`backbones.create_model` takes it.
        parameters: their number, with the published head.
        macs: multiply-accumulates of one forward pass of one sample: convolutions, matrix
            products and attention. Norms and what is element by element count as nothing.
        input_shape: of the sample that was measured, (3, H, W) or (3, T, H, W).
        top1: the published accuracy in percent, or None.
        released: whether ``pretrained=True`` finds weights.
        stored_bytes: what autograd holds for one sample between forward and backward under
            ``"store"``, in float32, without the parameters.
        reversible_bytes: the same under ``"reversible"``; None for a model that cannot be reversed.
    """

    name: str
    parameters: int
    macs: int
    input_shape: tuple[int, ...]
    top1: float | None
    released: bool
    stored_bytes: int
    reversible_bytes: int | None


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """The sample that a model of :func:`create_model` is made for: (C, H, W) or (C, T, H, W)."""
    arguments = getattr(model, "config", {}).get("arguments", {})
    size = arguments.get("img_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    frames = arguments.get("num_frames")
    clip = () if frames is None else (frames,)
    return (arguments.get("in_chans", 3), *clip, height, width)


def name_of(model: nn.Module) -> str | None:
    """The name in the zoo of a model of this package; None if it is none of the zoo.

    By its structure, since the name that it was built with may have been given another depth or
    width. Head and position embeddings do not count: they follow the data.
    """
    own = _structure(model)
    return next((name for name in list_models() if _structure_in_zoo(name) == own), None)


@cache
def _structure_in_zoo(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        return _structure(create_model(name))


# What changes the function that a module computes, and not the shapes of its parameters.
_SETTINGS = ("num_heads", "stride", "window_size", "residual_pooling", "fusion")


def _structure(model: nn.Module) -> dict[str, Any]:
    """The shapes of all parameters, and the settings of all modules, by name."""
    shapes = {
        name: param.shape
        for name, param in model.named_parameters()
        if not name.startswith(("head.", "pos_embed."))
    }
    settings = {
        f"{name}.{key}": getattr(module, key)
        for name, module in model.named_modules()
        for key in _SETTINGS
        if hasattr(module, key)
    }
    return shapes | settings


def describe(name: str) -> ZooEntry:
    """Measure one model on the meta device, where it takes neither memory nor arithmetic.

    The attention of that device saves a little more for the backward pass than fused kernels do.

    Raises:
        ValueError: unknown name.
    """
    with torch.device("meta"):
        model = create_model(name)
        x = torch.empty(1, *input_shape(model))
    set_memory(model, "store")
    with saved_bytes(ignore=model) as held, FlopCounterMode(display=False) as operations:
        y = model(x)
    stored = held.bytes
    reversible = None
    if any(module.invertible for module in model.modules() if isinstance(module, MemoryManaged)):
        set_memory(model, "reversible")
        with saved_bytes(ignore=model) as held:
            y = model(x)  # the name keeps the graph alive, and with it what is held
        reversible = held.bytes
    del y
    return ZooEntry(
        name=name,
        parameters=sum(param.numel() for param in model.parameters()),
        macs=operations.get_total_flops() // 2,
        input_shape=tuple(x.shape[1:]),
        top1=PUBLISHED_TOP1.get(name),
        released=name in RELEASED_WEIGHTS,
        stored_bytes=stored,
        reversible_bytes=reversible,
    )


def zoo_table(entries: Iterable[ZooEntry], markdown: bool = False) -> str:
    """A table of models with its notes: aligned plain text, or Markdown."""
    rows = [_HEADER, *(_cells(entry) for entry in entries)]
    if markdown:
        rule = tuple("---" if i in _LEFT else "---:" for i in range(len(_HEADER)))
        lines = [f"| {' | '.join(row)} |" for row in (_HEADER, rule, *rows[1:])]
    else:
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_align(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", _NOTES])


def _cells(entry: ZooEntry) -> tuple[str, ...]:
    reversible = entry.reversible_bytes
    return (
        entry.name,
        f"{entry.parameters / 1e6:.2f}",
        f"{entry.macs / 1e9:.2f}",
        "x".join(str(side) for side in entry.input_shape),
        "-" if entry.top1 is None else f"{entry.top1:.1f}",
        "released" if entry.released else "-",
        f"{entry.stored_bytes / 1e6:.1f}",
        "-" if reversible is None else f"{reversible / 1e6:.1f}",
    )


def _align(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if i in _LEFT else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
