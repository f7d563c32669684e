"""Trained tensors that a branch has from elsewhere: the gradients of "store", or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import backbones
from backbones import MemoryPolicy, ReversibleBlock, set_memory
from tests.backbones.helpers import (
    DIM,
    Grads,
    Uses,
    assert_grads_near,
    compare,
    make_streams,
    mlp,
    of,
    savers,
)


def table() -> Tensor:
    return torch.linspace(0.5, 1.5, DIM, dtype=torch.float64).requires_grad_()


@savers
def test_a_table_in_a_closure_shared_by_two_blocks(policy: MemoryPolicy) -> None:
    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        shared = table()
        return of(Uses(lambda _: shared), Uses(lambda _: 2 * shared), policy=policy), {"t": shared}

    compare(make, policy)


@savers
def test_own_parameters_through_a_list(policy: MemoryPolicy) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)
            self.both = [self.linear.weight, self.linear.bias]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, *self.both)

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        module = of(policy=policy)
        module.blocks.insert(0, block := ReversibleBlock(Listed().double(), mlp().double()))
        block.f.both = [block.f.linear.weight, block.f.linear.bias]
        block.memory_policy = policy
        return module, {}

    compare(make, policy)


@savers
def test_a_table_that_a_net_outside_computes_for_each_step(policy: MemoryPolicy) -> None:
    """As position biases of a small net; shared by two blocks."""

    class Whole(nn.Module):
        def __init__(self, policy: MemoryPolicy) -> None:
            super().__init__()
            self.net = nn.Linear(3, DIM).double()
            self.now: dict[str, Tensor] = {}
            self.trunk = of(*(Uses(lambda _: self.now["table"]) for _ in range(2)), policy=policy)

        def forward(self, x1: Tensor, x2: Tensor) -> Any:
            self.now["table"] = self.net(torch.ones(3, dtype=x1.dtype)).exp()
            return self.trunk(x1, x2)

    compare(lambda policy: (Whole(policy), {}), policy)


def test_a_table_that_turns_up_later_is_refused() -> None:
    shared: list[Tensor] = [table()]
    module = of(Uses(lambda _: shared[-1]), policy="reversible")
    y1, y2 = module(*make_streams())
    shared.append(table())
    with pytest.raises(RuntimeError, match="did not use in the forward pass"):
        (y1.sum() + y2.sum()).backward()
    assert shared[-1].grad is None


@savers
def test_weights_that_are_made_once_for_forward_and_backward(policy: MemoryPolicy) -> None:
    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        return of(parametrizations.weight_norm(nn.Linear(DIM, DIM)), policy=policy), {}

    compare(make, policy)
    with parametrize.cached():
        try:
            compare(make, policy, steps=1)
        except torch.utils.checkpoint.CheckpointError:
            assert policy == "checkpoint"


@savers
@pytest.mark.parametrize("name", ("rev_vit_tiny", "rev_mvit_base"))
def test_functional_call(policy: MemoryPolicy, name: str) -> None:
    small: dict[str, Any] = {"depth": 2} if "vit_t" in name else {"depth": 4, "embed_dim": 16}
    if "mvit" in name:
        small["transitions"] = (1, 2, 3)

    def grads(policy: MemoryPolicy) -> Grads:
        torch.manual_seed(1)
        model = backbones.create_model(name, img_size=32, num_classes=3, **small).double()
        set_memory(model, policy)
        fast = {k: (1.5 * v).detach().requires_grad_() for k, v in model.named_parameters()}
        x = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).view(2, 3, 32, 32)
        torch.func.functional_call(model, fast, (x,)).square().sum().backward()
        assert all(param.grad is None for param in model.parameters())
        # A bias of the keys has none but by rounding.
        return {k: v.grad for k, v in fast.items() if not k.endswith("norm_k.bias")}

    assert_grads_near(grads(policy), grads("store"), 1e-9)
