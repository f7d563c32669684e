"""A tiny Rev-ViT against numbers of the original implementation, in float64.

The two files in tests/golden/ were computed with SlowFast's own code from random weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, RevViT, set_memory
from tests.backbones.helpers import SAVERS, assert_near

GOLDEN = Path(__file__).parents[1] / "golden"


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """SlowFast's names for our names; their q, k and v are one projection of ours."""
    renamed: dict[str, Tensor] = {}
    separate: dict[str, dict[str, Tensor]] = {}
    for key, value in theirs.items():
        key = key.replace("rev_backbone.layers", "blocks.blocks")
        key = key.replace(".F.", ".f.").replace(".G.", ".g.").replace("head.projection", "head")
        if match := re.fullmatch(r"(.*attn)\.([qkv])\.(weight|bias)", key):
            separate.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value
        else:
            renamed["pos_embed.weight" if key == "pos_embed" else key] = value
    return renamed | {
        key: torch.cat([qkv[name] for name in "qkv"]) for key, qkv in separate.items()
    }


def golden_model(**overrides: object) -> RevViT:
    checkpoint = torch.load(GOLDEN / "rev_vit_tiny.pyth", weights_only=True)
    model = RevViT(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, **overrides
    ).double()
    weights = {key: value.double() for key, value in ours(checkpoint["model_state"]).items()}
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return torch.load(GOLDEN / "rev_vit_tiny.expected.pt", weights_only=True)


@pytest.mark.parametrize("policy, k", [("store", 0), *SAVERS])
@pytest.mark.parametrize("training", (True, False))
def test_original_implementation(
    expected: dict[str, Any], policy: MemoryPolicy, k: int, training: bool
) -> None:
    model = golden_model().train(training)
    set_memory(model, policy, k)
    images = expected["input"].double()
    logits = model(images)
    torch.testing.assert_close(logits, expected["logits"].double(), rtol=0.0, atol=2e-7)
    features = model.forward_features(images)
    torch.testing.assert_close(features, expected["features"].double(), rtol=0.0, atol=1e-6)
    pooled = features.mean(1)
    torch.testing.assert_close(pooled, expected["pooled"].double(), rtol=0.0, atol=1e-6)
    loss = nn.functional.cross_entropy(logits, expected["labels"])
    assert loss.item() == pytest.approx(expected["loss"], abs=2e-7)

    loss.backward()
    grads = ours({key: grad.double() for key, grad in expected["grads"].items()})
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        assert_near(param.grad, grads[name], 1e-6, name)


def test_streams_before_the_final_norm(expected: dict[str, Any]) -> None:
    """[Y1 | Y2] in this order."""
    model = golden_model()
    kept: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    model(expected["input"].double())
    streams = kept[0].flatten(1, 3)
    torch.testing.assert_close(streams, expected["encoder_out"].double(), rtol=0.0, atol=1e-6)
