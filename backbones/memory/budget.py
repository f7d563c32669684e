"""How much memory a training step takes, and the fastest memory policy within a budget.

A training step is run on shape-only tensors while the bytes of all storages alive are counted. So
nothing of the size of the model is allocated, and no GPU is needed; and what is counted is what the
engine does, not a formula about it.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.engine.policies import Keep, MemoryPolicy, set_memory
from backbones.memory.counting import nbytes
from backbones.memory.simulation import Simulation, StepMemory

# Of the memory that is free, what "auto" plans with: the allocator fragments, and kernels take
# scratch memory of their own, neither of which can be counted beforehand.
_AUTO_SHARE = 0.9


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`fit_memory` chose.

    Attributes:
        policy: the policy of the blocks in front.
        stored_blocks: how many of the last blocks store their activations.
        keep: products of the other blocks whose outputs are kept.
        slices: in how many parts of the batch they run.
        blocks: how many blocks the model has.
        predicted_bytes: the peak of a training step, parameters and optimizer included.
        budget: what it had to stay within, in bytes.
        parts: where these bytes are at the moment of the peak, by the names of
            :attr:`StepMemory.peak`; their sum is ``predicted_bytes``. Gradients
            grow while held activations go, so the two are never there in full at the same time.
        relative_speed: the throughput by operation count, 1 being that of ``"store"``: what is
            run again in the backward pass is all that a policy costs.
    """

    policy: MemoryPolicy
    stored_blocks: int
    keep: Keep
    blocks: int
    predicted_bytes: int
    budget: int
    parts: dict[str, int]
    relative_speed: float
    slices: int = 1

    @property
    def summary(self) -> str:
        """The choice in words."""
        kept = self.keep if isinstance(self.keep, str) else ", ".join(self.keep)
        keeping = f" keeping {kept}" if kept else ""
        stored = f"the last {self.stored_blocks} of {self.blocks} blocks stored"
        parts = f", in {self.slices} slices of the batch" if self.slices > 1 else ""
        return f"{self.policy}{keeping}, {stored}{parts}"

    def __str__(self) -> str:
        lines = [
            f"{self.summary}: "
            f"{readable(self.predicted_bytes)} of {readable(self.budget)}, "
            f"{self.relative_speed:.2f} of the speed of 'store' by operation count"
        ]
        lines += [f"  {name:<16} {readable(size):>10}" for name, size in self.parts.items()]
        return "\n".join(lines)


def fit_memory(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    budget: int | str,
    autocast: torch.dtype | None = None,
) -> MemoryPlan:
    """Give ``model`` the fastest memory policy whose training step fits ``budget``, and report it.

    The blocks in front are reversed (checkpointed, in a model without reversible blocks) and keep
    what saves most work for its bytes, and as many of the last ones as fit store their activations;
    of all such mixtures the fastest by operation count is taken. Where not even the slowest fits,
    it runs in slices of the batch. See :func:`backbones.set_memory`.
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

    Returns:
        the plan, which is in force from the next forward pass on.

    Raises:
        ValueError: a budget that is too small (the message has the smallest) or cannot be read;
            ``"auto"`` on a CPU; no block in ``model`` whose memory can be managed.
    """
    device = _device_of(model)
    limit = parse_budget(budget, device) if budget != "auto" else _auto_budget(model, device)
    plan = fastest_that_fits(Simulation(model, example_input, device.type, autocast), limit)
    set_memory(model, plan.policy, plan.stored_blocks, plan.keep, plan.slices)
    return plan


def predict_memory(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    policy: MemoryPolicy,
    stored_blocks: int = 0,
    autocast: torch.dtype | None = None,
    keep: Keep = (),
    slices: int = 1,
) -> StepMemory:
    """The memory of a training step under a policy: its peak, and what it holds for backward.

    Arguments and errors as for :func:`fit_memory` and :func:`backbones.set_memory`. ``model`` is
    unchanged.
    """
    simulation = Simulation(model, example_input, _device_of(model).type, autocast)
    return simulation.step(policy, stored_blocks, keep, slices)


def parse_budget(budget: int | str, device: torch.device | None = None) -> int:
    """Bytes from a number or from a string as :func:`fit_memory` takes; ``"auto"`` for a GPU.

    Raises:
        ValueError: not such a string; not positive; ``"auto"`` for a device that is no GPU.
    """
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
    """The mixture of kept products and stored blocks with the fewest operations that fits.

    The peak grows with either: what is kept is tried from nothing to everything, and to each the
    largest number of stored blocks is found by bisection.

    Raises:
        ValueError: the budget, in bytes, is too small even with nothing kept and no block stored,
            and sample by sample.
    """
    policy, blocks = simulation.saving_policy, simulation.blocks
    smallest = simulation.step(policy).peak_bytes
    if smallest > budget:
        return _in_slices(simulation, budget, smallest)
    fits = blocks
    chosen: tuple[StepMemory, int, Keep] | None = None
    for keep in simulation.keeps:

        def peak(stored: int, keep: Keep = keep) -> int:
            return simulation.step(policy, stored, keep).peak_bytes

        if peak(0) > budget:
            break
        if peak(fits) > budget:
            fits = bisect_right(range(fits), budget, key=peak) - 1
        step = simulation.step(policy, fits, keep)
        if chosen is None or step.operations < chosen[0].operations:
            chosen = step, fits, keep
        if fits == blocks:
            break
    assert chosen is not None
    step, stored, keep = chosen
    speed = simulation.step("store").operations / step.operations
    return MemoryPlan(policy, stored, keep, blocks, step.peak_bytes, budget, step.peak, speed)


def _in_slices(simulation: Simulation, budget: int, smallest: int) -> MemoryPlan:
    """Nothing kept, in as few slices of the batch as fit."""
    policy, slices, batch = simulation.saving_policy, 1, simulation.inputs[0].shape[0]
    while slices < batch:
        slices = min(2 * slices, batch)
        try:
            step = simulation.step(policy, 0, (), slices)
        except RuntimeError:  # samples of the batch touch each other
            break
        if step.peak_bytes <= budget:
            speed = simulation.step("store").operations / step.operations
            blocks, size = simulation.blocks, step.peak_bytes
            return MemoryPlan(policy, 0, (), blocks, size, budget, step.peak, speed, slices)
        if step.peak_bytes >= smallest:  # what is run is not the peak
            break
        smallest = step.peak_bytes
    raise ValueError(
        f"a training step does not fit {readable(budget)}: the smallest budget is {smallest} "
        f"bytes ({readable(smallest)}), with no block stored. Give more, or a smaller batch."
    )


def _device_of(model: nn.Module) -> torch.device:
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device


def _auto_budget(model: nn.Module | None, device: torch.device) -> int:
    """What "auto" stands for: memory that is free, or that the model has taken out of it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            "the budget 'auto' needs a GPU that tells what it has free: give a number, "
            "such as '12GB'"
        )
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
