"""Two processes train as one that averages the gradients of their batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor

from backbones.common.seeds import seed_of
from tests.revdet import ddp_worker
from tests.revdet.ddp_worker import MODES, SEED, STEPS, WORLD


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the processes got. They are started once for all modes."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(ddp_worker.run, (str(folder),), nprocs=WORLD)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


def one_process(mode: str) -> list[dict[str, Tensor]]:
    """The parameters after each step, by a loop that knows nothing of the Trainer."""
    model, optimizer = ddp_worker.build(mode)
    batches = WORLD * MODES[mode][1]
    steps = []
    with EventStorage():
        for iteration in range(STEPS):
            optimizer.zero_grad()
            for index in range(batches):
                seed_all_rng(seed_of(SEED, iteration, index))
                losses = model(ddp_worker.batch(iteration, index))
                (sum(losses.values()) / batches).backward()
            optimizer.step()
            steps.append(ddp_worker.snapshot(model))
    return steps


@pytest.mark.parametrize("mode", MODES)
def test_parameters_are_those_of_one_process(results, mode):
    expected = one_process(mode)
    untrained = ddp_worker.snapshot(ddp_worker.build(mode)[0])
    for rank in range(WORLD):
        steps = results[rank][mode]["steps"]
        assert len(steps) == STEPS
        for got, wanted in zip(steps, expected, strict=True):
            assert got.keys() == wanted.keys()
            for name in wanted:
                error = (got[name] - wanted[name]).norm()
                assert error <= 1e-5 * wanted[name].norm(), name
    still = [name for name in untrained if torch.equal(untrained[name], expected[-1][name])]
    assert len(still) <= 2 and all(name.startswith("unused") for name in still)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "accumulate" in mode])
def test_accumulated_gradients_are_reduced_once(results, mode):
    alone = mode.replace("accumulate", "").strip(", ") or "plain"
    # In the first iterations DistributedDataParallel finds out about graph and buckets.
    got, wanted = (
        [results[0][m]["reduced"].count(step) for step in range(2, STEPS)] for m in (mode, alone)
    )
    assert got == wanted and min(got) > 0
