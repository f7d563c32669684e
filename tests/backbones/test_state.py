"""What a block holds may change between its two runs: the gradients of "store", or an error."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy
from tests.backbones.helpers import (
    DIM,
    Uses,
    compare,
    make_streams,
    of,
    savers,
)


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
def test_a_container_that_becomes_something_else(policy: MemoryPolicy) -> None:
    """Within another one, which stays."""

    class Replaces(nn.Linear):
        cache: dict[str, object]

        def forward(self, x: Tensor) -> Tensor:
            self.cache["inside"] = None
            return super().forward(x)

    def make(policy: MemoryPolicy) -> tuple[nn.Module, dict[str, Tensor]]:
        branch = Replaces(DIM, DIM)
        branch.cache = {"inside": {"count": 1}}
        return of(branch, policy=policy), {}

    compare(make, policy)


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
