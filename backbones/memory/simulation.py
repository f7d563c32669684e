"""One training step on a shape-only copy of a model, in which live bytes and work are counted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves

from backbones.engine.kept import linear_layers
from backbones.engine.policies import Block, Keep, MemoryPolicy, blocks_of, set_memory
from backbones.memory.counting import Counter, as_on_a_gpu

_ASKS_FOR_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
)


@dataclass(frozen=True)
class StepMemory:
    """The memory of one training step, in bytes, and its work.

    ``peak`` has each part at the moment when their sum is highest: ``parameters`` (with the
    buffers), ``gradients``, ``optimizer state``, ``input``; ``stem``, ``stage 1`` …, ``head``: what
    these made in the forward pass and is still alive; ``working set``: what the backward pass and
    the optimizer need for the moment.
    """

    peak: dict[str, int]
    held: dict[str, int]  # of the parts of the forward pass, what waits for the backward pass
    operations: int  # of matrix products, convolutions and attention, forward and backward
    timeline: list[tuple[int, int]]  # after each operator, operations so far and bytes alive
    spans: list[tuple[int, int]]  # between which places in it each block holds something
    passes_bytes: int  # the highest sum before the optimizer's step, in forward and backward pass

    @property
    def peak_bytes(self) -> int:
        """The highest sum of all parts."""
        return sum(self.peak.values())

    @property
    def held_bytes(self) -> int:
        """What the forward pass leaves for the backward pass, of all parts together."""
        return sum(self.held.values())


def _stages(model: nn.Module) -> dict[Block, str]:
    """The stage that each block belongs to.

    Stages are the children of the innermost module that holds all blocks, by their names or
    numbers, or that module itself where its children are the blocks.
    """
    blocks = blocks_of(model)
    paths = [name.split(".") for name in blocks]
    depth = _common(paths)
    holders = [path[depth] if path[depth + 1 :] else "" for path in paths]
    numbers = {holder: index for index, holder in enumerate(dict.fromkeys(holders), start=1)}
    named = not any(holder.isdigit() or holder in ("", "stem", "head") for holder in holders)
    stages = [holder if named else f"stage {numbers[holder]}" for holder in holders]
    return dict(zip(blocks.values(), stages, strict=True))


def _short_names(names: list[str]) -> list[str]:
    """Without what all have in common in front, as wrappers add some."""
    paths = [name.split(".") for name in names]
    common = min([_common(paths), *(len(path) - 1 for path in paths)])
    # A number alone says little.
    common -= common > 0 and any(path[common].isdigit() for path in paths)
    return [".".join(path[common:]) for path in paths]


def _common(paths: list[list[str]]) -> int:
    """How many parts all have in common in front."""
    return sum(1 for _ in takewhile(lambda level: len({*level}) == 1, zip(*paths, strict=False)))


class Simulation:
    """Training steps of a shape-only copy of a model: forward, backward and AdamW.

    Arguments as for :func:`backbones.fit_memory`; ``device_type`` is where training would run. A
    ValueError for no block whose memory can be managed; nothing to train; an empty or no input; a
    model that cannot be copied, or, in :meth:`step`, one that asks for the values of its tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor | Sequence[Tensor],
        device_type: str,
        autocast: torch.dtype | None = None,
        fused: bool = False,
        slices: int = 1,
    ) -> None:
        inputs = [example_input] if isinstance(example_input, Tensor) else [*example_input]
        if not inputs or not all(isinstance(x, Tensor) and x.numel() for x in inputs):
            given = [tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs]
            raise ValueError(f"the example input must be a tensor, or several, not empty: {given}")
        if not any(param.requires_grad for param in model.parameters()):
            raise ValueError(f"nothing in {type(model).__name__} is trained (requires_grad)")
        # On the CPU, whose autocast and whose kernels they then take, and with no data there.
        # Tensors on the meta device know no autocast.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

        def shape_of(t: Tensor) -> Tensor:
            with self._fake:
                return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cpu")

        # A copy that finds a shape-only twin of every tensor in its memory never copies data.
        twins: dict[int, Any] = {id(buffer): shape_of(buffer) for buffer in model.buffers()}
        for param in model.parameters():
            twins[id(param)] = nn.Parameter(shape_of(param), requires_grad=param.requires_grad)
        # Whether compile_blocks has been there.
        self.is_compiled = any(block.is_compiled for block in blocks_of(model).values())
        try:
            self.model = copy.deepcopy(model, twins).train()
        except Exception as error:  # of any kind, by what the model holds
            raise ValueError(
                f"{type(model).__name__} cannot be copied to be simulated ({error}): keep locks, "
                "files and the like out of it"
            ) from error
        self.inputs = [shape_of(x) for x in inputs]
        self._on_cpu = device_type == "cpu"
        self.autocast, self.slices = autocast, slices  # slices of the batch in every step, at least
        self._stage_of = _stages(self.model)
        self.blocks = len(self._stage_of)
        self.block_names = _short_names([*blocks_of(self.model)])  # behind what all have in common
        self.invertible = [block.invertible for block in self._stage_of]
        self.saving_policy: MemoryPolicy = "reversible" if any(self.invertible) else "checkpoint"
        set_memory(self.model, self.saving_policy)  # says what is wrong, if there are no blocks
        self._forward_parts = ["stem", *dict.fromkeys(self._stage_of.values()), "head"]
        self._known: dict[tuple[MemoryPolicy, int, Keep, int], StepMemory] = {}
        self._observed: set[MemoryPolicy] = {"store"}  # blocks look at themselves in a first step
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._blocks_of: dict[int, list[int]] = {}
        self._source_of: dict[int, tuple[int, str]] = {}
        for index, block in enumerate(self._stage_of):
            self._source_of[id(block)] = index, ""
            for name, layer in linear_layers(block).items():
                self._source_of[id(layer)] = index, name
            for param in block.parameters():
                self._blocks_of.setdefault(id(param), []).append(index)
        self._trained = [param for param in self.model.parameters() if param.requires_grad]
        # The multi-tensor kernels, which AdamW takes on a GPU, need another copy of the parameters.
        several = None if fused else not self._on_cpu
        self.optimizer = torch.optim.AdamW(self._trained, foreach=several, fused=fused or None)

    @cached_property
    def _update(self) -> Counter:
        """The optimizer's step, the same behind every backward pass."""
        with self._fake:
            for param in self._trained:
                param.grad = torch.empty_like(param)
        self.optimizer.step()  # makes the state
        counter = self._counter = self._new_counter()
        for param in self._trained:
            self._count_gradient(param)
            # Any, because the method has no types.
            cast(Any, param).register_post_accumulate_grad_hook(self._count_gradient)
        counter.part = "working set"
        with counter:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return counter

    def _new_counter(self) -> Counter:
        """A counter of what is there before the forward pass."""
        there: dict[str, list[Any]] = {
            "parameters": [*self.model.parameters(), *self.model.buffers()],
            "gradients": [],
            "optimizer state": tree_leaves(list(self.optimizer.state.values())),
            "input": self.inputs,
        }
        counter = Counter([*there, *self._forward_parts, "working set"], self._fake)
        for counter.part, tensors in there.items():
            for tensor in tensors:
                counter.add(tensor)
        return counter

    def _count_gradient(self, param: Tensor) -> None:
        if param.grad is not None:
            self._counter.move(param.grad, "gradients")
        for block in self._blocks_of.get(id(param), ()):
            self._ends.setdefault(block, len(self._counter.timeline))

    @cached_property
    def products(self) -> dict[tuple[int, str], tuple[int, int]]:
        """The products of the blocks' forward pass: bytes of their outputs, and operations.

        By the index of the block and the name of the linear layer in it, ``""`` for others.
        """
        set_memory(self.model, "store")
        return self._passes(backward=False)[0].products

    def step(
        self, policy: MemoryPolicy, stored_blocks: int = 0, keep: Keep = (), slices: int = 1
    ) -> StepMemory:
        """One training step under a policy; see :func:`backbones.set_memory`."""
        if stored_blocks == self.blocks or policy == "store":
            policy, stored_blocks, keep, slices = "store", 0, (), 1
        slices = max(slices, self.slices)
        key = policy, stored_blocks, keep, slices
        if key not in self._known:
            if policy not in self._observed:  # of later steps, which training mostly consists of
                self._observed.add(policy)
                self.held_bytes(policy)
            set_memory(self.model, policy, stored_blocks, keep, slices)
            self._known[key] = self._step()
        return self._known[key]

    def held_bytes(self, policy: MemoryPolicy, stored_blocks: int = 0) -> int:
        """Those of :meth:`step`, sooner: it ends where the backward pass would begin."""
        set_memory(self.model, policy, stored_blocks)
        return sum(self._passes(backward=False)[1].values())

    def _step(self) -> StepMemory:
        update = self._update
        counter, held = self._passes(backward=True)
        self.optimizer.zero_grad()
        timeline = [(counter.operations, size) for _, size in update.timeline]
        peak = max(counter.peak, update.peak, key=lambda parts: sum(parts.values()))
        spans, end = [], len(counter.timeline)
        for block in range(self.blocks):  # one in which nothing is trained ends with the one before
            end = self._ends.get(block, end)
            spans.append((self._starts.get(block, 0), end))
        timeline, passes = counter.timeline + timeline, sum(counter.peak.values())
        return StepMemory(peak, held, counter.operations, timeline, spans, passes)

    def _passes(self, backward: bool) -> tuple[Counter, dict[str, int]]:
        """Forward, and backward if wanted: what was counted, and what was held between them."""
        counter = self._counter = self._new_counter()
        self._starts.clear()
        self._ends.clear()
        kernels = nullcontext() if self._on_cpu else as_on_a_gpu()
        with kernels, counter, torch.enable_grad():
            try:
                loss = self._forward(counter)
            except _ASKS_FOR_VALUES as error:
                raise ValueError(
                    f"{type(self.model).__name__} asks for the values of its tensors ({error}), as "
                    ".item() and boolean masks do, and a simulated step has only shapes: choose "
                    "with backbones.set_memory instead"
                ) from error
            held = {part: counter.live[part] for part in self._forward_parts}
            counter.part = "working set"
            if backward:
                torch.autograd.backward(loss)
        return counter, held

    def _forward(self, counter: Counter) -> Tensor:
        """The loss. What is made before the first block is the stem, after the last the head."""
        counter.part = "stem"
        *_, last = self._stage_of

        def enter(module: nn.Module, _args: Any) -> None:
            counter.source = source = self._source_of.get(id(module), counter.source)
            if isinstance(module, Block) and module in self._stage_of:
                counter.part = self._stage_of[module]
                self._starts[source[0]] = len(counter.timeline)

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            if id(module) in self._source_of:  # a layer's block goes on
                counter.source = None if isinstance(module, Block) else (counter.source[0], "")
            if module is last:
                counter.part = "head"

        # Global ones, because a block that has hooks of its own keeps its outputs for them.
        with (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave),
            torch.autocast("cpu", self.autocast, enabled=self.autocast is not None),
        ):
            outputs = tree_leaves(self.model(*self.inputs))
        # Squares, so that the gradients of the outputs are dense, as a real loss makes them.
        squares = [x.float().square().sum() for x in outputs if isinstance(x, Tensor)]
        return torch.stack(squares).sum()
