"""A run that was stopped goes on as if nothing had happened."""

from __future__ import annotations

import math
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from revvideo.config import load_config
from revvideo.data.clips import ClipDataset
from revvideo.run import main
from revvideo.training.checkpoint import CheckpointIO
from revvideo.training.metrics import MetricsLogger, cut_metrics, read_metrics
from revvideo.training.module import VideoModule
from tests import forked
from tests.revvideo.tiny_set import RANDOM, TINY, arguments, losses, predictions


def left_by(run: Path) -> tuple:
    """Every learning rate, loss, score and weight of a run, to compare to the last bit."""
    rates = [(row["step"], row["lr"]) for row in read_metrics(run / "metrics.csv") if "lr" in row]
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    values = {name: value.tolist() for name, value in weights.items()}
    return rates, losses(run), predictions(run), values


def test_what_a_killed_save_has_left_goes_with_the_next_one(tmp_path):
    (tmp_path / "last.ckpt.12ab34cd.partial").touch()
    CheckpointIO(None, hand_out=False).save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last.ckpt", "last.ckpt.sha256"}


def run_with_signal(run, output, monkeypatch, number, step, *more):
    """The status of a run that hears a signal in the middle of a step."""
    plain, sent = VideoModule.training_step, []

    def training_step(self: VideoModule, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == step and not sent:
            sent.append(number)
            signal.raise_signal(number)
        return plain(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VideoModule, "training_step", training_step)
        return run(output, *more)


def test_a_signal_saves_the_step_and_damage_is_passed_over(run, tmp_path, monkeypatch, capfd):
    more = ["optim.epochs=3", "train.val_every=9", *RANDOM]
    assert run(tmp_path / "whole", *more) == 0
    # In the middle of an epoch of four steps, and in its last step.
    stopped = tmp_path / "stopped"
    for number, status, step, at in ((signal.SIGTERM, 143, 1, 2), (signal.SIGINT, 130, 3, 5)):
        resumed = ["--resume"] if step > 1 else []
        assert run_with_signal(run, stopped, monkeypatch, number, step, *more, *resumed) == status
        output = capfd.readouterr()
        assert f"step {at} is saved in {stopped}" in output.err and "--resume" in output.err
        assert "Traceback" not in output.err + output.out
        last = stopped / "checkpoints" / "last.ckpt"
        assert torch.load(last, weights_only=True)["global_step"] == at
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert run(stopped, "--resume", *more) == 0
    log = (stopped / "log.txt").read_text()
    assert "last.ckpt is damaged (its checksum is another): trying the one before" in log
    assert left_by(stopped) == left_by(tmp_path / "whole")


def test_videos_that_vanish_end_the_run(run, videos, tmp_path, monkeypatch, capfd):
    root = tmp_path / "set"
    shutil.copytree(videos, root)
    plain = VideoModule.training_step

    def training_step(self: VideoModule, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5 and root.exists():
            root.rename(tmp_path / "moved")
        return plain(self, batch, batch_idx)

    more = ["optim.epochs=99", "train.val_every=99", "train.checkpoint_every=2", "data.workers=0"]
    monkeypatch.setattr(VideoModule, "training_step", training_step)
    assert run(tmp_path / "run", *more, root=root) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: not one video of the last 4 batches") and str(root) in error
    more[0] = "optim.epochs=3"
    assert run(tmp_path / "run", *more, "--resume", root=tmp_path / "moved") == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"videos from {tmp_path / 'moved'}, which were in {root}" in log


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
        # At the end of an epoch nothing is saved, but one step later.
        assert read == whole[4 * (3 if killed_at == 4 else killed_at) :]
        assert left_by(output) == left_by(tmp_path / "whole")


@pytest.mark.parametrize(("first", "last"), ((4, 8), (4, 0), (5, 0), (5, 9), (6, 7)))
def test_a_run_that_max_steps_has_ended_goes_on(first, last, run, tmp_path, monkeypatch):
    """At the end of an epoch of four steps and within one: no step less, each clip once."""
    read: list[tuple[int, int]] = []
    plain = ClipDataset.__getitem__

    def record(self: ClipDataset, key: tuple[int, int]) -> dict:
        if len(self) == 18:
            read.append(key)
        return plain(self, key)

    monkeypatch.setattr(ClipDataset, "__getitem__", record)
    more = ["optim.epochs=3", "optim.accumulate=2", "train.val_every=2", "optim.ema=0.9"]
    more += [*RANDOM, "optim.end_factor=1"]  # a rate that does not depend on the steps to go
    output = tmp_path / "run"
    assert run(output, *more, f"optim.max_steps={first}") == 0
    assert run(output, *more, f"optim.max_steps={last}", "--resume") == 0
    steps = last or 12
    assert [position for _, position in read] == [*range(4 * steps)]
    rows = read_metrics(output / "metrics.csv")
    assert [row["step"] for row in rows if "val/top1" in row] == ([7] if steps >= 8 else [])
    assert run(tmp_path / "whole", *more, f"optim.max_steps={last}") == 0
    assert sorted(losses(output)) == [*range(steps)]
    assert left_by(output) == left_by(tmp_path / "whole")


def test_a_resumed_run_has_the_settings_of_its_optimizer_that_are_asked_for(run, tmp_path):
    """As the remedy for a loss that is no number says; and they are those of config.yaml."""
    assert run(tmp_path, "optim.max_steps=4") == 0
    more = ["optim.lr=0.0005", "optim.weight_decay=0.3", "optim.warmup_epochs=0"]
    assert run(tmp_path, "--resume", *more) == 0
    rows = read_metrics(tmp_path / "metrics.csv")
    rates = {row["step"]: row["lr"] for row in rows if "lr" in row}
    end = load_config(tmp_path / "config.yaml").optim.end_factor
    for step in range(8):  # the first four of a cosine over four steps, the others over eight
        base, where = (0.002, step / 4) if step < 4 else (0.0005, step / 8)
        cosine = end + (1 - end) * (1 + math.cos(math.pi * where)) / 2
        assert rates[step] == pytest.approx(base * cosine)
    log = (tmp_path / "log.txt").read_text()
    for words in ("lr 0.0005, which was 0.002", "weight_decay 0.3, which was 0.05"):
        assert f"resumed with optim.{words}" in log
    assert "resumed with optim.max_steps 0, which was 4" in log
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    groups = last["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.3}
    assert run(tmp_path, "--resume", *more, "optim.epochs=3") == 0
    again = (tmp_path / "log.txt").read_text().removeprefix(log)
    assert "resumed with optim.epochs 3, which was 2" in again and "optim.lr" not in again


def test_what_cannot_be_resumed_with_is_refused(run, tmp_path, capfd):
    assert run(tmp_path, "optim.max_steps=1") == 0
    kept = [tmp_path / name for name in ("checkpoints/last.ckpt", "config.yaml", "metrics.csv")]
    before = [file.read_bytes() for file in kept]
    refused = {
        f"model.arguments={ {**TINY, 'depth': 5} }": "of another architecture (Missing key(s)",
        f"model.arguments={ {**TINY, 'embed_dim': 16} }": "of another architecture (size mismatch",
        "optim.ema=0.9": "is of a run without averaged weights",
        "train.strategy=fsdp": "resume with train.strategy=auto",
    }
    for more, words in refused.items():
        assert run(tmp_path, "--resume", more) == 2
        (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
        assert words in line
    assert [file.read_bytes() for file in kept] == before


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_as_if_nothing_had_happened(videos, run, tmp_path):
    more = ["optim.epochs=3", "train.checkpoint_every=2", "data.workers=1", "optim.ema=0.9"]
    more += [*RANDOM, "train.val_every=9"]
    killed = tmp_path / "killed"
    process = forked.start(main, arguments(videos, killed, *more), log := tmp_path / "log.txt")
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
