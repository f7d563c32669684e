"""A run that was stopped goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

from revvideo.data.clips import ClipDataset
from revvideo.training.checkpoint import CheckpointIO
from revvideo.training.metrics import read_metrics
from revvideo.training.module import VideoModule
from tests.revvideo import forked
from tests.revvideo.tiny_set import RANDOM, arguments, losses, predictions


def assert_same(resumed: Path, whole: Path) -> None:
    """Every loss, learning rate, weight and score, to the last bit."""
    rows, expected = (
        [(row["step"], row["lr"]) for row in read_metrics(run / "metrics.csv") if "lr" in row]
        for run in (resumed, whole)
    )
    assert rows == expected and losses(resumed) == losses(whole)
    weights, expected = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (resumed, whole)
    )
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert predictions(resumed) == predictions(whole)


def test_what_a_killed_save_has_left_goes_with_the_next_one(tmp_path):
    (tmp_path / "last.ckpt.12ab34cd.partial").touch()
    CheckpointIO(None, hand_out=False).save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_stopped_run_reads_the_same_remaining_clips(run, tmp_path, monkeypatch, opened):
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
        opened.reset_mock()
        assert run(output, "--resume", *more) == 0
        assert opened.call_count == 2, "once to go on from, and once, at the end, to test"
        assert read == whole[4 * killed_at :]
        assert_same(output, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_as_if_nothing_had_happened(videos, run, tmp_path):
    more = ["optim.epochs=3", "train.checkpoint_every=2", "data.workers=1", "optim.ema=0.9"]
    more += [*RANDOM, "train.val_every=9", "test.clips=1"]
    killed = tmp_path / "killed"
    process = forked.start(arguments(videos, killed, *more), log := tmp_path / "log.txt")
    deadline = time.monotonic() + 240
    while not (killed / "metrics.csv").exists() or max(losses(killed), default=0) < 5:
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (killed / "results.json").exists()
    assert run(tmp_path / "whole", *more) == 0
    assert run(killed, "--resume", *more) == 0
    assert sorted(losses(killed)) == list(range(12))
    assert_same(killed, tmp_path / "whole")
