"""What the second run of a block may use that nobody can see from outside, and what it leaves."""

from __future__ import annotations

import collections
import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from backbones import MemoryPolicy, ReversibleBlock, ReversibleSequence, set_memory
from backbones.engine.sameness import is_near, sample
from backbones.models.layers import MLPBranch
from tests.backbones.helpers import (
    DIM,
    Uses,
    assert_grads_near,
    compare,
    make_sequence,
    make_streams,
    mlp,
    of,
    savers,
)

AGAIN = "computes something else when it runs again"


def scale_of(source: str) -> Callable[[Tensor], Any]:
    calls, own = [0], random.Random(1)

    def count(_: Tensor) -> int:
        calls[0] += 1
        return calls[0]

    return {
        "closure": count,
        "own": lambda _: own.random(),
        "system": lambda _: 1 + secrets.randbelow(1 << 30) / (1 << 30),
    }[source]


@savers
@pytest.mark.parametrize("source", ("closure", "own", "system"))
def test_what_no_second_run_can_see_again_is_refused(policy: MemoryPolicy, source: str) -> None:
    with pytest.raises(RuntimeError, match=AGAIN):
        compare(lambda policy: (of(Uses(scale_of(source)), policy=policy), {}), policy)


@savers
def test_what_is_changed_outside_between_the_runs_is_refused(policy: MemoryPolicy) -> None:
    outside = torch.ones(DIM, dtype=torch.float64)
    module = of(Uses(lambda _: 1 * outside), policy=policy)
    for _ in range(2):
        sum(y.sum() for y in module(*make_streams())).backward()
    y1, y2 = module(*make_streams())
    outside.mul_(1.01)
    with pytest.raises(RuntimeError, match=AGAIN):
        (y1.sum() + y2.sum()).backward()


@savers
def test_a_counter_of_a_dictionary_class_that_adds(policy: MemoryPolicy) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(DIM, DIM)
            self.calls: collections.Counter[str] = collections.Counter()

        def forward(self, x: Tensor) -> Tensor:
            self.calls["all"] += 1
            return super().forward(x) * self.calls["all"]

    compare(lambda policy: (of(Counting(), policy=policy), {}), policy)


def test_a_loss_on_what_a_branch_leaves_behind_is_refused() -> None:
    """As one that balances experts. It would have no gradient."""
    left: list[Tensor] = []

    def leave(x: Tensor) -> Tensor:
        left.append(x.sigmoid())
        return left[-1]

    module = of(Uses(leave), policy="reversible")
    with pytest.raises(RuntimeError, match=r"leave tensor\.detach\(\)"):
        module(*make_streams())
    compare(lambda policy: (of(Uses(torch.relu), policy=policy), {}), "reversible")


def add_in_place(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.add_(1)


def give_other_data(param: nn.Parameter) -> None:
    param.data = param.data + 1


@savers
@pytest.mark.parametrize("change", (add_in_place, give_other_data))
def test_weights_changed_before_the_backward_pass_are_refused(
    policy: MemoryPolicy, change: Callable[[nn.Parameter], None]
) -> None:
    """Also those that stored activations would not need, and of blocks that are all ours."""
    module = make_sequence(2)
    for block in module.blocks:
        block.f, block.g = (MLPBranch(DIM).double() for _ in "fg")
    set_memory(module, policy)
    y1, y2 = module(*make_streams())
    change(next(p for n, p in module.named_parameters() if n.endswith("bias")))
    with pytest.raises(RuntimeError, match=r"(parameter.*changed in place|parameters or outputs)"):
        (y1.sum() + y2.sum()).backward()


@savers
def test_an_optimizer_that_steps_within_the_backward_pass(policy: MemoryPolicy) -> None:
    def trained(policy: MemoryPolicy) -> dict[str, Tensor | None]:
        module = make_sequence(3)
        set_memory(module, policy)

        @torch.no_grad()
        def step(param: Tensor) -> None:
            assert param.grad is not None
            param.sub_(0.1 * param.grad)
            param.grad = None

        for param in module.parameters():
            param.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            sum(y.square().mean() for y in module(*make_streams())).backward()
        return {name: param.detach() for name, param in module.named_parameters()}

    assert_grads_near(trained(policy), trained("store"), 1e-9)


@savers
def test_a_hook_that_comes_between_the_runs_is_not_called(policy: MemoryPolicy) -> None:
    def add(module: nn.Module) -> None:
        module.blocks[0].f[1].register_forward_hook(lambda _m, _x, y: 2 * y)

    compare(lambda policy: (of(mlp(), policy=policy), {}), policy, between=add, steps=1)


@contextmanager
def hooks_on_all(policy: str, seen: list[Tensor], before: bool) -> Iterator[None]:
    def look(part: nn.Module, _x: Any, y: Tensor) -> None:
        if isinstance(part, nn.GELU):
            seen.append(y)

    def double(part: nn.Module, args: Any) -> Any:
        return (2 * args[0],) if isinstance(part, nn.GELU) else None

    handle = (
        register_module_forward_pre_hook(double) if before else (register_module_forward_hook(look))
    )
    try:
        yield
    finally:
        handle.remove()


@savers
@pytest.mark.parametrize("before", (False, True))
def test_global_hooks(policy: MemoryPolicy, before: bool) -> None:
    """They change what modules take, or put a loss on what they see."""

    def grads(policy: MemoryPolicy) -> dict[str, Tensor | None]:
        torch.manual_seed(1)
        module = of(mlp(), policy=policy)
        for _ in range(2):
            seen: list[Tensor] = []
            with hooks_on_all(policy, seen, before):
                y1, y2 = module(*make_streams())
            assert before or len(seen) == 4
            (y1.sum() + y2.square().sum() + sum(y.square().sum() for y in seen)).backward()
        return {name: param.grad for name, param in module.named_parameters()}

    stored = grads("store")
    with pytest.warns(UserWarning, match="modules inside have forward hooks"):
        assert_grads_near(grads(policy), stored, 1e-9)
    module = of(mlp(), policy=policy)
    y1, y2 = module(*make_streams())
    with (
        hooks_on_all(policy, [], before),
        pytest.raises(RuntimeError, match="global forward hooks were registered"),
    ):
        (y1.sum() + y2.sum()).backward()


@savers
def test_tensor_hooks_on_the_outputs_of_blocks(policy: MemoryPolicy) -> None:
    class Hooked(ReversibleBlock):
        def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
            y1, y2 = super().forward(x1, x2)
            y1.register_hook(lambda grad: 2 * grad)
            y2.register_hook(lambda grad: grad + 1)
            return y1, y2

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        module = ReversibleSequence(Hooked(mlp(), mlp()) for _ in range(3)).double()
        set_memory(module, policy)
        return module, {}

    compare(make, policy)


@savers
@pytest.mark.parametrize("keep", ((), "products"))
@pytest.mark.parametrize(
    "around",
    (
        lambda: torch.autograd.graph.save_on_cpu(),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t),
    ),
)
def test_hooks_on_saved_tensors(
    policy: MemoryPolicy, keep: Any, around: Callable[[], AbstractContextManager[None]]
) -> None:
    class Around(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x1: Tensor, x2: Tensor) -> Any:
            with around():
                return self.module(x1, x2)

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        table = torch.ones(DIM, dtype=torch.float64).requires_grad_()
        module = of(mlp(), Uses(lambda _: table), policy=policy)
        set_memory(module, policy, keep=keep if policy != "store" else ())
        return Around(module), {"table": table}

    compare(make, policy)


@pytest.mark.parametrize("keep", ((), "products"))
def test_checkpoint_of_torch_around_reversed_blocks(keep: Any) -> None:
    class Around(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x1: Tensor, x2: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.module, x1, x2, use_reentrant=False)

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        module = of(mlp(), policy=policy)
        set_memory(module, policy, keep=keep if policy != "store" else ())
        return Around(module), {}

    compare(make, "reversible")


def test_a_block_that_widens_the_streams() -> None:
    class To(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    def grads(policy: MemoryPolicy) -> dict[str, Tensor | None]:
        torch.manual_seed(1)
        blocks = [
            ReversibleBlock(mlp(), mlp()),
            ReversibleBlock(nn.Sequential(mlp(), To()), nn.Sequential(To(), mlp().double())),
        ]
        module = ReversibleSequence(blocks)
        set_memory(module, policy)
        sum(y.square().sum() for y in module(*make_streams(torch.float32))).backward()
        return {name: param.grad for name, param in module.named_parameters()}

    assert_grads_near(grads("reversible"), grads("store"), 1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_rounding_beside_zeros_is_no_difference(dtype: torch.dtype) -> None:
    """A branch that ends in a ReLU may give nothing but zeros, or a number next to one."""
    zeros = torch.zeros(4, 4, dtype=dtype)
    before = sample(zeros)
    assert before is not None
    zeros[0, 0] = torch.finfo(dtype).eps
    assert is_near(zeros, before, half=False)
    zeros[0, 0] = 1e-3
    assert not is_near(zeros, before, half=False)
