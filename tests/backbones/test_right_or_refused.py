"""What may change between the two runs of a block: the gradients of "store", or an error."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import backbones
from backbones import MemoryPolicy, ReversibleBlock, ReversibleSequence, set_memory
from tests.backbones.helpers import DIM, assert_grads_near, make_sequence, make_streams

Grads = dict[str, Tensor | None]

savers = pytest.mark.parametrize("policy", ("checkpoint", "reversible"))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
    )


def of(*branches: nn.Module, policy: MemoryPolicy) -> ReversibleSequence:
    """A sequence with these for f, and an MLP for each g; then one more block."""
    blocks = [ReversibleBlock(f, mlp()) for f in (*branches, mlp())]
    sequence = ReversibleSequence(blocks).double()
    set_memory(sequence, policy)
    return sequence


def compare(
    make: Callable[[MemoryPolicy], tuple[nn.Module, dict[str, Tensor]]],
    policy: MemoryPolicy,
    *,
    between: Callable[[nn.Module], object] = lambda module: None,
    steps: int = 3,
) -> None:
    """The gradients of ``policy`` are those of "store", in the first step and in those after it.

    Args:
        make: the module under a policy, and trained tensors besides its parameters.
        between: done between the forward and the backward pass.
    """

    def grads(policy: MemoryPolicy) -> list[Grads]:
        torch.manual_seed(1)
        random.seed(1)
        module, others = make(policy)
        leaves = {**dict(module.named_parameters()), **others}
        found = []
        for _ in range(steps):
            for leaf in leaves.values():
                leaf.grad = None
            x1, x2 = make_streams()
            y1, y2 = module(x1, x2)
            between(module)
            (y1.square().sum() + (y2**3).sum()).backward()
            found.append({name: leaf.grad for name, leaf in leaves.items()} | {"x1": x1.grad})
        found.append({name: buffer.double() for name, buffer in module.named_buffers()})
        return found

    for actual, expected in zip(grads(policy), grads("store"), strict=True):
        assert_grads_near(actual, expected, 1e-9)


class Uses(nn.Module):
    """A linear layer times whatever ``function`` says."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.function(x)


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


class Counts(nn.Module):
    """A branch that depends on how often it has run, and remembers its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.calls = 0
        self.seen: list[Tensor] = []
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.detach())
        self.scale += 0.5
        return self.linear(x) * self.scale * self.calls / len(self.seen)


@savers
def test_counters_caches_and_statistics(policy: MemoryPolicy) -> None:
    compare(lambda policy: (of(Counts(), policy=policy), {}), policy)
    module = of(Counts(), policy=policy)
    for _ in range(3):
        sum(y.sum() for y in module(*make_streams())).backward()
    counts = module.blocks[0].f
    assert counts.calls == len(counts.seen) == 3 and counts.scale == 2.5


@savers
def test_batch_norm(policy: MemoryPolicy) -> None:
    class Norm(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    compare(lambda policy: (of(Norm(DIM), policy=policy), {}), policy)


@savers
def test_eval_and_train_between_forward_and_backward(policy: MemoryPolicy) -> None:
    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        module = of(nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.5)), policy=policy)
        return module.train(), {}

    def toggle(module: nn.Module) -> None:
        module.train(not module.training)

    compare(make, policy, between=toggle)


@savers
def test_frozen_between_forward_and_backward(policy: MemoryPolicy) -> None:
    def freeze(module: nn.Module) -> None:
        module.blocks[0].requires_grad_(False)

    compare(lambda policy: (of(policy=policy), {}), policy, between=freeze, steps=1)


@savers
def test_a_buffer_changed_in_between_is_refused(policy: MemoryPolicy) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    branch = Scaled(DIM, DIM)
    branch.register_buffer("scale", torch.ones(()))
    module = of(branch, policy=policy)
    y1, y2 = module(*make_streams())
    branch.scale.mul_(2)
    with pytest.raises(RuntimeError, match=r"buffer Scaled\.scale was changed"):
        (y1.sum() + y2.sum()).backward()


@savers
@pytest.mark.parametrize("source", ("python", "numpy", "own", "default"))
def test_random_numbers_of_other_sources(policy: MemoryPolicy, source: str) -> None:
    import numpy as np

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        own = torch.Generator().manual_seed(5)
        np.random.seed(5)
        draw: dict[str, Callable[[Tensor], Any]] = {
            "python": lambda x: random.random(),
            "numpy": lambda x: float(np.random.rand()),
            "own": lambda x: torch.rand(DIM, generator=own, dtype=x.dtype),
            "default": torch.rand_like,
        }
        return of(Uses(draw[source]), policy=policy), {}

    compare(make, policy)


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
def test_outputs_changed_in_place_are_right_or_refused(policy: MemoryPolicy) -> None:
    def halve(y: Tensor) -> Tensor:
        return y.mul_(0.5)

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        blocks = [Halved(block, halve) for block in make_sequence(3).blocks]
        for wrapper in blocks:
            wrapper.block.memory_policy = policy
        return ReversibleSequence(blocks), {}  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        compare(make, policy)


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
def test_an_attribute_that_is_set_between_forward_and_backward(policy: MemoryPolicy) -> None:
    """By a schedule of dropout, for one."""

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        return of(nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.3)), policy=policy), {}

    def schedule(module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.3 if part.p == 0.6 else 0.6

    compare(make, policy, between=schedule)


@savers
def test_counts_kept_in_containers_within_containers(policy: MemoryPolicy) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)
            self.state = {"calls": [0]}

        def forward(self, x: Tensor) -> Tensor:
            self.state["calls"][0] += 1
            return self.linear(x) * self.state["calls"][0]

    compare(lambda policy: (of(Deep(), policy=policy), {}), policy)


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
def test_what_is_noted_of_a_module_does_not_keep_it_alive(policy: MemoryPolicy) -> None:
    module = of(Counts(), nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.5)), policy=policy)
    sum(y.sum() for y in module(*make_streams())).backward()
    parts = [weakref.ref(part) for part in module.modules()]
    gc.disable()
    try:
        del module
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


@savers
def test_a_branch_that_changes_its_input_in_place_is_refused(policy: MemoryPolicy) -> None:
    module = of(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, DIM)), policy=policy)
    with pytest.raises(RuntimeError, match="in place"):
        y1, y2 = module(*(2 * x for x in make_streams()))
        (y1.sum() + y2.sum()).backward()
