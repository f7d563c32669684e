"""What benchmarks/bench_detection_memory.py counts is what autograd holds, and has its bounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from backbones import MemoryPolicy, create_model, set_memory
from benchmarks.bench_detection_memory import Ours, count, ours
from tests.backbones.saved_bytes import saved_bytes

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "rev_vit_tiny",
        {
            "depth": 2,
            "window_size": 5,
            "global_attn_indexes": (1,),
            "use_rel_pos": True,
            "drop_path_rate": 0.2,
        },
    ),
    "mvit": ("rev_mvit_base", {"embed_dim": 16, "depth": 3, "transitions": (1,)}),
}


@pytest.mark.parametrize("policy", ("store", "reversible"))
@pytest.mark.parametrize("kind", SMALL)
def test_autograd_holds_as_much(kind: str, policy: MemoryPolicy) -> None:
    name, options = SMALL[kind]
    build = partial(create_model, name, num_classes=0, img_size=128, **options)
    trunk, images = build(), torch.randn(1, 3, 128, 128)
    counted = count(lambda: Ours(build()), policy, 128)
    assert counted["held"] < counted["peak"]
    assert counted["parameters"] == sum(param.numel() for param in trunk.parameters())
    set_memory(trunk, policy)
    with torch.autocast("cpu", torch.bfloat16), saved_bytes(ignore=trunk) as saved:
        maps = trunk.feature_maps(images)
    assert maps[0].requires_grad
    # Beside what autograd saves: what reversed blocks keep for each other, and odds and ends.
    assert 0.9 * saved.bytes < counted["held"] < 1.1 * saved.bytes


def test_peak_of_vit_at_1024_pixels() -> None:
    """Of the wider trunk, with few blocks, since it does not depend on how many.

    A global one is the last.
    """
    peaks = []
    for depth in (1, 2):
        changes = {"depth": depth, "global_attn_indexes": (depth - 1,)}
        peaks.append(count(partial(ours, "Rev-ViT-L", 1024, **changes), "reversible", 1024)["peak"])
    assert peaks[1] < 1.02 * peaks[0]
    assert peaks[1] <= 0.32 * 2**30


def test_peak_of_mvit_at_1024_pixels() -> None:
    build = partial(ours, "Rev-MViT-B", 1024, depth=4, transitions=(1, 2, 3))
    assert count(build, "reversible", 1024)["peak"] <= 0.45 * 2**30
