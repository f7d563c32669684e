"""How much memory a training step takes, and the fastest memory policy within a budget.

A training step is run on shape-only tensors while the bytes of all storages alive are counted. So
nothing of the size of the model is allocated, and no GPU is needed; and what is counted is what the
engine does, not a formula about it.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.engine.policies import Keep, MemoryPolicy, set_memory
from backbones.memory.counting import nbytes
from backbones.memory.frontier import keeps_by_worth
from backbones.memory.simulation import Simulation

# Of the memory that is free, what "auto" plans with: the allocator fragments, and kernels take
# scratch memory of their own, neither of which can be counted beforehand.
_AUTO_SHARE = 0.9

# The name of a block in front of a layer's.
_BLOCK = re.compile(r"^.+?\.(?=[fg]\.|products$)")


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`fit_memory` chose.

    ``parts`` tells where the bytes are at the moment of the peak, by the names of
    :attr:`StepMemory.peak`; their sum is ``predicted_bytes``. Gradients grow while held activations
    go, so the two are never there in full at the same time. ``relative_speed`` is the throughput by
    operation count, 1 being that of ``"store"``: what is run again in the backward pass is all that
    a policy costs.
    """

    policy: MemoryPolicy  # of the blocks in front
    stored_blocks: int  # how many of the last blocks store their activations
    keep: Keep  # what the other blocks keep, as set_memory takes it
    blocks: int  # how many blocks the model has
    predicted_bytes: int  # the peak of a training step, parameters and optimizer included
    budget: int  # what it had to stay within, in bytes
    parts: dict[str, int]
    relative_speed: float
    slices: int = 1  # in how many parts of the batch the other blocks run

    @property
    def summary(self) -> str:
        """The choice in words."""
        names = (self.keep,) if isinstance(self.keep, str) else self.keep
        counts = Counter(_BLOCK.sub("", name) for name in names)
        kept = [name if name in names else f"{name} of {n} blocks" for name, n in counts.items()]
        keeping = f" keeping {', '.join(kept)}" if kept else ""
        stored = f"the last {self.stored_blocks} of {self.blocks} blocks stored"
        parts = f", in {self.slices} slices of the batch" if self.slices > 1 else ""
        return f"{self.policy}{keeping}, {stored}{parts}"

    def __str__(self) -> str:
        size = f"{readable(self.predicted_bytes)} of {readable(self.budget)}"
        speed = f"{self.relative_speed:.2f} of the speed of 'store' by operation count"
        lines = [f"{self.summary}: {size}, {speed}"]
        lines += [f"  {name:<16} {readable(size):>10}" for name, size in self.parts.items()]
        return "\n".join(lines)


def fit_memory(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    budget: int | str,
    autocast: torch.dtype | None = None,
    fused: bool = False,
    slices: int = 1,
) -> MemoryPlan:
    """Give ``model`` the fastest memory policy whose training step fits ``budget``, and report it.

    Blocks are reversed (checkpointed, in a model without reversible blocks), and of all products
    of all of them those are kept that save most work for their bytes; or as many of the last blocks
    as fit store their activations, whichever is faster by operation count. Where nothing can be
    kept and it does not fit, blocks run in slices of the batch. See :func:`backbones.set_memory`.
    A training step is forward, backward and AdamW. On a GPU attention is counted as fused. What is
    needed by the loss on the outputs is not counted, and neither is scratch memory that kernels
    allocate inside.

    >>> print(fit_memory(model, torch.zeros(64, 3, 224, 224), "12GB", autocast=torch.bfloat16))

    Args:
        model: not wrapped (DistributedDataParallel, …), on any device. Its weights and random
            state are left alone.
        example_input: an input of the size to train with, on any device, such as (B, 3, H, W);
            only its shape and dtype are used. For a model of several inputs, all of them.
        budget: bytes; or ``"12GB"``, ``"800MB"`` (powers of 1000), ``"8GiB"`` (powers of 1024);
            or ``"auto"``, nine tenths of what the model holds already and what is free on its GPU.
            For ``"auto"``, call before the optimizer has made its state.
        autocast: the dtype of the ``torch.autocast`` that the forward pass will run under;
            None for training in the dtype of the parameters.
        fused: whether AdamW will be ``fused=True``, which on a GPU needs no copy of the parameters.
        slices: of the batch, at least.

    Returns:
        the plan, which is in force from the next forward pass on.

    Raises:
        ValueError: a budget that is too small (the message has the smallest) or cannot be read;
            ``"auto"`` on a CPU; no block in ``model`` whose memory can be managed.
    """
    tensors = chain(model.parameters(), model.buffers())
    device = next(tensors, torch.empty(0)).device
    limit = parse_budget(budget, device) if budget != "auto" else _auto_budget(model, device)
    simulation = Simulation(model, example_input, device.type, autocast, fused, slices)
    plan = fastest_that_fits(simulation, limit)
    set_memory(model, plan.policy, plan.stored_blocks, plan.keep, plan.slices)
    return plan


def parse_budget(budget: int | str, device: torch.device | None = None) -> int:
    """Bytes from a number or from a string as :func:`fit_memory` takes; ``"auto"`` for a GPU. A
    ValueError for anything else, what is not positive, and ``"auto"`` for another device."""
    if budget == "auto":
        return _auto_budget(None, device or torch.device("cpu"))
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]i?)?B?\s*", str(budget), re.IGNORECASE)
    size = 0
    if match:
        unit = (match[2] or "").upper()
        base = 1024 if unit.endswith("I") else 1000
        size = int(float(match[1]) * base ** " KMGT".index(unit[:1] or " "))
    if size <= 0:
        raise ValueError(
            f"cannot read the budget {budget!r}: give bytes, or a size such as '12GB', '800MB' "
            "or '8GiB', or 'auto' on a GPU"
        )
    return size


def fastest_that_fits(simulation: Simulation, budget: int) -> MemoryPlan:
    """The kept products or stored blocks with the fewest operations that fit.

    Tried are the best sets of products of all blocks, whole blocks, and where all products fit,
    whole blocks beside them. Each is larger than the one before, so that the last that fits is
    found by bisection.

    A ValueError if the budget, in bytes, is too small even with nothing kept, and sample by sample.
    """
    policy, blocks = simulation.saving_policy, simulation.blocks
    smallest = simulation.step(policy).peak_bytes
    if smallest > budget:
        return _in_slices(simulation, budget, smallest)

    def peak_of(choice: tuple[int, Keep]) -> int:
        return simulation.step(policy, *choice).peak_bytes

    def last_of(choices: list[tuple[int, Keep]]) -> tuple[int, Keep]:
        if peak_of(choices[-1]) <= budget:
            return choices[-1]
        return choices[max(bisect_right(choices[:-1], budget, key=peak_of) - 1, 0)]

    counts = range(blocks + 1)
    chosen = [last_of([(stored, ()) for stored in counts])]
    if chosen[0][0] < blocks:
        keeps = keeps_by_worth(simulation)
        chosen.append(last_of([(0, keep) for keep in keeps]))
        if chosen[1][1] == keeps[-1]:
            chosen.append(last_of([(stored, keeps[-1]) for stored in counts]))
    stored, keep = min(chosen, key=lambda c: (simulation.step(policy, *c).operations, -c[0]))
    return _plan(simulation, budget, stored, keep, simulation.slices)


def _plan(simulation: Simulation, budget: int, stored: int, keep: Keep, slices: int) -> MemoryPlan:
    policy, blocks = simulation.saving_policy, simulation.blocks
    step = simulation.step(policy, stored, keep, slices)
    speed, size = simulation.step("store").operations / step.operations, step.peak_bytes
    return MemoryPlan(policy, stored, keep, blocks, size, budget, step.peak, speed, slices)


def _in_slices(simulation: Simulation, budget: int, smallest: int) -> MemoryPlan:
    """Nothing kept, in as few slices of the batch as fit."""
    policy, batch = simulation.saving_policy, simulation.inputs[0].shape[0]
    slices = simulation.slices
    while slices < batch:
        slices = min(2 * slices, batch)
        try:
            peak = simulation.step(policy, 0, (), slices).peak_bytes
        except RuntimeError:  # samples of the batch touch each other
            break
        if peak <= budget:
            return _plan(simulation, budget, 0, (), slices)
        before, smallest = smallest, min(smallest, peak)
        if peak > 0.99 * before:  # what is run is not the peak
            break
    raise ValueError(
        f"a training step does not fit {readable(budget)}: the smallest budget is {smallest} "
        f"bytes ({readable(smallest)}), with no block stored. Give more, or a smaller batch."
    )


def _auto_budget(model: nn.Module | None, device: torch.device) -> int:
    """What "auto" stands for: memory that is free, or that the model has taken out of it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        instead = "give a number, such as '12GB'"
        raise ValueError(f"the budget 'auto' needs a GPU that tells what it has free: {instead}")
    free = free_bytes(device)
    if model is not None:
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        free += sum(map(nbytes, chain(model.parameters(), model.buffers(), grads)))
    return int(_AUTO_SHARE * free)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device; ``sys.maxsize`` where the system does not tell.

    It tells of GPUs, and of the main memory under Linux.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the caching allocator keeps for later is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    kilobytes = dict(line.split()[:2] for line in lines)["MemAvailable:"]
    return 1024 * int(kilobytes)


def readable(size: int) -> str:
    """Bytes with a decimal unit, such as ``"1.25 GB"``."""
    if size < 1e6:
        return f"{size / 1e3:.1f} KB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
