"""Rev-MViT and its twin under every memory policy: gradients, autocast, what is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, MViT, RevMViT, create_model, set_memory
from backbones.engine.policies import blocks_of
from backbones.models.pooled_attention import Fusion, StageTransition
from tests.backbones.helpers import assert_grads_near
from tests.backbones.saved_bytes import saved_bytes
from tests.backbones.test_mvit import SMALL, SMALL_CLIP, random_model, small_input

# Every way to save memory; with 3 stored blocks some are reversed, some stored, some checkpointed.
SAVERS: list[tuple[MemoryPolicy, int]] = [
    ("checkpoint", 0),
    ("reversible", 0),
    ("reversible", 1),
    ("reversible", 3),
]
# Everything random switched on.
DROPS = {
    "drop_path_rate": 0.5,
    "drop_rate": 0.2,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.1,
}


def grads_of(
    model: MViT, inputs: Tensor, policy: MemoryPolicy, k: int, maps: bool
) -> dict[str, Tensor | None]:
    """Gradients of the parameters and the input, and the loss, from a fixed seed."""
    set_memory(model, policy, k)
    model.zero_grad(set_to_none=True)
    inputs = inputs.clone().requires_grad_()
    torch.manual_seed(3)
    outputs = model.feature_maps(inputs) if maps else [model(inputs)]
    loss = torch.zeros((), dtype=torch.float64)
    for y in outputs:
        ramp = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)
        loss = loss + ((y - ramp) ** 2 * (1.5 + ramp)).mean()
    loss.backward()
    grads = {
        name: param.grad
        for name, param in model.named_parameters()
        if not name.endswith("norm_k.bias")  # zero but for rounding
    }
    return grads | {"input": inputs.grad, "loss": loss.detach()}


@pytest.mark.parametrize("maps", (False, True), ids=("logits", "every stage's map"))
@pytest.mark.parametrize("arguments", (SMALL, {**SMALL_CLIP, "fusion": "avg"}), ids=("2d", "3d"))
def test_policies_agree_with_everything_random(arguments: dict[str, Any], maps: bool) -> None:
    model = random_model(RevMViT, **arguments, **DROPS)
    inputs = small_input(model.clips)
    expected = grads_of(model, inputs, "store", 0, maps)
    assert all(grad is None or grad.isfinite().all() for grad in expected.values())
    for policy, k in SAVERS:
        assert_grads_near(grads_of(model, inputs, policy, k, maps), expected, 1e-9)


@pytest.mark.parametrize("maps", (False, True), ids=("logits", "every stage's map"))
@pytest.mark.parametrize("arguments", (SMALL, SMALL_CLIP), ids=("2d", "3d"))
def test_policies_of_the_twin_agree(arguments: dict[str, Any], maps: bool) -> None:
    model = random_model(MViT, **arguments, **DROPS)
    inputs = small_input(model.clips)
    expected = grads_of(model, inputs, "store", 0, maps)
    for k in (0, 3):
        assert_grads_near(grads_of(model, inputs, "checkpoint", k, maps), expected, 1e-9)


@pytest.mark.parametrize("fusion", ("avg", "concat", "concat_linear_2"))
def test_policies_agree_on_odd_grids(fusion: Fusion) -> None:
    model = random_model(RevMViT, **SMALL, fusion=fusion)
    inputs = small_input(False, batch=1, size=(34, 51))  # grids of 9 x 13, 5 x 7 and 3 x 4
    expected = grads_of(model, inputs, "store", 0, maps=True)
    for policy, k in SAVERS:
        assert_grads_near(grads_of(model, inputs, policy, k, maps=True), expected, 1e-9)


def test_neighbouring_and_last_transitions() -> None:
    model = random_model(RevMViT, **{**SMALL, "depth": 4, "transitions": (1, 2, 3)})
    inputs = small_input(False)
    expected = grads_of(model, inputs, "store", 0, maps=True)
    for policy, k in SAVERS:
        assert_grads_near(grads_of(model, inputs, policy, k, maps=True), expected, 1e-9)


def test_gradient_of_one_stage_alone() -> None:
    """The blocks behind it get none, and nobody rebuilds anything for them."""
    grads = {}
    for policy in ("store", "reversible"):
        model = random_model(RevMViT, **SMALL)
        set_memory(model, policy)
        model.feature_maps(small_input(False))[1].square().mean().backward()
        grads[policy] = {
            name: param.grad for name, param in model.named_parameters() if "norm_k" not in name
        }
    assert_grads_near(grads["reversible"], grads["store"], 1e-9)
    without = {name for name, grad in grads["store"].items() if grad is None}
    assert without and all(name.startswith(("stages.2", "norm", "head")) for name in without)


@pytest.mark.parametrize("arguments", (SMALL, {**SMALL_CLIP, "kv_stride": 4}), ids=("2d", "3d"))
def test_autocast(arguments: dict[str, Any]) -> None:
    """Policies agree with each other closely, and with float32 as far as bfloat16 can."""

    def step(policy: MemoryPolicy, autocast: bool) -> dict[str, Tensor | None]:
        model = random_model(RevMViT, **arguments).float()
        set_memory(model, policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(small_input(model.clips).float())
        logits.float().square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if "norm_k" not in name}

    stored = step("store", autocast=True)
    for policy in ("checkpoint", "reversible"):
        # bfloat16 has 8 bits: the rounding of a rebuilt input may flip the last one.
        assert_grads_near(step(policy, autocast=True), stored, 0.02)
    assert_grads_near(stored, step("store", autocast=False), 0.2)


def test_set_memory_counts_transitions() -> None:
    model = RevMViT(**SMALL)
    blocks = [*blocks_of(model).values()]
    reversed_and_not = ["reversible", "checkpoint", "reversible", "checkpoint"] + 2 * ["reversible"]
    assert [block.memory_policy for block in blocks] == reversed_and_not, "of a new model"
    assert [isinstance(block, StageTransition) for block in blocks] == [
        policy == "checkpoint" for policy in reversed_and_not
    ]
    set_memory(model, "store")
    assert {block.memory_policy for block in blocks} == {"store"}
    for k in range(7):
        set_memory(model, "reversible", k)
        policies = [block.memory_policy for block in blocks]
        assert policies == reversed_and_not[: 6 - k] + ["store"] * k
    twin = MViT(**SMALL)
    assert {block.memory_policy for block in blocks_of(twin).values()} == {"store"}
    with pytest.raises(ValueError, match="MViT has no reversible blocks"):
        set_memory(twin, "reversible")


def held_bytes(model: nn.Module, inputs: Tensor, policy: MemoryPolicy) -> int:
    set_memory(model, policy)
    with saved_bytes(ignore=model) as held:
        loss = model(inputs).sum()
    assert loss.requires_grad
    return held.bytes


def test_bytes_held() -> None:
    """Of clips; test_memory_ratios.py has images."""
    with torch.device("meta"):
        model = create_model("rev_mvit_base_16x4")
        inputs = torch.empty(1, 3, 16, 224, 224)
    stored, checkpointed, reversed_ = (
        held_bytes(model, inputs, policy) for policy in ("store", "checkpoint", "reversible")
    )
    assert reversed_ * 20 < stored
    assert reversed_ * 2 < checkpointed


def test_bytes_held_do_not_grow_with_the_depth_of_a_stage() -> None:
    inputs = torch.randn(2, 3, 32, 32)
    held = [
        held_bytes(RevMViT(**{**SMALL, "depth": depth}), inputs, "reversible") for depth in (6, 12)
    ]
    assert held[0] == held[1]
