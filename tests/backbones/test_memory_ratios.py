"""The claim of the package: how much less a reversible model holds for the backward pass.

Counted on shape-only tensors, with fused attention on both sides, at the published sizes. (That
these counts are what autograd holds is a test of test_budget.py.) The paper (arXiv 2302.04869,
tables 1 and 2) has 15.5 times for Rev-ViT-L and 2.3 for Rev-MViT-B: it counts the working set too,
and does not checkpoint the transitions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backbones import MemoryPolicy, create_model
from backbones.memory.simulation import Simulation
from backbones.registry import input_shape


def held_bytes(name: str, policy: MemoryPolicy, batch: int = 1, **options: Any) -> int:
    with torch.device("meta"):
        model = create_model(name, **options)
        inputs = torch.empty(batch, *input_shape(model))
    return Simulation(model, inputs, "cuda").held_bytes(policy)


# What is promised, and what is reached: less than that is a regression.
@pytest.mark.slow
@pytest.mark.parametrize(
    "stored, reversed_, promised, reached",
    [
        ("rev_mvit_base", "rev_mvit_base", 5.0, 25.0),
        ("rev_mvit_base_16x4", "rev_mvit_base_16x4", 5.0, 20.0),
        ("vit_large", "rev_vit_large", 15.5, 80.0),
    ],
)
def test_bytes_held(stored: str, reversed_: str, promised: float, reached: float) -> None:
    ratio = held_bytes(stored, "store") / held_bytes(reversed_, "reversible")
    print(f"{stored} stored over {reversed_} reversed: {ratio:.1f}")
    assert ratio >= reached >= promised
    assert held_bytes(reversed_, "checkpoint") > 2 * held_bytes(reversed_, "reversible")


def test_depth_costs_nothing() -> None:
    """ViT-B width, float32, batch 4: the original implementation holds 9.7 MB at any depth."""
    options = {"batch": 4, "num_classes": 0}
    held = [held_bytes("rev_vit_base", "reversible", depth=d, **options) for d in (2, 48)]
    assert held[0] == held[1] <= 9.7e6
    stored = [held_bytes("rev_vit_base", "store", depth=depth, **options) for depth in (1, 2)]
    assert stored[1] - stored[0] > 35e6  # for each block


def test_nor_does_the_depth_of_a_stage() -> None:
    small = {"img_size": 32, "embed_dim": 6, "transitions": (1, 3)}
    held = [held_bytes("rev_mvit_base", "reversible", depth=depth, **small) for depth in (6, 12)]
    assert held[0] == held[1]
