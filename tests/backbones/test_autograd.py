"""Reversed blocks inside whatever else one does with autograd: freezing, hooks, several passes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, ReversibleBlock, set_memory
from tests.backbones.helpers import (
    Streams,
    assert_as_stored,
    assert_grads_near,
    assert_near,
    assert_same_step,
    every_saver,
    forward_hook,
    loss_of,
    make_sequence,
    make_streams,
    train_step,
)


@every_saver
@pytest.mark.parametrize(
    "frozen, inputs_need_grad",
    [
        *itertools.product(([0], [2], [3], [0, 1]), (True, False)),
        ([0, 1, 2, 3], True),  # prompt tuning
    ],
)
def test_frozen_blocks(
    policy: MemoryPolicy, k: int, frozen: list[int], inputs_need_grad: bool
) -> None:
    sequence = make_sequence(4)
    for index in frozen:
        sequence.blocks[index].requires_grad_(False)
    inputs = make_streams(requires_grad=inputs_need_grad)
    stored = train_step(sequence, inputs=inputs)
    missing = {name for name, grad in stored.grads.items() if grad is None}
    assert len(missing) == 12 * len(frozen) + (0 if inputs_need_grad else 2)
    assert_same_step(train_step(sequence, policy, k, inputs=inputs), stored, 1e-9)


@every_saver
@pytest.mark.parametrize("trained", (0, 1))
def test_one_input_stream_needs_grad(policy: MemoryPolicy, k: int, trained: int) -> None:
    sequence = make_sequence(3).requires_grad_(False)
    inputs = make_streams(requires_grad=False)
    inputs[trained].requires_grad_()
    assert_as_stored(sequence, policy, k, inputs=inputs)


@every_saver
def test_one_frozen_parameter_in_each_branch(policy: MemoryPolicy, k: int) -> None:
    sequence = make_sequence(3)
    for block in sequence.blocks:
        block.f.norm.weight.requires_grad_(False)
        block.g.mlp.fc1.bias.requires_grad_(False)
    assert_as_stored(sequence, policy, k)


@every_saver
@pytest.mark.parametrize("stream", (0, 1))
def test_loss_on_one_output_stream(policy: MemoryPolicy, k: int, stream: int) -> None:
    sequence = make_sequence(3)

    def loss(*outputs: Tensor) -> Tensor:
        return loss_of(outputs[stream], outputs[stream])

    stored = train_step(sequence, loss=loss)
    if stream == 0:  # the last block's g does not reach y1
        assert stored.grads["blocks.2.g.mlp.fc1.weight"] is None
    again = train_step(sequence, policy, k, loss=loss)
    # One node per block: what plain autograd leaves out, it may report as zero.
    for name, grad in again.grads.items():
        if stored.grads[name] is None and grad is not None:
            assert not grad.any(), name
            stored.grads[name] = grad
    assert_same_step(again, stored, 1e-9)


@every_saver
def test_two_backward_passes_over_one_graph(policy: MemoryPolicy, k: int) -> None:
    sequence = make_sequence(4, dropout=0.3, drop_path=0.4)
    stored = train_step(sequence)
    set_memory(sequence, policy, k)
    torch.manual_seed(3)
    sequence.zero_grad(set_to_none=True)
    loss = loss_of(*sequence(*make_streams()))
    loss.backward(retain_graph=True)
    loss.backward()
    for name, param in sequence.named_parameters():
        assert_near(param.grad, 2 * stored.grads[name], 1e-9, name)


@every_saver
def test_autograd_grad(policy: MemoryPolicy, k: int) -> None:
    """All parameters, then a few of them, in the order asked for; nothing is accumulated."""
    sequence = make_sequence(4)
    stored = train_step(sequence)
    inputs = make_streams()
    set_memory(sequence, policy, k)
    sequence.zero_grad(set_to_none=True)
    wanted = dict(sequence.named_parameters()) | {"x1": inputs[0], "x2": inputs[1]}
    loss = loss_of(*sequence(*inputs))
    for names in (
        list(wanted),
        ["x2"],
        ["blocks.3.g.mlp.fc2.bias", "blocks.1.f.norm.weight"],
        ["blocks.3.f.attn.qkv.weight"],
        ["blocks.0.f.attn.proj.weight", "x1", "blocks.2.g.norm.bias"],
    ):
        grads = torch.autograd.grad(loss, [wanted[name] for name in names], retain_graph=True)
        for name, grad in zip(names, grads, strict=True):
            assert_near(grad, stored.grads[name], 1e-9, name)
    assert all(tensor.grad is None for tensor in wanted.values())


@every_saver
@pytest.mark.parametrize("chained", (False, True))
def test_two_uses_in_one_graph(policy: MemoryPolicy, k: int, chained: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = make_sequence(3, dropout=0.2, drop_path=0.3)

        def forward(self, x1: Tensor, x2: Tensor) -> Streams:
            y1, y2 = self.trunk(x1, x2)
            z1, z2 = self.trunk(y2, y1) if chained else self.trunk(x2, 2 * x1)
            return y1 + z1, y2 * z2

    module = Twice()
    assert_as_stored(module, policy, k)


@every_saver
@pytest.mark.parametrize("with_final_output", (False, True))
@pytest.mark.parametrize("index", range(4))
def test_loss_on_an_intermediate_output(
    policy: MemoryPolicy, k: int, index: int, with_final_output: bool
) -> None:
    sequence = make_sequence(4, dropout=0.3)
    taken: list[Streams] = []

    def loss(y1: Tensor, y2: Tensor) -> Tensor:
        value = loss_of(*taken.pop())
        return value + loss_of(y1, y2) if with_final_output else value

    with forward_hook(sequence.blocks[index], taken):
        stored = train_step(sequence, loss=loss)
        assert_same_step(train_step(sequence, policy, k, loss=loss), stored, 1e-9)


def test_intermediate_output_taken_without_a_hook_on_its_block() -> None:
    """With the final output the gradient is right; alone the error says what to do."""
    sequence = make_sequence(3)
    taken: list[Streams] = []

    class Taking(ReversibleBlock):
        def forward(self, x1: Tensor, x2: Tensor) -> Streams:
            taken.append(super().forward(x1, x2))
            return taken[-1]

    sequence.blocks[1].__class__ = Taking
    both = [
        train_step(sequence, policy, loss=lambda *y: loss_of(*taken.pop()) + loss_of(*y))
        for policy in ("reversible", "store")
    ]
    assert_same_step(both[0], both[1], 1e-9)
    with pytest.raises(RuntimeError, match="forward hook on the block"):
        train_step(sequence, "reversible", loss=lambda *_: loss_of(*taken.pop()))


@every_saver
def test_a_forward_hook_that_replaces_the_output(policy: MemoryPolicy, k: int) -> None:
    sequence = make_sequence(4)
    sequence.blocks[1].register_forward_hook(lambda _m, _args, y: (2 * y[0], y[1] + y[0]))
    sequence.blocks[3].register_forward_pre_hook(lambda _m, args: (args[1], args[0], *args[2:]))
    assert_as_stored(sequence, policy, k)


@every_saver
def test_full_backward_hooks(policy: MemoryPolicy, k: int) -> None:
    sequence = make_sequence(3)
    calls: Counter[str] = Counter()
    stored = train_step(sequence)
    for name, module in sequence.named_modules():
        if name:
            module.register_full_backward_hook(lambda *_, name=name: calls.update([name]))
    assert_same_step(train_step(sequence, policy, k), stored, 1e-9)
    called = [name for name in calls if isinstance(sequence.get_submodule(name), nn.Linear)]
    assert len(called) == 3 * 4 and set(calls.values()) == {1}


@every_saver
def test_hooks_on_parameters_are_called_once(policy: MemoryPolicy, k: int) -> None:
    sequence = make_sequence(3)
    calls: Counter[str] = Counter()

    def scale(name: str, grad: Tensor) -> Tensor:
        calls[f"hook {name}"] += 1
        return 3 * grad

    stored = train_step(sequence)
    for name, param in sequence.named_parameters():
        param.register_hook(lambda grad, name=name: scale(name, grad))
        param.register_post_accumulate_grad_hook(lambda _p, name=name: calls.update([name]))
    hooked = train_step(sequence, policy, k)
    assert len(calls) == 2 * 3 * 12 and set(calls.values()) == {1}
    for name, _ in sequence.named_parameters():
        assert_near(hooked.grads[name], 3 * stored.grads[name], 1e-9, name)


@every_saver
def test_gradients_accumulate_and_training_goes_on(policy: MemoryPolicy, k: int) -> None:
    def train(policy: MemoryPolicy, k: int) -> dict[str, Tensor | None]:
        sequence = make_sequence(3, dropout=0.2, drop_path=0.2)
        set_memory(sequence, policy, k)
        optimizer = torch.optim.AdamW(sequence.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(2):
                loss_of(*sequence(*make_streams())).backward()
            optimizer.step()
        return dict(sequence.named_parameters())

    assert_grads_near(train(policy, k), train("store", 0), 1e-8)


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
@every_saver
def test_without_gradients(policy: MemoryPolicy, k: int, context: type) -> None:
    sequence = make_sequence(3)
    stored = train_step(sequence)
    set_memory(sequence, policy, k)
    with context():
        outputs = sequence(*make_streams())
    for y, expected in zip(outputs, stored.outputs, strict=True):
        assert not y.requires_grad and y.grad_fn is None
        assert_near(y, expected, 1e-12)
