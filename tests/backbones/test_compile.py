"""Compiled branches: the gradients of eager mode under every policy, compiled once per shape."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import backbones
from backbones import ReversibleBlock, ReversibleSequence, set_memory
from tests.backbones.helpers import SAVERS, make_streams, train_step

Result = TypeVar("Result")

POLICIES = [("store", 0), *SAVERS]
RANDOM = {"proj_drop_rate": 0.2, "drop_path_rate": 0.2}
MODELS = {
    "vit": (
        "rev_vit_tiny",
        {"img_size": 32, "depth": 3, "embed_dim": 24, "attn_drop_rate": 0.1, **RANDOM},
    ),
    "twin": ("vit_tiny", {"img_size": 32, "depth": 3, "embed_dim": 24, **RANDOM}),
    "mvit": (
        "rev_mvit_base",
        {"img_size": 64, "embed_dim": 8, "depth": 6, "transitions": (1, 3, 5), **RANDOM},
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss = model(images).square().sum()
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def in_another_thread(function: Callable[[], Result]) -> Result:
    """As the backward pass on a GPU runs in a thread of autograd's own."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function).result()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_eager_mode(kind: str) -> None:
    name, options = MODELS[kind]
    model = backbones.create_model(name, num_classes=5, **options).double()
    images = torch.randn(2, 3, options["img_size"], options["img_size"], dtype=torch.float64)
    set_memory(model, "store")
    expected = gradients(model, images)
    backbones.compile_blocks(model, backend="aot_eager")
    for policy, stored_blocks in POLICIES:
        if policy == "reversible" and not name.startswith("rev_"):
            continue
        set_memory(model, policy, stored_blocks)
        actual = in_another_thread(lambda: gradients(model, images))
        for key, grad in expected.items():
            torch.testing.assert_close(actual[key], grad, rtol=1e-9, atol=1e-12, msg=key)
    # The stages of an MViT need more than the 8 that are torch's limit for one function.
    assert graphs() >= (16 if kind == "mvit" else 2)


@pytest.mark.parametrize("policy", ["store", "checkpoint", "reversible"])
def test_blocks_of_one_shape_share_a_compilation(policy: backbones.MemoryPolicy) -> None:
    needed = []
    for depth in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        options = {**MODELS["vit"][1], "depth": depth}
        model = backbones.create_model("rev_vit_tiny", num_classes=5, **options)
        backbones.compile_blocks(model, backend="aot_eager")
        set_memory(model, policy)
        for _ in range(2):
            gradients(model, torch.randn(2, 3, 32, 32))
        needed.append(graphs())
    # f and g; of a reversed block, in the forward pass and again in the backward pass.
    assert needed == [4, 4] if policy == "reversible" else [2, 2]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_inductor_with_dropout() -> None:
    """The default backend: what it fuses draws the same numbers in both runs of a branch."""

    def branch() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3))

    model = ReversibleSequence(ReversibleBlock(branch(), branch(), 0.2) for _ in range(3))
    inputs = make_streams(torch.float32)
    eager = copy.deepcopy(model)
    backbones.compile_blocks(model)
    for policy, stored_blocks in POLICIES:
        expected = train_step(eager, inputs=inputs)
        step = train_step(model, policy, stored_blocks, inputs=inputs)
        assert torch.equal(step.random_state, expected.random_state)
        for key, grad in expected.grads.items():
            actual = step.grads[key]
            assert grad is not None and actual is not None, key
            assert (actual - grad).norm() <= 1e-5 * grad.norm(), key


def test_copies_and_names_are_as_before() -> None:
    model = backbones.create_model("rev_vit_tiny", num_classes=5, **MODELS["vit"][1])
    names = list(model.state_dict())
    backbones.compile_blocks(model, backend="aot_eager")
    assert list(model.state_dict()) == names
    gradients(copy.deepcopy(model), torch.randn(1, 3, 32, 32))
    assert graphs() == 0


def test_create_model_compiles_and_says_what_cannot_be() -> None:
    model = backbones.create_model("rev_vit_tiny", compile=True)
    assert all(block.f._compiled_call_impl is not None for block in model.blocks.blocks)
    assert backbones.create_model("rev_vit_tiny").blocks.blocks[0].f._compiled_call_impl is None
    with pytest.raises(ValueError, match="Linear holds no block"):
        backbones.compile_blocks(nn.Linear(2, 2))
