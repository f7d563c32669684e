"""A run that was stopped goes on as if nothing had happened."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

from revvideo.data.clips import ClipDataset
from revvideo.training.checkpoint import CheckpointIO
from revvideo.training.metrics import MetricsLogger, cut_metrics, read_metrics
from revvideo.training.module import VideoModule
from tests.revvideo import forked
from tests.revvideo.tiny_set import RANDOM, arguments, losses, predictions


def left_by(run: Path) -> tuple:
    """Every learning rate, loss, score and weight of a run, to compare to the last bit."""
    rates = [(row["step"], row["lr"]) for row in read_metrics(run / "metrics.csv") if "lr" in row]
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    values = {name: value.tolist() for name, value in weights.items()}
    return rates, losses(run), predictions(run), values


def test_what_a_killed_save_has_left_goes_with_the_next_one(tmp_path):
    (tmp_path / "last.ckpt.12ab34cd.partial").touch()
    CheckpointIO(None, hand_out=False).save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


# Between two lines, after a comma, within a number, and within an exponent.
@pytest.mark.parametrize("cut", [0, 1, 3, 4, 5, 11])
def test_a_resumed_session_continues_whatever_a_kill_has_cut_off(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    first = MetricsLogger(path)
    for step in range(3):
        first.log_metrics({"train/loss": 1.25, "lr": 1.5e-7}, step=step)
    content = path.read_text()
    assert content.endswith("2,1.25,1.5e-07\n")
    path.write_text(content[: len(content) - cut])
    assert len(read_metrics(path)) == (3 if cut == 0 else 2)
    cut_metrics(path, 2)
    second = MetricsLogger(path)
    second.log_metrics({"train/loss": 0.5, "lr": 1e-7}, step=2)
    second.log_metrics({"val/top1": 50.0}, step=3)  # a column that the lines before have not
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] == {"step": 1, "train/loss": 1.25, "lr": 1.5e-7}
    assert rows[2:] == [{"step": 2, "train/loss": 0.5, "lr": 1e-7}, {"step": 3, "val/top1": 50.0}]


def test_a_stopped_run_reads_the_same_remaining_clips(run, tmp_path, monkeypatch, opened):
    more = ["train.checkpoint_every=1", "train.val_every=9", "optim.accumulate=2", *RANDOM]
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
        assert left_by(output) == left_by(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_as_if_nothing_had_happened(videos, run, tmp_path):
    more = ["optim.epochs=3", "train.checkpoint_every=2", "data.workers=1", "optim.ema=0.9"]
    more += [*RANDOM, "train.val_every=9"]
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
    assert left_by(killed) == left_by(tmp_path / "whole")
