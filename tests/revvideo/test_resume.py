"""A run that was stopped goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import time

import pytest
import torch

from revvideo.data.clips import ClipDataset
from revvideo.training.metrics import read_metrics
from revvideo.training.module import VideoModule
from tests.revvideo import forked
from tests.revvideo.tiny_set import RANDOM, arguments, losses, predictions


@pytest.fixture(scope="module", autouse=True)
def _forks() -> None:
    forked.prepare()


def test_a_stopped_run_reads_the_same_remaining_clips(run, tmp_path, monkeypatch):
    more = ["train.checkpoint_every=1", "optim.accumulate=2", *RANDOM]
    more += ["train.val_every=9", "test.clips=1"]
    read: list[tuple[int, int]] = []
    plain, step = ClipDataset.__getitem__, VideoModule.training_step

    def record(self: ClipDataset, key: tuple[int, int]) -> dict:
        if len(self) == 18:
            read.append(key)
        return plain(self, key)

    def copy(self: VideoModule, batch: object, batch_idx: int) -> torch.Tensor:
        """What a kill within the second part of a step would leave."""
        if self.global_step in (4, 6) and batch_idx % 2:
            shutil.copytree(tmp_path / "whole", tmp_path / f"killed{self.global_step}")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClipDataset, "__getitem__", record)
    with monkeypatch.context() as patch:
        patch.setattr(VideoModule, "training_step", copy)
        assert run(tmp_path / "whole", *more) == 0
    whole = read.copy()
    assert [position for _, position in whole] == list(range(32))
    # At the end of an epoch of four steps, and in the middle of the second one.
    for killed_at in (4, 6):
        output = tmp_path / f"killed{killed_at}"
        assert max(losses(output)) == killed_at - 1 and not (output / "results.json").exists()
        read.clear()
        assert run(output, "--resume", *more) == 0
        assert read == whole[4 * killed_at :]
        assert losses(output) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
        rows, expected = (read_metrics(o / "metrics.csv") for o in (output, tmp_path / "whole"))
        assert [r["lr"] for r in rows if "lr" in r] == [r["lr"] for r in expected if "lr" in r]


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_as_if_nothing_had_happened(videos, run, tmp_path):
    more = ["optim.epochs=3", "train.checkpoint_every=2", "data.workers=1", "optim.ema=0.9"]
    more += [*RANDOM, "train.val_every=9", "test.clips=1"]
    killed = tmp_path / "killed"
    process = forked.start(arguments(videos, killed, *more), tmp_path / "log.txt")
    deadline = time.monotonic() + 240
    while not (killed / "metrics.csv").exists() or max(losses(killed), default=0) < 5:
        assert process.is_alive() and time.monotonic() < deadline, (
            tmp_path / "log.txt"
        ).read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (killed / "results.json").exists()
    assert run(tmp_path / "whole", *more) == 0
    assert run(killed, "--resume", *more) == 0
    assert sorted(losses(killed)) == list(range(12))
    assert losses(killed) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert predictions(killed) == predictions(tmp_path / "whole")
