"""The claim of the package: how much less a reversible model holds for the backward pass.

Counted per image on shape-only tensors, with fused attention on both sides, at the published sizes.
The paper (arXiv 2302.04869, tables 1 and 2) has 15.5 times for Rev-ViT-L and 2.3 for Rev-MViT-B: it
counts the working set too, and does not checkpoint the transitions.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones import MemoryPolicy, create_model, set_memory
from tests.backbones.saved_bytes import saved_bytes


def held_bytes(name: str, policy: MemoryPolicy, batch: int = 1, **options: int) -> int:
    """Of autograd, the images included."""
    with torch.device("meta"):
        model = create_model(name, **options)
    set_memory(model, policy)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # On the CPU by name, so that its fused attention is taken.
        model, x = model.to_empty(device="cpu"), torch.empty(batch, 3, 224, 224)
    with saved_bytes(ignore=model) as saved:
        logits = model(x)
    held = saved.bytes
    del logits
    return held


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


def test_depth_costs_nothing() -> None:
    """ViT-B width, float32, batch 4: the original implementation holds 9.7 MB at any depth."""
    images = 4 * 3 * 224 * 224 * 4
    options = {"batch": 4, "num_classes": 0}
    held = {
        depth: held_bytes("rev_vit_base", "reversible", depth=depth, **options) - images
        for depth in (2, 24, 96)
    }
    assert held[2] == held[24] == held[96] <= 9.7e6
    stored = [held_bytes("rev_vit_base", "store", depth=depth, **options) for depth in (1, 2)]
    assert stored[1] - stored[0] > 35e6  # for each block
