"""What blocks hand on may be hooked, wrapped, changed, none: as with "store", or an error."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, ReversibleBlock, ReversibleSequence, set_memory
from tests.backbones.helpers import (
    DIM,
    Grads,
    assert_grads_near,
    compare,
    make_sequence,
    make_streams,
    mlp,
    of,
    savers,
)


@savers
def test_hooks_inside_are_called_once_and_may_want_gradients(policy: MemoryPolicy) -> None:
    """They look, they change the output, they put a loss on what they see."""

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        module = of(mlp(), mlp(), policy=policy)
        calls: list[Tensor] = []
        module.blocks[0].f[1].register_forward_hook(lambda _m, _x, y: calls.append(y))
        module.blocks[1].g.register_forward_hook(lambda _m, _x, y: 2 * y)

        class WithLoss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
                calls.clear()
                y1, y2 = self.module(x1, x2)
                assert len(calls) == 1
                return y1 + calls[0].mean(), y2

        return WithLoss(), {}

    with pytest.warns(UserWarning, match="modules inside have forward hooks"):
        compare(make, policy)


class Halved(nn.Module):
    """A module around a block that changes its outputs, or only looks at them."""

    def __init__(self, block: ReversibleBlock, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.change = block, change

    memory_policy = property(lambda self: self.block.memory_policy)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1, y2 = self.block(x1, x2)
        return self.change(y1), self.change(y2)


@savers
@pytest.mark.parametrize("change", (lambda y: 0.5 * y, lambda y: y, lambda y: y.view_as(y)))
def test_wrappers(policy: MemoryPolicy, change: Callable[[Tensor], Tensor]) -> None:
    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        blocks = [Halved(block, change) for block in make_sequence(3).blocks]
        for wrapper in blocks:
            wrapper.block.memory_policy = policy
        return ReversibleSequence(blocks), {}  # type: ignore[arg-type]

    compare(make, policy)


@savers
@pytest.mark.parametrize("place", (0, 1, 2))
def test_outputs_changed_in_place_are_right_or_refused(policy: MemoryPolicy, place: int) -> None:
    """Right as "store" is with a changed copy: changed in place, it refuses them too."""

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        def halve(y: Tensor) -> Tensor:
            return 0.5 * y if policy == "store" else y.mul_(0.5)

        sequence = make_sequence(3)
        set_memory(sequence, policy)
        sequence.blocks[place] = Halved(sequence.blocks[place], halve)  # type: ignore[arg-type]
        return sequence, {}

    try:
        compare(make, policy)
    except RuntimeError as error:
        assert re.search("changed in place|modified by an inplace operation", str(error))


@savers
def test_none_stays_none(policy: MemoryPolicy) -> None:
    """A branch that the loss does not reach has no gradient, and is not run for one."""

    def grads(policy: MemoryPolicy) -> Grads:
        module = of(mlp(), policy=policy)
        module(*make_streams())[0].square().sum().backward()
        return {name: param.grad for name, param in module.named_parameters()}

    torch.manual_seed(1)
    stored = grads("store")
    assert stored["blocks.1.g.1.weight"] is None
    torch.manual_seed(1)
    assert_grads_near(grads(policy), stored, 1e-9)


@savers
def test_two_threads_train_on_one_model(policy: MemoryPolicy) -> None:
    """And a third one copies it meanwhile."""
    module = make_sequence(3)
    set_memory(module, policy)
    inputs = [tuple(x * (k + 1) for x in make_streams(requires_grad=False)) for k in range(3)]
    params = list(module.parameters())

    def grads(streams: Any) -> tuple[Tensor, ...]:
        y1, y2 = module(*streams)
        return torch.autograd.grad(y1.square().sum() + y2.sum(), params)

    expected = [grads(streams) for streams in inputs]
    failures: list[str] = []

    def train(index: int) -> None:
        for _ in range(15):
            for actual, wanted in zip(grads(inputs[index]), expected[index], strict=True):
                if not torch.allclose(actual, wanted, rtol=1e-9):
                    failures.append("another gradient")
            if not all(isinstance(p, nn.Parameter) for p in copy.deepcopy(module).parameters()):
                failures.append("a copy without parameters")

    threads = [threading.Thread(target=train, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("policy", ("store", "checkpoint", "reversible"))
def test_a_branch_that_returns_something_else(policy: MemoryPolicy) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    for branch, message in ((Pair(), "Pair returns a tuple"), (nn.Linear(DIM, 3), "Linear makes")):
        module = of(branch, policy=policy)
        with pytest.raises((TypeError, ValueError), match=message):
            module(*make_streams())


@savers
def test_a_scripted_branch_is_right_or_refused(policy: MemoryPolicy) -> None:
    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        return of(
            torch.jit.script(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())), policy=policy
        ), {}

    try:
        compare(make, policy)
    except RuntimeError as error:
        assert "ScriptModule" in str(error)


@savers
def test_a_branch_that_changes_its_input_in_place_is_refused(policy: MemoryPolicy) -> None:
    module = of(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, DIM)), policy=policy)
    with pytest.raises(RuntimeError, match="in place"):
        y1, y2 = module(*(2 * x for x in make_streams()))
        (y1.sum() + y2.sum()).backward()
