"""One training step on a shape-only copy of a model, in which live bytes are counted."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones.memory import MemoryManaged, MemoryPolicy, set_memory

__all__ = ["PARTS", "Simulation", "nbytes"]

# What the bytes at the peak of a training step are.
PARTS = (
    "parameters",
    "gradients",
    "optimizer state",
    "input",
    "held activations",
    "working set",
)


def nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts the bytes of the storages alive, by part, and keeps the counts of the peak.

    Attributes:
        part: what storages that are made now belong to.
        peak: bytes of each part at the moment when their sum was highest.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.part = "parameters"
        self.peak = dict.fromkeys(PARTS, 0)
        self._live = dict.fromkeys(PARTS, 0)
        self._highest = 0
        self._part_of: dict[int, str] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor``, unless it is counted already."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._part_of:
            return

        def end(_: object) -> None:
            del self._references[address]
            self._live[self._part_of.pop(address)] -= size

        self._references[address] = weakref.ref(storage, end)
        self._part_of[address] = self.part
        self._live[self.part] += size
        if sum(self._live.values()) > self._highest:
            self._highest, self.peak = sum(self._live.values()), dict(self._live)

    def move(self, tensor: Tensor, part: str) -> None:
        """Let the storage of ``tensor`` belong to another part from now on."""
        self.add(tensor)
        address, size = tensor.untyped_storage()._cdata, nbytes(tensor)
        self._live[self._part_of[address]] -= size
        self._live[part] += size
        self._part_of[address] = part


@contextmanager
def _fused_shape_only_attention(device_type: str) -> Iterator[None]:
    """Let shape-only attention take a fused kernel, where by itself it keeps the N x N weights.

    Any fused kernel stands for all of them: each keeps its output and one number per query. The
    function is replaced for the moment, because a TorchFunctionMode is out of force inside of
    ``backward``, where blocks are run again. Tensors with data, of other threads, go their way.
    """
    original = F.scaled_dot_product_attention

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> Tensor:
        unfused = device_type == "cpu" and dropout_p > 0.0  # no kernel has it there
        if q.device.type != "meta" or q.ndim != 4 or unfused or others.get("enable_gqa"):
            return original(q, k, v, attn_mask, dropout_p, is_causal, **others)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = kernel(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]
        return out

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class Simulation:
    """Training steps of a shape-only copy of a model.

    Attributes:
        blocks: how many blocks have a memory policy.
        saving_policy: ``"reversible"`` where the model has reversible blocks.
    """

    def __init__(
        self, model: nn.Module, example_input: Tensor | Sequence[Tensor], device_type: str
    ) -> None:
        # A copy that finds a shape-only twin of every tensor in its memory never copies data.
        twins: dict[int, Any] = {}
        for param in model.parameters():
            twin = torch.empty_like(param, device="meta")
            twins[id(param)] = nn.Parameter(twin, requires_grad=param.requires_grad)
        for buffer in model.buffers():
            twins[id(buffer)] = torch.empty_like(buffer, device="meta")
        self.model = copy.deepcopy(model, twins).train()
        inputs = [example_input] if isinstance(example_input, Tensor) else example_input
        self.inputs = [torch.empty_like(x, device="meta") for x in inputs]
        self.device_type = device_type
        managed = [block for block in self.model.modules() if isinstance(block, MemoryManaged)]
        self.blocks = len(managed)
        invertible = any(block.invertible for block in managed)
        self.saving_policy: MemoryPolicy = "reversible" if invertible else "checkpoint"
        set_memory(self.model, self.saving_policy)  # says what is wrong, if there are no blocks
        self._counter = _LiveBytes()
        self._known: dict[tuple[MemoryPolicy, int], dict[str, int]] = {}

        trained = [param for param in self.model.parameters() if param.requires_grad]
        for param in trained:
            param.grad = torch.empty_like(param)
            # Any, because the method has no types.
            cast(Any, param).register_post_accumulate_grad_hook(self._count_gradient)
        # The multi-tensor kernels, which AdamW takes on a GPU, need another copy of the parameters.
        self.optimizer = torch.optim.AdamW(trained, foreach=device_type != "cpu")
        self.optimizer.step()  # makes its state
        self.optimizer.zero_grad()

    def _count_gradient(self, param: Tensor) -> None:
        if param.grad is not None:
            self._counter.move(param.grad, "gradients")

    def parts(self, policy: MemoryPolicy, stored_blocks: int) -> dict[str, int]:
        """Bytes of each of :data:`PARTS` at the peak of one step."""
        key = policy, stored_blocks
        if key not in self._known:
            set_memory(self.model, policy, stored_blocks)
            self._known[key] = self._step()
        return self._known[key]

    def _step(self) -> dict[str, int]:
        counter = self._counter = _LiveBytes()
        there_anyway: dict[str, list[Any]] = {
            "parameters": [*self.model.parameters(), *self.model.buffers()],
            "optimizer state": tree_leaves(list(self.optimizer.state.values())),
            "input": self.inputs,
        }
        for counter.part, tensors in there_anyway.items():
            for tensor in tensors:
                counter.add(tensor)
        with counter, _fused_shape_only_attention(self.device_type), torch.enable_grad():
            counter.part = "held activations"
            outputs = [x for x in tree_leaves(self.model(*self.inputs)) if isinstance(x, Tensor)]
            # Squares, so that the gradients of the outputs are dense, as a real loss makes them.
            loss = torch.stack([x.float().square().sum() for x in outputs]).sum()
            del outputs
            counter.part = "working set"
            torch.autograd.backward(loss)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return counter.peak


# ---- The command
