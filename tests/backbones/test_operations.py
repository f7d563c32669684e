"""Saving memory costs one more forward pass of the blocks concerned, and not an operation more."""

from __future__ import annotations

import pytest
import torch

from backbones import MemoryPolicy, ReversibleSequence, set_memory
from tests.backbones.helpers import DIM, count_operations, loss_of, make_sequence

DEPTH = 6
BATCH, LENGTH = 2, 7
HIDDEN = 2 * DIM
# Two operations for each multiplication: qkv and proj, logits and weighted sum, fc1 and fc2.
LAST_LINEAR = 2 * BATCH * LENGTH * HIDDEN * DIM
ONE_BLOCK = 2 * BATCH * LENGTH * (4 * DIM * DIM + 2 * LENGTH * DIM) + 2 * LAST_LINEAR


def streams(requires_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x1, x2 = torch.randn(2, BATCH, LENGTH, DIM, dtype=torch.float64)
    return x1.requires_grad_(requires_grad), x2.requires_grad_(requires_grad)


def operations(sequence: ReversibleSequence, policy: MemoryPolicy, k: int = 0) -> tuple[int, int]:
    """Floating-point operations of the matrix products, forward and backward."""
    set_memory(sequence, policy, k)
    inputs = streams(requires_grad=True)
    with count_operations() as forward:
        loss = loss_of(*sequence(*inputs))
    with count_operations() as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_forward_is_the_same_under_every_policy() -> None:
    sequence = make_sequence(DEPTH)
    for policy, k in (("store", 0), ("checkpoint", 0), ("reversible", 0), ("reversible", 2)):
        assert operations(sequence, policy, k)[0] == DEPTH * ONE_BLOCK


@pytest.mark.parametrize("k", range(DEPTH + 1))
@pytest.mark.parametrize("dropout, drop_path", ((0.0, 0.0), (0.2, 0.3)))
def test_reversing_costs_one_forward_of_the_reversed_blocks(
    k: int, dropout: float, drop_path: float
) -> None:
    sequence = make_sequence(DEPTH, dropout, drop_path)
    stored = operations(sequence, "store")[1]
    assert operations(sequence, "reversible", k)[1] == stored + (DEPTH - k) * ONE_BLOCK


@pytest.mark.parametrize("k", (0, 2))
def test_checkpointing_costs_at_most_one_forward_of_its_blocks(k: int) -> None:
    """torch's checkpoint stops before the last layer, whose output its backward does not need."""
    sequence = make_sequence(DEPTH)
    extra = operations(sequence, "checkpoint", k)[1] - operations(sequence, "store")[1]
    blocks = DEPTH - k
    assert blocks * (ONE_BLOCK - LAST_LINEAR) <= extra <= blocks * ONE_BLOCK


def test_the_bound_of_three_quarters() -> None:
    """With backward = 2 forward, reversing takes 4 forward passes where plain training takes 3."""
    sequence = make_sequence(DEPTH).eval()
    stored, reversed_ = (sum(operations(sequence, p)) for p in ("store", "reversible"))
    assert stored / reversed_ == pytest.approx(0.75, abs=0.01)


def test_a_frozen_start_is_not_recomputed() -> None:
    sequence = make_sequence(DEPTH)
    sequence.blocks[:2].requires_grad_(False)
    counts = {}
    for policy in ("store", "reversible"):
        set_memory(sequence, policy)
        loss = loss_of(*sequence(*streams(requires_grad=False)))
        with count_operations() as backward:
            loss.backward()
        counts[policy] = backward.get_total_flops()
    assert counts["reversible"] == counts["store"] + (DEPTH - 2) * ONE_BLOCK


def test_no_recomputation_without_gradients() -> None:
    sequence = make_sequence(DEPTH)
    with count_operations() as counter, torch.no_grad():
        sequence(*streams(requires_grad=False))
    assert counter.get_total_flops() == DEPTH * ONE_BLOCK
