"""Unusual f and g: shared with others, parametrized, without parameters, detached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, ReversibleBlock, ReversibleSequence
from backbones.models.layers import MLPBranch
from tests.backbones.helpers import (
    DIM,
    assert_as_stored,
    assert_same_step,
    every_saver,
    make_sequence,
    train_step,
)


@every_saver
def test_tied_parameters(policy: MemoryPolicy, k: int) -> None:
    """One module as f of two blocks, and one linear layer in both branches of one block."""
    sequence = make_sequence(4)
    sequence.blocks[2].f = sequence.blocks[0].f
    sequence.blocks[1].g.mlp.fc2 = sequence.blocks[3].g.mlp.fc2
    shared = MLPBranch(DIM, 1.0)
    both = ReversibleBlock(shared, MLPBranch(DIM, 1.0)).double()
    both.g.mlp.fc1 = both.f.mlp.fc1
    both.g.mlp.fc2 = both.g.mlp.fc1  # and twice within g
    both.g.norm.weight = both.f.norm.weight  # a weight of two different layers
    module = ReversibleSequence([*sequence.blocks, both])
    assert_as_stored(module, policy, k)


@every_saver
def test_parametrized_weight(policy: MemoryPolicy, k: int) -> None:
    sequence = make_sequence(3)
    for block in sequence.blocks:
        nn.utils.parametrizations.weight_norm(block.f.attn.proj)
    stored = train_step(sequence)
    assert stored.grads["blocks.0.f.attn.proj.parametrizations.weight.original0"] is not None
    assert_same_step(train_step(sequence, policy, k), stored, 1e-9)


@every_saver
def test_branches_without_parameters(policy: MemoryPolicy, k: int) -> None:
    sequence = ReversibleSequence(
        [ReversibleBlock(nn.Identity(), nn.Tanh()), *make_sequence(2).blocks]
    )
    assert_as_stored(sequence, policy, k)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().sin()


@every_saver
def test_a_branch_that_detaches_its_output(policy: MemoryPolicy, k: int) -> None:
    sequence = make_sequence(3)
    sequence.blocks[1].g = Detached()
    assert_as_stored(sequence, policy, k)


@every_saver
def test_a_hook_that_puts_other_parameters_in_place(policy: MemoryPolicy, k: int) -> None:
    """As fully_shard on a branch does: the block stores, and says so."""
    sequence = make_sequence(2)
    linear = sequence.blocks[1].g.mlp.fc1
    weight = linear.weight

    def put_back(module: nn.Module, _args: object) -> None:
        module._parameters["weight"] = weight

    stored = train_step(sequence)
    linear.register_forward_pre_hook(put_back)
    if k:  # the block with the hook stores anyway
        assert_same_step(train_step(sequence, policy, k), stored, 1e-9)
        return
    with pytest.warns(UserWarning, match="modules inside have forward hooks"):
        assert_same_step(train_step(sequence, policy, k), stored, 1e-9)


@pytest.mark.parametrize("dtype", (None, torch.bfloat16, torch.float16))
def test_a_branch_starts_in_the_dtype_of_autocast(dtype: torch.dtype | None) -> None:
    """Its norm is computed in float32 all the same."""
    norm = MLPBranch(DIM).norm
    x = 1e4 + torch.randn(4, DIM)  # of which half precision would see little
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = norm(x)
    assert out.dtype == (dtype or torch.float32)
    expected = nn.functional.layer_norm(x, (DIM,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(out, expected.to(out.dtype))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        assert norm.double()(x.double()).dtype == torch.float64
