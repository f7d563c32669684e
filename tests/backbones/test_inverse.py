"""The explicit inverse, and what the engine refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backbones import MemoryPolicy, ReversibleBlock, ReversibleSequence, set_memory
from tests.backbones.helpers import (
    assert_near,
    assert_same_step,
    every_saver,
    loss_of,
    make_sequence,
    make_streams,
    train_step,
)


@pytest.mark.parametrize("depth", (1, 2, 6))
def test_round_trip(depth: int) -> None:
    sequence = make_sequence(depth)
    x1, x2 = make_streams(requires_grad=False)
    with torch.no_grad():
        y1, y2 = sequence(x1, x2)
        z1, z2 = sequence.inverse(y1, y2)
    assert (y1 - x1).abs().max() > 0.1
    assert_near(z1, x1, 1e-12, "x1")
    assert_near(z2, x2, 1e-12, "x2")


def test_block_by_hand() -> None:
    """y1 = x1 + f(x2), y2 = x2 + g(y1): the order of the paper, with one block alone."""
    block = make_sequence(1).blocks[0]
    x1, x2 = make_streams()
    y1, y2 = block(x1, x2)
    assert torch.equal(y1, x1 + block.f(x2))
    assert torch.equal(y2, x2 + block.g(x1 + block.f(x2)))
    assert_near(torch.cat(block.inverse(y1, y2)), torch.cat([x1, x2]), 1e-12)


@every_saver
def test_a_block_alone(policy: MemoryPolicy, k: int) -> None:
    block = make_sequence(1, 0.3, 0.4).blocks[0]
    assert_same_step(train_step(block, policy, k), train_step(block), 1e-9)


def test_inverse_does_not_know_the_drop_path_mask() -> None:
    sequence = make_sequence(2, drop_path=0.1)
    streams = make_streams(requires_grad=False)
    with pytest.raises(RuntimeError, match=r"\.eval\(\)"):
        sequence.inverse(*streams)
    sequence.eval()
    again = sequence.inverse(*sequence(*streams))
    assert_near(torch.stack(again), torch.stack(streams), 1e-12)


def test_no_blocks() -> None:
    x1, x2 = make_streams()
    assert ReversibleSequence([])(x1, x2) == (x1, x2)


def test_streams_of_different_shapes() -> None:
    x1, x2 = make_streams()
    with pytest.raises(ValueError, match=r"\(3, 5, 8\) and \(3, 4, 8\)"):
        make_sequence(1)(x1, x2[:, :4])


@pytest.mark.parametrize("rate", (-0.1, 1.0, 1.5))
def test_drop_path_outside_its_range(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        ReversibleBlock(nn.Identity(), nn.Identity(), drop_path=rate)


@pytest.mark.parametrize("policy, k", [("reversible", 0), ("reversible", 1)])
@pytest.mark.parametrize("name", ("blocks.0.f.attn.qkv.weight", "blocks.2.g.mlp.fc2.weight"))
def test_a_parameter_changed_before_the_backward_pass(
    policy: MemoryPolicy, k: int, name: str
) -> None:
    """Rebuilding with other weights would give wrong gradients without a word.

    (torch.utils.checkpoint does not check its parameters.)
    """
    sequence = make_sequence(3)
    set_memory(sequence, policy, k)
    loss = loss_of(*sequence(*make_streams()))
    with torch.no_grad():
        sequence.get_parameter(name).mul_(1.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_final_output_changed_before_the_backward_pass() -> None:
    sequence = make_sequence(3)
    y1, y2 = sequence(*make_streams())
    loss = y1.sum() + y2.sum()
    y1.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("of", ("an input", "a parameter"))
def test_gradients_of_gradients(of: str) -> None:
    """Even of a loss whose gradient is a constant, where autograd itself would not notice."""
    sequence = make_sequence(2)
    inputs = make_streams()
    wanted = inputs[0] if of == "an input" else sequence.blocks[0].f.norm.weight
    loss = sum(y.sum() for y in sequence(*inputs))
    with pytest.raises(RuntimeError, match=r"gradients of gradients .* 'store' policy"):
        torch.autograd.grad(loss, wanted, create_graph=True)
    set_memory(sequence, "store")
    with sdpa_kernel(SDPBackend.MATH):
        loss = sum(y.sum() for y in sequence(*inputs))
        (grad,) = torch.autograd.grad(loss, wanted, create_graph=True)
        grad.square().sum().backward()


def test_a_trained_tensor_that_is_no_parameter() -> None:
    """As in FullyShardedDataParallel with flat parameters. Its gradient must not get lost."""
    sequence = make_sequence(2)
    norm = sequence.blocks[1].g.norm
    weight = nn.Parameter(2 * norm.weight.detach())
    del norm.weight
    grads = []
    for policy in ("store", "checkpoint", "reversible"):
        set_memory(sequence, policy)
        weight.grad = None
        norm.weight = weight[:]
        loss_of(*sequence(*make_streams())).backward()
        grads.append(weight.grad)
    assert_near(grads[1], grads[0], 1e-9)
    assert_near(grads[2], grads[0], 1e-9)
    norm.weight = weight.detach()
    train_step(sequence, "reversible")


@every_saver
def test_saved_tensors_on_the_cpu(policy: MemoryPolicy, k: int) -> None:
    sequence = make_sequence(3, 0.2, 0.3)
    stored = train_step(sequence)
    with torch.autograd.graph.save_on_cpu():
        again = train_step(sequence, policy, k)
    assert_same_step(again, stored, 1e-9)


def test_saved_tensor_hooks_see_what_is_kept() -> None:
    """Four blocks reversed: the two outputs of the last, and the parameters."""
    sequence = make_sequence(4).requires_grad_(False)
    packed: list[torch.Size] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        packed.append(x.shape)
        return x

    inputs = make_streams()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sequence(*inputs)
    assert packed.count(inputs[0].shape) == 2
