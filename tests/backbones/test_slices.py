"""Blocks that run in parts of the batch: the same gradients, and the working set of one part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook

from backbones import MemoryPolicy, ReversibleBlock, ReversibleSequence, create_model, set_memory
from backbones.memory.budget import fit_memory
from backbones.memory.simulation import Simulation
from tests.backbones.helpers import (
    DIM,
    assert_grads_near,
    assert_same_step,
    make_sequence,
    make_streams,
    savers,
    train_step,
)
from tests.backbones.test_model_policies import CASES, grads_of, make


@savers
@pytest.mark.parametrize("keep", ((), ("g.mlp.fc2",), "products"), ids=str)
@pytest.mark.parametrize("depth, slices", ((1, 2), (4, 2), (3, 99)))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_gradients(
    policy: MemoryPolicy, keep: Any, depth: int, slices: int, dtype: torch.dtype, tolerance: float
) -> None:
    """With drop path, whose mask is that of the batch; in the first, observed step and the next."""
    sequence = make_sequence(depth, drop_path=0.3, dtype=dtype)
    stored = train_step(sequence)
    for stored_blocks in {0, depth // 2}:
        set_memory(sequence, policy, stored_blocks, keep, slices)
        for _ in range(2):
            assert_same_step(train_step(sequence, policy=None), stored, tolerance)


def in_slices(sequence: ReversibleSequence, sizes: list[int]) -> Callable[..., tuple[Tensor, ...]]:
    """Plain autograd on the same slices."""

    def run(*streams: Tensor) -> tuple[Tensor, ...]:
        for block in sequence.blocks:
            mask = block.draw_mask(streams[0])
            assert mask is not None
            parts = zip(*(x.split(sizes) for x in (*streams, mask)), strict=True)
            streams = tuple(map(torch.cat, zip(*(block._couple(*p) for p in parts), strict=True)))
        return streams

    return run


class InSlices(nn.Module):
    def __init__(self, sequence: ReversibleSequence, sizes: list[int]) -> None:
        super().__init__()
        self.blocks = sequence.blocks
        self.run = in_slices(sequence, sizes)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        return self.run(x1, x2)


@savers
@pytest.mark.parametrize("autocast", (False, True))
def test_dropout_draws_once_for_both_runs(policy: MemoryPolicy, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float64
    sequence = make_sequence(3, dropout=0.4, drop_path=0.2, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    streams = torch.randn(2, 5, 7, DIM, generator=generator, dtype=torch.float64).to(dtype)
    inputs = (streams[0].requires_grad_(), streams[1].detach().requires_grad_())
    inputs = (inputs[0].detach().requires_grad_(), inputs[1])
    reference = InSlices(sequence, [3, 2])
    expected = train_step(reference, policy=None, inputs=inputs, autocast=autocast)
    set_memory(sequence, policy, keep=("g.mlp.fc1",), slices=2)
    for _ in range(2):
        step = train_step(sequence, policy=None, inputs=inputs, autocast=autocast)
        assert_same_step(step, expected, 5e-3 if autocast else 1e-9)


@pytest.mark.parametrize("reversible", (True, False))
@pytest.mark.parametrize("case", ("windows, padded", "mvit", "mvit, odd grids", "clips"))
def test_models(case: str, reversible: bool) -> None:
    """Transitions too; without dropout, which draws other numbers."""
    off = dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), 0.0)
    model, inputs = make(case, reversible, **off)
    inputs = inputs.repeat(-(-5 // len(inputs)), *[1] * (inputs.ndim - 1))[:5]
    set_memory(model, "store")
    expected = grads_of(model, inputs, maps=True)
    set_memory(model, "reversible" if reversible else "checkpoint", 1, slices=2)
    for _ in range(2):
        assert_grads_near(grads_of(model, inputs, maps=True), expected, 1e-9)
    assert CASES[case]


class Mean(nn.Module):
    """Uses the mean over the batch, behind a weight that is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * x.mean(dim=0, keepdim=True)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


class Gate(nn.Linear):
    """Python decides by the batch what is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Counting(nn.Linear):
    """Counts its runs, which slices multiply."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


def gate() -> nn.Module:
    return Gate(DIM, DIM)


def counting() -> nn.Module:
    return Counting(DIM, DIM)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(DIM, DIM))


@savers
@pytest.mark.parametrize(
    "branch, why",
    (
        (Mean, "samples of a batch touch each other,"),
        (Norm, r"samples of a batch touch each other \(BatchNorm1d\)"),
        (gate, "the code decides by numbers of the batch"),
        (counting, "every run changes what Counting holds"),
        (spectral, "every run changes what _SpectralNorm holds"),
    ),
)
def test_what_slices_would_change_is_refused(
    policy: MemoryPolicy, branch: Callable[[], nn.Module], why: str
) -> None:
    torch.manual_seed(0)
    sequence = ReversibleSequence([ReversibleBlock(nn.Linear(DIM, DIM), branch())]).double()
    set_memory(sequence, policy, slices=2)
    state = {key: value.clone() for key, value in sequence.state_dict().items()}
    message = rf"in ReversibleBlock {why}.*choose set_memory without slices"
    with pytest.raises(RuntimeError, match=message):
        train_step(sequence, policy=None)
    assert all(torch.equal(state[key], value) for key, value in sequence.state_dict().items())
    if branch is Norm:  # whose statistics are fixed now
        sequence.eval()
        stored = train_step(sequence)
        set_memory(sequence, policy, slices=2)
        assert_same_step(train_step(sequence, policy=None), stored, 1e-9)


class Caching(nn.Linear):
    """Makes a table when it first runs."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(DIM, dtype=x.dtype)
        return super().forward(x) * self.table


@savers
@pytest.mark.parametrize("what", ("cache", "forward hook", "backward hook", "on all modules"))
def test_caches_and_hooks_inside_go_with_slices(policy: MemoryPolicy, what: str) -> None:
    """Hooks are called once for the batch, which then runs as a whole."""
    calls: list[int] = []

    def trained(policy: MemoryPolicy, slices: int) -> Any:
        sequence = make_sequence(1)
        sequence.blocks[0].f = nn.Sequential(Caching(DIM, DIM)).double()
        torch.nn.init.eye_(sequence.blocks[0].f[0].weight)
        torch.nn.init.ones_(sequence.blocks[0].f[0].bias)
        calls.clear()
        if what == "forward hook":
            sequence.blocks[0].f[0].register_forward_hook(lambda *_: calls.append(1))
        if what == "backward hook":
            sequence.blocks[0].f[0].register_full_backward_hook(lambda *_: calls.append(1))
        set_memory(sequence, policy, slices=slices)
        with warnings.catch_warnings(record=True) as said, ExitStack() as stack:
            warnings.simplefilter("always")
            if what == "on all modules":
                hook = register_module_full_backward_hook(lambda *_: calls.append(1))
                stack.callback(hook.remove)
            return train_step(sequence, policy=None), [str(each.message) for each in said]

    (stored, _), once = trained("store", 1), len(calls)
    step, said = trained(policy, 2)
    assert_same_step(step, stored, 1e-9)
    assert len(calls) == once >= (what != "cache")
    costs = "stores" if what == "forward hook" else "does not run in slices"
    assert [costs in message for message in said] == [what != "cache"] * len(said)
    assert bool(said) == (what != "cache")


def test_the_trial_leaves_no_trace() -> None:
    """Neither random numbers nor counters move more than under another policy."""
    sequence = make_sequence(2, drop_path=0.3)
    stored = train_step(sequence)
    set_memory(sequence, "reversible", slices=2)
    assert torch.equal(train_step(sequence, policy=None).random_state, stored.random_state)
    x1, x2 = make_streams()
    set_memory(sequence, "reversible", slices=7)
    one = sequence(x1[:1], x2[:1])  # no more parts than samples
    assert one[0].shape[0] == 1
    with pytest.raises(ValueError, match="slices must be at least 1, got 0"):
        set_memory(sequence, "reversible", slices=0)
    assert "slices=7" in repr(sequence)


SMALL = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 2, "transitions": (1,)}


def test_the_working_set_is_that_of_a_slice() -> None:
    model = create_model("rev_mvit_base", **SMALL, num_classes=0)

    def per_image(slices: Callable[[int], int]) -> float:
        peaks = []
        for batch in (2, 4):
            x, parts = torch.zeros(batch, 3, 64, 64), slices(batch)
            peaks.append(Simulation(model, x, "cpu", slices=parts).step("reversible").peak_bytes)
        return (peaks[1] - peaks[0]) / 2

    assert per_image(lambda batch: batch) < 0.6 * per_image(lambda batch: 1)


def test_a_budget_that_only_slices_fit() -> None:
    model = create_model("rev_vit_tiny", img_size=64, embed_dim=48, depth=2, patch_size=4)
    inputs = torch.zeros(2, 3, 64, 64)
    smallest = Simulation(model, inputs, "cpu").step("reversible").peak_bytes
    assert fit_memory(model, inputs, smallest).slices == 1
    plan = fit_memory(model, inputs, smallest - 1)
    assert plan.slices == 2 and "in 2 slices of the batch" in plan.summary
    assert plan.predicted_bytes < smallest and "slices=2" in repr(model)
