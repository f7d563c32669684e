"""Bytes that are alive, and operations, of what runs on shape-only tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from backbones.engine.kept import counted


def nbytes(tensor: Tensor) -> int:
    """The bytes of the whole storage that ``tensor`` is a view of."""
    return tensor.untyped_storage().nbytes()


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts the bytes of the storages alive, by part, and the operations."""

    def __init__(self, parts: Sequence[str], fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.part = parts[0]  # what storages that are made now belong to
        self.live = dict.fromkeys(parts, 0)  # bytes of each part now
        self.peak = dict(self.live)  # at the moment when their sum was highest
        self.operations = 0
        self.source: Any = None  # what runs now, if what it makes of products is to be told
        self.products: dict[Any, tuple[int, int]] = {}  # by source, bytes of outputs and operations
        self.timeline: list[tuple[int, int]] = []  # after each operator, operations and bytes
        self._fake = fake
        self._count_of = counted()
        self._total = self._highest = 0
        self._part_of: dict[int, str] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return cast(FakeTensor, args[0]).fake_device  # asked for so often that it takes time
        kwargs = kwargs or {}
        given = any(isinstance(arg, Tensor) for arg in tree_leaves((args, kwargs)))
        with nullcontext() if given else self._fake:  # torch.zeros(…): no memory is taken
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if count := self._count_of.get(getattr(func, "_overloadpacket", None)):
            operations = count(*args, **kwargs, out_val=out)
            self.operations += operations
            if self.source is not None:
                size = sum(nbytes(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
                before = self.products.get(self.source, (0, 0))
                self.products[self.source] = before[0] + size, before[1] + operations
        self.timeline.append((self.operations, self._total))
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor``, unless it is counted already."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._part_of:
            return

        def end(_: object) -> None:
            del self._references[address]
            self.live[self._part_of.pop(address)] -= size
            self._total -= size

        self._references[address] = weakref.ref(storage, end)
        self._part_of[address] = self.part
        self.live[self.part] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, dict(self.live)

    def move(self, tensor: Tensor, part: str) -> None:
        """Let the storage of ``tensor`` belong to another part from now on."""
        self.add(tensor)
        address, size = tensor.untyped_storage()._cdata, nbytes(tensor)
        self.live[self._part_of[address]] -= size
        self.live[part] += size
        self._part_of[address] = part


# What CUDA's autocast runs in float32, and the CPU's, under which the shape-only tensors run, not.
_FLOAT32_ON_CUDA = ("layer_norm", "group_norm")


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let shape-only tensors, which are on the CPU, be treated as the kernels of a GPU would.

    The functions are replaced for the moment, because a TorchFunctionMode is out of force inside
    of ``backward``, where blocks are run again. Tensors with data, of other threads, go their way.
    """
    attention = "scaled_dot_product_attention"
    originals: dict[str, Callable[..., Tensor]] = {
        name: getattr(F, name) for name in (attention, *_FLOAT32_ON_CUDA)
    }

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if isinstance(query, FakeTensor):
            # With either, the CPU has no fused kernel and keeps the N x N weights. Any fused
            # kernel stands for all of them: each keeps its output and one number per query.
            dropout_p = 0.0
            attn_mask = None if attn_mask is None else attn_mask.detach()
        return originals[attention](query, key, value, attn_mask, dropout_p, *args, **kwargs)

    def in_float32(name: str, *args: Any, **kwargs: Any) -> Tensor:
        fake = any(isinstance(arg, FakeTensor) for arg in (*args, *kwargs.values()))
        if fake and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(FakeTensor, Tensor.float, (args, kwargs))
        return originals[name](*args, **kwargs)

    vars(F).update({name: partial(in_float32, name) for name in _FLOAT32_ON_CUDA})
    vars(F)[attention] = fused
    try:
        yield
    finally:
        vars(F).update(originals)
