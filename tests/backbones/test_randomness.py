"""The random generators: the same numbers in the recomputation, and none of them used up."""

from __future__ import annotations

from functools import partial
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, set_memory
from tests.backbones.helpers import (
    SAVERS,
    assert_same_step,
    every_saver,
    loss_of,
    make_sequence,
    make_streams,
    train_step,
)


@every_saver
@pytest.mark.parametrize("dropout, drop_path", ((0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.3, 0.4)))
def test_generator_moves_as_in_plain_training(
    policy: MemoryPolicy, k: int, dropout: float, drop_path: float
) -> None:
    """After the forward pass and after the backward pass, not only at the end of the step."""

    def states(policy: MemoryPolicy, k: int) -> list[Tensor]:
        sequence = make_sequence(4, dropout, drop_path)
        set_memory(sequence, policy, k)
        torch.manual_seed(6)
        states = [torch.get_rng_state()]
        loss = loss_of(*sequence(*make_streams()))
        states.append(torch.get_rng_state())
        torch.manual_seed(7)
        loss.backward()
        return [*states, torch.get_rng_state()]

    before, after_forward, after_backward = states("store", 0)
    assert torch.equal(before, after_forward) == (dropout == drop_path == 0.0)
    torch.manual_seed(7)
    assert torch.equal(after_backward, torch.get_rng_state())
    again = states(policy, k)
    assert torch.equal(again[1], after_forward) and torch.equal(again[2], after_backward)


@every_saver
def test_drop_path_drops_whole_samples_by_its_rate(policy: MemoryPolicy, k: int) -> None:
    """One draw for both branches: a dropped sample passes unchanged, a kept one is scaled."""
    sequence = make_sequence(1, drop_path=0.75)
    set_memory(sequence, policy, k)
    x1, x2 = (x[:1].repeat(2000, 1, 1) for x in make_streams(requires_grad=False))
    y1, y2 = (y.detach() for y in sequence(x1, x2))
    untouched = torch.stack([(y1 == x1).all((1, 2)), (y2 == x2).all((1, 2))])
    assert torch.equal(untouched[0], untouched[1])
    assert 0.70 < untouched[0].double().mean() < 0.80
    kept = (~untouched[0]).nonzero()[0]
    torch.testing.assert_close(y1[kept] - x1[kept], 4 * sequence.blocks[0].f(x2[kept]))


def test_drop_path_does_nothing_in_eval_mode() -> None:
    with_drop_path, without = make_sequence(2, drop_path=0.5).eval(), make_sequence(2).eval()
    for policy, k in SAVERS:
        assert_same_step(train_step(with_drop_path, policy, k), train_step(without), 1e-9)


class FailingOnce(nn.Module):
    """Draws random numbers, then raises in the call of the given number."""

    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner = inner
        # Counts from outside, where the second run counts on.
        self.count = partial(next, count(1))
        self.failing = call

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(self.inner(x), 0.5)
        if self.count() == self.failing:
            raise ValueError("out of luck")
        return y


@pytest.mark.parametrize("branch", ("f", "g"))
@pytest.mark.parametrize("policy, k", [("reversible", 0), ("reversible", 1)])
def test_an_exception_in_the_recomputation(policy: MemoryPolicy, k: int, branch: str) -> None:
    """It leaves the generator where it was, and the next step is right."""
    sequence = make_sequence(4, dropout=0.2)
    failing = FailingOnce(getattr(sequence.blocks[1], branch), call=2)
    setattr(sequence.blocks[1], branch, failing)
    set_memory(sequence, policy, k)
    loss = loss_of(*sequence(*make_streams()))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="out of luck"):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(isinstance(param, nn.Parameter) for param in sequence.parameters())
    again = train_step(sequence, policy, k)
    assert_same_step(again, train_step(sequence, "store"), 1e-9)
