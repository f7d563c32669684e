"""What lies behind the trunk as blocks of their own, whose activation memory is a policy too.

Pyramid, RPN head, box heads and mask head hold most of what a detector with a reversed trunk keeps
for the backward pass. Here each gets the class that it has, and :class:`Piece` in front of it:
:func:`backbones.set_memory` finds it, and checkpointed it keeps its input and runs again slice by
slice. Names of parameters and modules stay.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling import FPN, SimpleFeaturePyramid
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import backbones
from backbones.engine import state
from backbones.engine.policies import Block

# Samples of a slice: images, or regions, of which an image has 512 for boxes and 128 for masks.
_IMAGES, _BOXES, _MASKS = 1, 128, 32

# Detectron2's layers use nothing but their own parameters.
state.SELF_CONTAINED.add("detectron2")


class Piece(Block):
    """A module of a detector as a block that is stored or checkpointed."""

    samples: int = 0  # images or regions in a slice; 0: as ``slices`` says
    is_compiled = False

    def slices_of(self, batch: int) -> int:
        return -(-batch // self.samples) if self.samples else self.slices


def _layer(kind: Any, method: str) -> dict[str, Any]:
    """The methods of a module that takes and gives a tensor."""

    def piece(self: Any, x: Tensor) -> Tensor:
        return _as_autocast(getattr(kind, method)(self, x))

    return {"piece": piece, method: lambda self, x: self.run(self.piece, x)}


def _rpn(kind: Any, _: str) -> dict[str, Any]:
    """Of an RPN head: maps -> scores and deltas of each."""

    def piece(self: Any, *maps: Tensor) -> tuple[Tensor, ...]:
        scores, deltas = kind.forward(self, [*maps])
        return (*scores, *deltas)

    def forward(self: Any, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        out = self.run(self.piece, *maps)
        return [*out[: len(maps)]], [*out[len(maps) :]]

    return {"piece": piece, "forward": forward}


def _fpn(kind: Any, _: str) -> dict[str, Any]:
    """Of a feature pyramid network: from what the stages of the trunk end with, which it has.

    Of the rest, maps, norms and all, nothing is kept.
    """

    def piece(self: Any, *grids: Tensor) -> tuple[Tensor, ...]:
        streams = self.bottom_up.model.streams
        ends = [grids[at : at + streams] for at in range(0, len(grids), streams)]
        return tuple(map(_as_autocast, kind.forward(self, ends).values()))

    def forward(self: Any, x: Tensor) -> dict[str, Tensor]:
        grids = [grid for end in self.bottom_up.stage_streams(x) for grid in end]
        return dict(zip(self._out_features, self.run(self.piece, *grids), strict=True))

    return {"piece": piece, "forward": forward}


@cache
def _piece_of(kind: Any, methods: Any, method: str) -> type[Piece]:
    def extra_repr(self: Any) -> str:
        return f"{kind.extra_repr(self)} memory_policy={self.memory_policy!r}".strip()

    parts = methods(kind, method) | {"extra_repr": extra_repr, "__module__": kind.__module__}
    return type(kind.__name__, (Piece, kind), parts)


def _as_autocast(x: Tensor) -> Tensor:
    """In autocast's dtype, as all outputs of layers are but those of Detectron2's own layer norm.

    The maps of a pyramid and their gradients, three at a time, are the largest that there is.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def listed(module: Any) -> list[Any]:
    """The heads of a cascade; of a plain detector, its one."""
    return [*module] if isinstance(module, nn.ModuleList) else [module]


def make_pieces(detector: Any) -> dict[str, list[Piece]]:
    """``pyramid``, ``rpn``, ``box_heads`` and ``mask_head`` of a detector as pieces that store.

    Of a cascade, all box heads; what a detector has none of is an empty list.
    """
    backbone, heads = detector.backbone, getattr(detector, "roi_heads", None)
    pyramid: list[Any] = []
    if isinstance(backbone, SimpleFeaturePyramid):
        pyramid = [*backbone.stages]
    elif isinstance(backbone, FPN) and hasattr(backbone.bottom_up, "stage_streams"):
        pyramid = [backbone]
    rpn = getattr(getattr(detector, "proposal_generator", None), "rpn_head", None)
    found: dict[str, tuple[list[Any], int, str]] = {
        "pyramid": (pyramid, _IMAGES, "forward"),
        "rpn": ([rpn], _IMAGES, "forward"),
        "box_heads": (listed(getattr(heads, "box_head", None)), _BOXES, "forward"),
        "mask_head": ([getattr(heads, "mask_head", None)], _MASKS, "layers"),
    }
    pieces: dict[str, list[Piece]] = {}
    for name, (modules, samples, method) in found.items():
        pieces[name] = [module for module in modules if hasattr(module, method)]
        for module in pieces[name]:
            if not isinstance(module, Piece):
                methods = _rpn if name == "rpn" else _fpn if module is backbone else _layer
                module.__class__ = _piece_of(type(module), methods, method)
            module.samples = samples
    return pieces


def set_heads_memory(detector: nn.Module, policy: str, slices: int = 0) -> None:
    """Choose what pyramid, RPN and heads keep: ``"store"`` or ``"checkpoint"``.

    The latter keeps the input of each, and runs it again in so many ``slices``; 0: images one by
    one, boxes by 128 and masks by 32. With batch norm in such a part, a ValueError.
    """
    for name, pieces in make_pieces(detector).items():
        for piece in pieces:
            norms = (m for m in piece.modules() if isinstance(m, _BatchNorm | NaiveSyncBatchNorm))
            if policy != "store" and (norm := next(norms, None)):
                mixes = f"{type(norm).__name__} in the {name.replace('_', ' ')} mixes images"
                remedy = "train.heads_memory=store keeps them together"
                raise ValueError(f"{mixes}, which run one after the other: {remedy}")
            if slices:
                piece.samples = 0
            backbones.set_memory(piece, policy, slices=max(slices, 1))  # type: ignore[arg-type]
