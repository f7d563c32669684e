"""Mixed precision: what the recomputation sees, and which dtypes come out."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, ReversibleBlock, ReversibleSequence, set_memory
from tests.backbones.helpers import (
    Streams,
    assert_grads_near,
    assert_same_step,
    every_saver,
    loss_of,
    make_sequence,
    make_streams,
    train_step,
)


@every_saver
@pytest.mark.parametrize("inside", (True, False))
def test_backward_inside_and_outside_the_region(policy: MemoryPolicy, k: int, inside: bool) -> None:
    sequence = make_sequence(4, 0.2, 0.3, dtype=torch.float32)
    stored, again = (
        train_step(sequence, *how, autocast=True, backward_inside_autocast=inside)
        for how in (("store", 0), (policy, k))
    )
    assert_same_step(again, stored, 5e-3)


class Recorder(nn.Module):
    """Notes the dtype that a matrix product has, each time it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen: list[torch.dtype] = []
        self.note = self.seen.append  # also from a copy, which a changing module is run again as

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.note(y.dtype)
        return y


@every_saver
@pytest.mark.parametrize("autocast", (True, False))
@pytest.mark.parametrize("backward_under_autocast", (True, False))
def test_recomputation_runs_in_the_dtype_of_the_forward_pass(
    policy: MemoryPolicy, k: int, autocast: bool, backward_under_autocast: bool
) -> None:
    f, g = Recorder(), Recorder()
    sequence = ReversibleSequence([ReversibleBlock(f, g), *make_sequence(1).float().blocks])
    set_memory(sequence, policy, k)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(*sequence(*make_streams(torch.float32)))
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_under_autocast):
        loss.backward()
    assert len(f.seen) == 2  # torch's checkpoint stops before it would run all of g again
    assert {*f.seen, *g.seen} == {torch.bfloat16 if autocast else torch.float32}


@every_saver
def test_a_region_switched_off_inside_another(policy: MemoryPolicy, k: int) -> None:
    class FullPrecision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = make_sequence(3, dtype=torch.float32)

        def forward(self, x1: Tensor, x2: Tensor) -> Streams:
            with torch.autocast("cpu", enabled=False):
                return self.trunk(x1, x2)

    module = FullPrecision()
    plain = train_step(module)
    assert_same_step(train_step(module, policy, k, autocast=True), plain, 1e-5)


@pytest.mark.parametrize(
    "first, second",
    [
        pair
        for pair in itertools.product(get_args(MemoryPolicy), repeat=2)
        if set(pair) != {"store"}
    ],
)
@pytest.mark.parametrize("first_pass_has_grad", (True, False))
def test_no_gradient_is_lost_to_the_weight_cache(
    first: MemoryPolicy, second: MemoryPolicy, first_pass_has_grad: bool
) -> None:
    """Two passes in one region: autocast keeps the cast weights of the first for the second."""
    sequence = make_sequence(3, dtype=torch.float32)

    def grads(first: MemoryPolicy, second: MemoryPolicy) -> dict[str, Tensor | None]:
        sequence.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            set_memory(sequence, first)
            with torch.set_grad_enabled(first_pass_has_grad):
                loss = loss_of(*sequence(*make_streams(torch.float32)))
            set_memory(sequence, second)
            loss = loss + loss_of(*sequence(*make_streams(torch.float32)))
        loss.backward()
        return {name: param.grad for name, param in sequence.named_parameters()}

    expected = train_step(sequence, autocast=True).grads
    passes = 2 if first_pass_has_grad else 1
    names = dict(sequence.named_parameters())
    assert_grads_near(grads(first, second), {name: passes * expected[name] for name in names}, 1e-2)


@every_saver
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_streams_are_kept_in_float32(policy: MemoryPolicy, k: int, dtype: torch.dtype) -> None:
    sequence = make_sequence(2, dtype=torch.float32)
    set_memory(sequence, policy, k)
    inputs = make_streams(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = sequence(*inputs)
    assert {y.dtype for y in outputs} == {torch.float32}
    loss_of(*outputs).backward()
    assert {x.grad.dtype for x in inputs} == {dtype}
    assert {param.grad.dtype for param in sequence.parameters()} == {torch.float32}
