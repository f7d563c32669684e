"""Slices of a batch, one after the other: a block's working set is then that of a slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.engine.ambient import OtherRandom, RandomState
from backbones.engine.state import ModuleState

Arguments = tuple[Any, ...]


class Whole:
    """A tensor of a batch that comes slice by slice; all None, if the slices are.

    Args:
        sizes: samples of each slice.
        into: where it is made; None for memory of its own.
    """

    def __init__(self, sizes: Sequence[int], into: Tensor | None = None) -> None:
        self._sizes = sizes
        self._next = 0
        self.tensor: Any = into

    def put(self, part: Tensor | None) -> None:
        """Take the next slice."""
        if part is None:
            return
        if len(self._sizes) == 1:
            self.tensor = part
            return
        if self.tensor is None:
            self.tensor = part.new_empty((sum(self._sizes), *part.shape[1:]))
        start = sum(self._sizes[: self._next])
        self.tensor[start : start + self._sizes[self._next]] = part
        self._next += 1


def cut(
    block: nn.Module, slices_of: Callable[[int], int], piece: Callable[..., Any], *args: Any
) -> tuple[list[int], Sequence[Arguments]]:
    """The arguments of a piece of a block's forward pass, (B, …) or None each, slice by slice.

    Args:
        block: the block.
        slices_of: gives the number of slices of a batch; there is at most a sample in each.
        piece: the method of the block that takes them.
        args: the arguments.

    Returns:
        the number of samples of each slice, and its arguments.

    Raises:
        RuntimeError: samples of the batch touch each other in there, so that it has no slices.
    """
    stream = next(arg for arg in args if arg is not None)
    batch = stream.shape[0] if stream.ndim else 1
    count = min(slices_of(batch), batch)
    if count < 2:
        return [batch], [args]
    _require_separate(block, piece, args)
    few, more = divmod(batch, count)
    sizes = [few + (index < more) for index in range(count)]
    nothing = [None] * count
    pieces = [nothing if arg is None else arg.split(sizes) for arg in args]
    return sizes, [*zip(*pieces, strict=True)]


# By block, the types and flags of the parts with which its samples were found to be separate.
_SEPARATE: WeakKeyDictionary[nn.Module, list[tuple[type, bool]]] = WeakKeyDictionary()


def _require_separate(block: nn.Module, piece: Callable[..., Any], args: Arguments) -> None:
    parts = [(type(part), part.training) for part in block.modules()]
    if _SEPARATE.get(block) == parts:
        return
    kinds = [kind for kind, training in parts if training and issubclass(kind, _BatchNorm)]
    mixing = kinds[0] if kinds else None
    if mixing is not None or _mixes(block, piece, args):
        where = f" ({mixing.__name__})" if mixing else ""
        raise RuntimeError(
            f"samples of a batch touch each other in {type(block).__name__}{where}, so that it "
            "cannot run slice by slice: choose set_memory without slices"
        )
    _SEPARATE[block] = parts


def _mixes(block: nn.Module, piece: Callable[..., Any], args: Arguments) -> bool:
    """Whether a sample without numbers (NaN) spoils the one beside it, tried on a copy.

    No factor stops a NaN, so that this also finds what does not count yet, behind weights of zero.
    """
    if any(type(arg) is not Tensor for arg in args if arg is not None):
        return False  # only shapes, or in parts elsewhere
    if any(arg.is_meta for arg in args if arg is not None):
        return False

    def beside(neighbour: float | None) -> list[Tensor]:
        two = [
            None
            if arg is None
            else torch.cat([arg[:1], arg[:1] if neighbour is None else arg[:1] * neighbour])
            for arg in args
        ]
        copy = ModuleState(block).private_copy()
        out = piece.__func__(copy, *two)  # type: ignore[attr-defined]
        return [t[0] for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]

    device = next(arg.device for arg in args if arg is not None)
    with torch.no_grad(), RandomState(device).replayed(), OtherRandom().replayed():
        spoilt = any(bool(out.isnan().any()) for out in beside(float("nan")))
        return spoilt and not any(bool(out.isnan().any()) for out in beside(None))
