"""DistributedDataParallel: two processes give the gradients of one on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones import set_memory
from tests import forked
from tests.backbones import ddp_worker
from tests.backbones.ddp_worker import MICRO_BATCHES, MODES, POLICIES, WORLD
from tests.backbones.helpers import assert_grads_near

Results = list[dict[tuple[Any, ...], dict[str, Tensor | None]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of the processes got. They are started once for all modes."""
    folder = tmp_path_factory.mktemp("ddp")
    forked.start_processes(ddp_worker.run, (str(folder),), nprocs=WORLD)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


def one_process(mode: str, micro_batches: list[int]) -> dict[str, Tensor | None]:
    net = ddp_worker.Net(mode)
    set_memory(net, "store")
    for index in micro_batches:
        ddp_worker.loss_of(net(ddp_worker.batch()[index].flatten(0, 1))).backward()
    return ddp_worker.grads_of(net)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_whole_batch(results: Results, mode: str, policy: tuple[Any, ...]) -> None:
    last = MICRO_BATCHES - 1
    accumulates = "no_sync" in mode
    for index in [last] if accumulates else range(MICRO_BATCHES):
        expected = one_process(mode, list(range(MICRO_BATCHES)) if accumulates else [index])
        unused = {name for name, grad in expected.items() if grad is None}
        assert all("unused" in name or "blocks.1." in name for name in unused)
        for of_rank in results:
            assert_grads_near(of_rank[mode, policy, index], expected, 1e-12)
