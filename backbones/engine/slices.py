"""Slices of a batch, one after the other: a block's working set is then that of a slice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _every
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from backbones.engine.ambient import OtherRandom, RandomState
from backbones.engine.state import ModuleState, hooked_everywhere

Arguments = tuple[Any, ...]


class Whole:
    """A tensor of a batch that comes slice by slice; all None, if the slices are.

    Args:
        sizes: samples of each slice.
        into: where it is made; None for memory of its own.
    """

    def __init__(self, sizes: Sequence[int], into: Tensor | None = None) -> None:
        self._sizes = sizes
        self._start = 0  # of the next slice
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
        self.tensor[self._start : self._start + len(part)] = part
        self._start += len(part)


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
    if count < 2 or _has_hooks(block):
        return [batch], [args]
    _require_separate(block, piece, args)
    few, more = divmod(batch, count)
    sizes = [few + (index < more) for index in range(count)]
    return sizes, split(sizes, *args)


def split(sizes: list[int], *args: Any) -> list[Arguments]:
    """Tensors of a batch, or None each, slice by slice."""
    nothing = [None] * len(sizes)
    pieces = [nothing if arg is None else arg.split(sizes) for arg in args]
    return [*zip(*pieces, strict=True)]


# By block, the types and flags of the parts with which its samples were found to be separate.
_SEPARATE: WeakKeyDictionary[nn.Module, list[tuple[type, bool]]] = WeakKeyDictionary()


def _has_hooks(block: nn.Module) -> bool:
    """Whether hooks, to be called once, are inside or on all modules; warns of backward hooks."""
    parts = [vars(part) for part in block.modules() if part is not block]
    if hooked_everywhere() or any(o["_forward_hooks"] or o["_forward_pre_hooks"] for o in parts):
        return True  # of which the policies tell
    everywhere = _every._global_backward_hooks or _every._global_backward_pre_hooks
    if everywhere or any(o["_backward_hooks"] or o["_backward_pre_hooks"] for o in parts):
        warnings.warn(
            f"{type(block).__name__}: modules inside have backward hooks, which must be called "
            "once for the batch, so the block does not run in slices",
            stacklevel=2,
        )
        return True
    return False


def _require_separate(block: nn.Module, piece: Callable[..., Any], args: Arguments) -> None:
    parts = [(type(part), part.training) for part in block.modules()]
    if _SEPARATE.get(block) == parts:
        return
    kinds = [kind for kind, training in parts if training and issubclass(kind, _BatchNorm)]
    touch = "samples of a batch touch each other"
    if why := f"{touch} ({kinds[0].__name__})" if kinds else _why_not(block, piece, args):
        raise RuntimeError(
            f"in {type(block).__name__} {why}, so that it cannot run slice by slice: choose "
            "set_memory without slices"
        )
    _SEPARATE[block] = parts


class _Decides(Exception):
    """Python has read numbers of the batch."""


class _Unread(TorchDispatchMode):
    """A context in which Python may not read numbers that depend on certain tensors.

    It would decide by them. What ``tolist`` and ``numpy`` read is not seen here.

    Raises:
        _Decides: it has.
    """

    _READING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.allclose.default,
    )

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        super().__init__()
        self._depends = WeakIdKeyDictionary({t: None for t in tensors if t is not None})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if any(tensor in self._depends for tensor in given):
            if func in self._READING:
                raise _Decides
            made = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            self._depends.update(dict.fromkeys(made))
        return out


def _why_not(block: nn.Module, piece: Callable[..., Any], args: Arguments) -> str:
    """Why a block cannot run in slices, tried on a copy; "" if it can.

    A sample without numbers (NaN) must not spoil the one beside it. No factor stops a NaN, so that
    this also finds what does not count yet, behind weights of zero.
    """
    if any(type(arg) is not Tensor or arg.is_meta for arg in args if arg is not None):
        return ""  # only shapes, or in parts elsewhere
    copy = ModuleState(block).private_copy()
    state = ModuleState(copy)

    def run(neighbour: float) -> bool:
        two = [None if arg is None else torch.cat([arg[:1], arg[:1] * neighbour]) for arg in args]
        with _Unread(two):
            out = piece.__func__(copy, *two)  # type: ignore[attr-defined]
        out = out if isinstance(out, tuple) else (out,)
        return any(bool(t[0].isnan().any()) for t in out if isinstance(t, Tensor))

    device = next(arg.device for arg in args if arg is not None)
    with torch.no_grad(), RandomState(device).replayed(), OtherRandom().replayed():
        try:
            clean = not run(1.0)  # and caches are filled
            with state.observed():
                spoilt = run(float("nan"))
        except _Decides:
            return "the code decides by numbers of the batch"
    if clean and spoilt:
        return "samples of a batch touch each other"
    assert state.facts is not None
    kinds = [state.layout.types[number].__name__ for number in state.facts.stateful]
    return f"every run changes what {kinds[0]} holds" if kinds else ""
