"""What benchmarks/bench_detection_memory.py counts is what happens, and stays within its bounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from backbones import MemoryPolicy, create_model, set_memory
from benchmarks.bench_detection_memory import OURS, count_bytes, count_shapes
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
def test_tensors_with_data_take_as_much(kind: str, policy: MemoryPolicy) -> None:
    name, options = SMALL[kind]
    build = partial(create_model, name, num_classes=0, img_size=128, **options)
    trunk, images = build(), torch.randn(1, 3, 128, 128)
    set_memory(trunk, policy)
    counted = count_bytes(trunk, images)
    assert counted == count_shapes(build, policy, 128)
    assert counted["held"] < counted["peak"]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in counted["attention"]
    assert all(param.grad is not None for param in trunk.parameters())

    with torch.autocast("cpu", torch.bfloat16), saved_bytes(ignore=trunk) as saved:
        maps = trunk.feature_maps(images)
    assert maps[0].requires_grad
    # Beside what autograd saves: what reversed blocks keep for each other, and odds and ends.
    assert 0.9 * saved.bytes < counted["held"] < 1.1 * saved.bytes


def test_what_counts() -> None:
    class Square(nn.Linear):
        def feature_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self(x).float().square()]

    counted = count_bytes(Square(1000, 8, bias=False), torch.randn(1, 3, 1, 1000))
    # The input in half precision; what was squared in single precision; and the loss.
    assert counted["held"] == 3 * 1000 * 2 + 3 * 8 * 4 + 4
    # Of the weight's gradient, the one in half precision; the final one, twice as large, not.
    assert 1000 * 8 * 2 < counted["peak"] - counted["held"] < 1000 * 8 * 2 + 1000


def test_peak_of_vit_at_1024_pixels() -> None:
    """Of the wider trunk, with few blocks, since it does not depend on how many.

    A global one is the last.
    """
    name, options = OURS["Rev-ViT-L"]
    peaks = []
    for depth in (1, 2):
        changed = {**options, "depth": depth, "global_attn_indexes": (depth - 1,)}
        build = partial(create_model, name, num_classes=0, img_size=1024, **changed)
        peaks.append(count_shapes(build, "reversible", 1024)["peak"])
    assert peaks[1] < 1.02 * peaks[0]
    assert peaks[1] <= 0.30 * 2**30


def test_peak_of_mvit_at_1024_pixels() -> None:
    name, options = OURS["Rev-MViT-B"]
    changed = {**options, "depth": 4, "transitions": (1, 2, 3)}
    build = partial(create_model, name, num_classes=0, img_size=1024, **changed)
    assert count_shapes(build, "reversible", 1024)["peak"] <= 0.45 * 2**30
