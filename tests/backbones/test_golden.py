"""Tiny Rev-ViT and Rev-MViT against numbers of the original implementation, in float64.

The files in tests/golden/ were computed with SlowFast's own code from random weights. What these
tests were seen to catch: a norm epsilon of 1e-5 in any one kind of norm, the tanh form of GELU,
streams side by side in the wrong order, at the end or (images) in a transition. In a transition
that takes the mean (video), either order is the same function.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, RevMViT, RevViT, set_memory
from tests.backbones.helpers import assert_near

GOLDEN = Path(__file__).parents[1] / "golden"
TRANSITIONS = (1, 3)
MVIT = {"img_size": 64, "embed_dim": 10, "transitions": TRANSITIONS, "num_classes": 5}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "rev_vit_tiny": (
        RevViT,
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "num_classes": 5,
        },
    ),
    "rev_mvit_image_tiny": (RevMViT, {**MVIT, "depth": 6}),
    "rev_mvit_video_tiny": (
        RevMViT,
        {
            **MVIT,
            "depth": 5,
            "num_frames": 4,
            "kv_stride": 8,
            "qkv_bias": False,
            "fusion": "avg",
        },
    ),
}


def ours(theirs: dict[str, Tensor], stages: bool) -> dict[str, Tensor]:
    """SlowFast's names for our names: layers are numbered within their stage, q, k, v fused."""

    def layer(match: re.Match[str]) -> str:
        index = int(match[1])
        if not stages:
            return f"blocks.blocks.{index}."
        stage = sum(index >= first for first in TRANSITIONS)
        if index in TRANSITIONS:
            return f"stages.{stage}.transition."
        first_block = TRANSITIONS[stage - 1] + 1 if stage else 0
        return f"stages.{stage}.blocks.blocks.{index - first_block}."

    renamed: dict[str, Tensor] = {}
    separate: dict[str, dict[str, Tensor]] = {}
    for key, value in theirs.items():
        key = re.sub(r"rev_backbone\.layers\.(\d+)\.", layer, key)
        key = key.replace(".F.", ".f.").replace(".G.", ".g.").replace("head.projection", "head")
        key = key.replace("pre_q_fuse.fuse_fn.", "fuse.")
        key = re.sub(r"^pos_embed$", "pos_embed.weight", key)
        key = key.replace("pos_embed_spatial", "pos_embed.spatial.weight")
        key = key.replace("pos_embed_temporal", "pos_embed.temporal")
        if match := re.fullmatch(r"(.*attn)\.([qkv])\.(weight|bias)", key):
            separate.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value
        else:
            renamed[key] = value
    fused = {key: torch.cat([qkv[name] for name in "qkv"]) for key, qkv in separate.items()}
    return {key: value.double() for key, value in (renamed | fused).items()}


def golden_model(name: str) -> nn.Module:
    checkpoint = torch.load(GOLDEN / f"{name}.pyth", weights_only=True)
    kind, arguments = MODELS[name]
    model = kind(**arguments).double()
    model.load_state_dict(ours(checkpoint["model_state"], kind is RevMViT))
    return model


def expected_of(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"{name}.expected.pt", weights_only=True)


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected.double(), rtol=0.0, atol=tolerance)


# With 3 stored blocks of a Rev-MViT some are reversed, some stored, some checkpointed.
POLICIES: list[tuple[MemoryPolicy, int]] = [
    ("store", 0),
    ("checkpoint", 0),
    ("reversible", 0),
    ("reversible", 1),
    ("reversible", 3),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy, k", POLICIES)
@pytest.mark.parametrize("training", (True, False))
def test_original_implementation(name: str, policy: MemoryPolicy, k: int, training: bool) -> None:
    expected = expected_of(name)
    model = golden_model(name).train(training)
    set_memory(model, policy, k)
    inputs = expected["input"].double()
    logits = model(inputs)
    near(logits, expected["logits"], 2e-7)
    near(logits.softmax(-1), expected["eval_output"], 2e-7)
    features = model.forward_features(inputs)
    near(features, expected["features"], 1e-6)
    near(features.mean(1), expected["pooled"], 1e-6)
    loss = nn.functional.cross_entropy(logits, expected["labels"])
    assert loss.item() == pytest.approx(expected["loss"], abs=2e-7)

    loss.backward()
    grads = ours(expected["grads"], isinstance(model, RevMViT))
    assert grads.keys() == dict(model.named_parameters()).keys()
    for key, param in model.named_parameters():
        if key.endswith("norm_k.bias"):  # adds the same to every logit of a query
            assert param.grad.abs().max() < 1e-12, key
        else:
            assert_near(param.grad, grads[key], 1e-6, key)


@pytest.mark.parametrize("name", ("rev_mvit_image_tiny", "rev_mvit_video_tiny"))
def test_gradients_that_are_not_compared_are_zero_in_the_original_too(name: str) -> None:
    zero = expected_of(name)["structurally_zero_grads"]
    biases = [key for key in dict(golden_model(name).named_parameters()) if "norm_k.bias" in key]
    assert len(zero) == len(biases) and all(key.endswith("norm_k.bias") for key in zero)


@pytest.mark.parametrize("name", MODELS)
def test_streams_before_the_final_norm(name: str) -> None:
    """[Y1 | Y2] in this order."""
    model, expected = golden_model(name), expected_of(name)
    kept: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    model(expected["input"].double())
    near(kept[0].flatten(1, 3), expected["encoder_out"], 1e-6)
