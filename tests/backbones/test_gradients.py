"""Every memory policy computes what plain autograd computes."""

from __future__ import annotations

import pytest
import torch

from tests.backbones.helpers import assert_same_step, make_sequence, train_step

DEPTHS = (1, 2, 5, 6)
RANDOM = {"plain": (0.0, 0.0), "dropout": (0.3, 0.0), "drop_path": (0.0, 0.4), "both": (0.3, 0.4)}
# The dtype of the parameters, whether they run under autocast to bfloat16, and how near is equal.
PRECISIONS = {
    "float64": (torch.float64, False, 1e-9),
    "float32": (torch.float32, False, 1e-5),
    "autocast": (torch.float32, True, 5e-3),
}


@pytest.mark.parametrize("randomness", RANDOM)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_policy(precision: str, depth: int, randomness: str) -> None:
    dtype, autocast, tolerance = PRECISIONS[precision]
    sequence = make_sequence(depth, *RANDOM[randomness], dtype=dtype)
    stored = train_step(sequence, autocast=autocast)
    assert stored.outputs[0].dtype == dtype
    assert all(grad is not None for grad in stored.grads.values())
    for policy, k in [("checkpoint", 0), *(("reversible", k) for k in range(depth + 1))]:
        assert_same_step(train_step(sequence, policy, k, autocast=autocast), stored, tolerance)


def test_depths_and_randomness_make_a_difference() -> None:
    """The comparisons above would pass if the switches did nothing."""
    losses = {
        train_step(make_sequence(depth, *rates)).loss.item()
        for depth in DEPTHS
        for rates in RANDOM.values()
    }
    assert len(losses) == len(DEPTHS) * len(RANDOM)


@pytest.mark.parametrize(
    "mixture",
    (
        "reversible reversible checkpoint reversible store reversible",
        "store reversible reversible store reversible reversible",
        "checkpoint store reversible reversible reversible store",
    ),
)
def test_a_mixture_of_policies(mixture: str) -> None:
    """Each run of reversed blocks between blocks of other policies keeps its own end."""
    sequence = make_sequence(6, dropout=0.3, drop_path=0.4)
    stored = train_step(sequence)
    for block, policy in zip(sequence.blocks, mixture.split(), strict=True):
        block.memory_policy = policy
    assert_same_step(train_step(sequence, policy=None), stored, 1e-9)
