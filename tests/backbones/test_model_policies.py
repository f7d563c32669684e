"""Whole models under every memory policy: images and clips, windows, odd grids, all transitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, MViT, RevMViT, RevViT, ViT, set_memory
from backbones.engine.policies import blocks_of
from backbones.models.pooled_attention import StageTransition
from tests.backbones.helpers import assert_grads_near, assert_near, random_model
from tests.backbones.test_mvit import SMALL, SMALL_CLIP
from tests.backbones.test_windows import SMALL as WINDOWS

# With 3 stored blocks of a Rev-MViT some are reversed, some stored, some checkpointed.
SAVERS: list[tuple[MemoryPolicy, int]] = [
    *(("checkpoint", k) for k in (0, 3)),
    *(("reversible", k) for k in (0, 1, 3)),
]
# Everything random switched on.
DROPS = {
    "drop_path_rate": 0.4,
    "drop_rate": 0.2,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.1,
}
PLAIN = {"window_size": 0, "global_attn_indexes": (), "use_rel_pos": False}
TOKENS = {"class_token": True, "num_registers": 2, "layer_scale": 0.5, "swiglu": True}
MVITV2 = {"use_rel_pos": True, "residual_pooling": True, "depth": 5}
TRANSITIONS = {"depth": 4, "transitions": (1, 2, 3)}

# Arguments, and the shape of the input but for its channels.
VITS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "vit": ({**WINDOWS, **PLAIN, **DROPS}, (4, 16, 24)),
    "token": ({**WINDOWS, **PLAIN, **DROPS, **TOKENS}, (4, 16, 24)),
    "windows": ({**WINDOWS, **DROPS}, (1, 40, 40)),
    "windows, padded": ({**WINDOWS, **DROPS}, (2, 56, 25)),
    "windows, one row of them": ({**WINDOWS, **DROPS}, (1, 9, 90)),
}
MVITS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mvit": ({**SMALL, **DROPS}, (3, 32, 32)),
    "mvit, odd grids": (SMALL, (1, 34, 51)),  # of 9 x 13, 5 x 7 and 3 x 4
    "mvit, transitions in a row": ({**SMALL, **TRANSITIONS}, (3, 32, 32)),
    "mvit, relative positions": ({**SMALL, **MVITV2, "drop_path_rate": 0.3}, (1, 40, 33)),
    "clips": ({**SMALL_CLIP, **DROPS}, (3, 4, 32, 32)),
    "clips, relative positions": ({**SMALL_CLIP, **MVITV2, "drop_path_rate": 0.3}, (1, 4, 40, 33)),
}
CASES = VITS | MVITS
for _fusion in ("avg", "concat"):  # of reversible models; without any, "concat_linear_2"
    CASES[f"mvit, odd grids, {_fusion}"] = ({**SMALL, "fusion": _fusion}, (1, 34, 51))
    CASES[f"clips, {_fusion}"] = ({**SMALL_CLIP, **DROPS, "fusion": _fusion}, (3, 4, 32, 32))
CASES["mvit, mean of the streams"] = ({**SMALL, "fuse": "mean"}, (1, 34, 51))


def make(case: str, reversible: bool = True, **overrides: Any) -> tuple[nn.Module, Tensor]:
    arguments, (batch, *size) = CASES[case]
    pair = (ViT, RevViT) if case in VITS else (MViT, RevMViT)
    model = random_model(pair[reversible], **{**arguments, **overrides})
    generator = torch.Generator().manual_seed(2)
    return model, torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def grads_of(model: nn.Module, inputs: Tensor, maps: bool) -> dict[str, Tensor | None]:
    """Gradients of the parameters and the input, and the loss, from a fixed seed."""
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
@pytest.mark.parametrize(
    "case, reversible",
    [*((case, True) for case in CASES), *((case, False) for case in VITS | MVITS)],
    ids=lambda value: {True: "reversible", False: "twin"}.get(value, value),
)
def test_policies_agree(case: str, reversible: bool, maps: bool) -> None:
    model, inputs = make(case, reversible)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model, inputs = model.to(dtype), inputs.to(dtype)
        set_memory(model, "store")
        expected = grads_of(model, inputs, maps)
        for name, grad in expected.items():
            assert (grad is None) == (maps and name.startswith("head")), name
            assert grad is None or grad.isfinite().all()
            assert "rel_pos" not in name or case in VITS or grad.any(), name
        for policy, k in SAVERS:
            if reversible or policy == "checkpoint":
                set_memory(model, policy, k)
                assert_grads_near(grads_of(model, inputs, maps), expected, tolerance)


def test_gradient_of_one_stage_alone() -> None:
    """The blocks behind it get none, and nobody rebuilds anything for them."""
    grads = {}
    for policy in ("store", "reversible"):
        model, inputs = make("mvit", **dict.fromkeys(DROPS, 0.0))
        set_memory(model, policy)
        model.feature_maps(inputs)[1].square().mean().backward()
        grads[policy] = {
            name: param.grad for name, param in model.named_parameters() if "norm_k" not in name
        }
    assert_grads_near(grads["reversible"], grads["store"], 1e-9)
    without = {name for name, grad in grads["store"].items() if grad is None}
    assert without and all(name.startswith(("stages.2", "norm", "head")) for name in without)


@pytest.mark.parametrize("case", ("windows, padded", "mvit", "clips"))
def test_autocast(case: str) -> None:
    """Policies agree with each other closely, and with float32 as far as bfloat16 can."""
    model, inputs = make(case, **dict.fromkeys(DROPS, 0.0))
    model, inputs = model.float(), inputs.float()

    def step(policy: MemoryPolicy, autocast: bool) -> dict[str, Tensor | None]:
        set_memory(model, policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return grads_of(model, inputs, maps=False)

    stored = step("store", autocast=True)
    for policy in ("checkpoint", "reversible"):
        # bfloat16 has 8 bits: the rounding of a rebuilt input may flip the last one.
        assert_grads_near(step(policy, autocast=True), stored, 0.02)
    exact = step("store", autocast=False)
    assert_near(stored["loss"], exact["loss"], 0.05)
    assert_grads_near(stored, exact, 0.2)


def test_set_memory_counts_transitions() -> None:
    model, twin = RevMViT(**SMALL), MViT(**SMALL)
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
    assert {block.memory_policy for block in blocks_of(twin).values()} == {"store"}
    with pytest.raises(ValueError, match="MViT has no reversible blocks"):
        set_memory(twin, "reversible")


def test_parameters_have_the_order_that_saved_optimizers_know() -> None:
    """They number them; and a new model draws its weights in this order."""
    for fusion, first in (("concat_linear_2", "fuse"), ("avg", "res_proj")):
        transition = RevMViT(**SMALL, fusion=fusion).stages[1].transition
        assert [name for name, _ in transition.named_children()] == [first, "f", "g"]
