"""The claim of the package: how much less a reversible model holds for the backward pass.

Counted per image on shape-only tensors, with fused attention on both sides, at the published sizes.
The paper (arXiv 2302.04869, tables 1 and 2) has 15.5 times for Rev-ViT-L and 2.3 for Rev-MViT-B: it
counts the working set too, and does not checkpoint the transitions.
"""

from __future__ import annotations

import pytest
import torch

from backbones import MemoryPolicy, create_model
from backbones.simulate import Simulation


def held_bytes(name: str, policy: MemoryPolicy) -> int:
    with torch.device("meta"):
        model, x = create_model(name), torch.empty(1, 3, 224, 224)
    return Simulation(model, x, "cuda").step(policy).held_bytes


# What is promised, and what is reached: less than that is a regression.
@pytest.mark.slow
@pytest.mark.parametrize(
    "stored, reversed_, promised, reached",
    [("rev_mvit_base", "rev_mvit_base", 5.0, 25.0), ("vit_large", "rev_vit_large", 15.5, 80.0)],
)
def test_bytes_held(stored: str, reversed_: str, promised: float, reached: float) -> None:
    ratio = held_bytes(stored, "store") / held_bytes(reversed_, "reversible")
    print(f"{stored} stored over {reversed_} reversed: {ratio:.1f}")
    assert ratio >= reached >= promised
