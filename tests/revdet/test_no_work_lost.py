"""Runs that are stopped, damaged, or get no room: saved, said, and continued exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from revdet.train_net import main
from revdet.training.evaluation import Evaluations
from revdet.training.trainer import Trainer
from tests import forked
from tests.revdet.conftest import DEMO, FEW, SMALL, error_of

RUN = ["train.max_iter=6", "train.checkpointer.period=2", "train.eval_period=4", *FEW]
RUN += ["train.checkpointer.max_to_keep=2"]


def scores(output):
    """By iteration, what no two runs have different."""
    rows = {}
    for line in (output / "metrics.json").read_text().splitlines():
        row = json.loads(line)
        into = rows.setdefault(row["iteration"], {})
        into |= {k: v for k, v in row.items() if "time" not in k and "seconds" not in k}
    return rows


def checkpoints(output):
    return sorted(path.name for path in output.glob("model_0*.pth"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, datasets_root):
    """The scores of a run that nothing stops."""
    output = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    assert main(["--config", DEMO, f"train.output_dir={output}", *SMALL, *RUN]) == 0
    assert checkpoints(output) == ["model_0000003.pth", "model_0000005.pth"]
    return scores(output)


def signal_in(monkeypatch, owner, method, when, number):
    """A signal to this process, once, in the middle of a method."""
    original, sent = getattr(owner, method), []

    def patched(self, *args):
        if when(self, *args) and not sent:
            sent.append(number)
            signal.raise_signal(number)
        return original(self, *args)

    monkeypatch.setattr(owner, method, patched)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_iteration(
    train_net, tmp_path, monkeypatch, capfd, whole, number, status
):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal_in(monkeypatch, Trainer, "_run_step", lambda trainer: trainer.iter == 2, number)
    assert train_net(tmp_path, *RUN) == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    output = capfd.readouterr()
    assert "Traceback" not in output.err + output.out
    assert "iteration 3 is saved" in output.err and "--resume continues" in output.err
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert train_net(tmp_path, *RUN, "--resume") == 0
    assert scores(tmp_path) == whole
    assert checkpoints(tmp_path) == ["model_0000003.pth", "model_0000005.pth"]


def test_an_evaluation_that_is_cut_off_is_made_again(train_net, tmp_path, monkeypatch, whole):
    due = lambda _, iteration: iteration == 3  # noqa: E731
    signal_in(monkeypatch, Evaluations, "run", due, signal.SIGTERM)
    assert train_net(tmp_path, *RUN) == 143
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert train_net(tmp_path, *RUN, "--resume") == 0
    assert scores(tmp_path) == whole and any("bbox/AP" in row for row in whole.values())


@pytest.fixture(scope="module")
def left(tmp_path_factory, datasets_root):
    """What a run leaves that is killed behind its fourth iteration."""
    output = tmp_path_factory.mktemp("left")
    torch.manual_seed(0)
    arguments = [f"train.output_dir={output}", *SMALL, *RUN, "train.max_iter=4"]
    assert main(["--config", DEMO, *arguments]) == 0
    (output / "model_final.pth").unlink()
    (output / "last_checkpoint").write_text("model_0000003.pth")
    return output


@pytest.fixture
def half(left, tmp_path):
    """A copy of it, to be continued to six iterations."""
    return shutil.copytree(left, tmp_path / "half")


def flip(output):
    """One bit, in the middle of the newest file."""
    path = output / "model_0000003.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(output):
    """As an old run has it, without a checksum."""
    path = output / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    path.with_name("model_0000003.pth.sha256").unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (flip, "model_0000003.pth is damaged (its checksum is another): trying the one before"),
        (cut, "model_0000003.pth is damaged ("),
        (lambda output: (output / "last_checkpoint").unlink(), "last_checkpoint is missing"),
        (lambda output: (output / "last_checkpoint").write_text(""), "names no checkpoint"),
        (
            lambda output: (output / "metrics.json").write_bytes(b"\xff\n{]\n"),
            "metrics.json is dam",
        ),
        (
            lambda output: (output / "model_best.pth").write_bytes(b"no"),
            "model_best.pth is damaged",
        ),
        (lambda output: (output / "model_0000009.pth.ab.partial").write_bytes(b"no"), ""),
    ],
)
def test_damage(train_net, half, damage, words):
    damage(half)
    assert train_net(half, *RUN, "--resume", "train.eval_period=0") == 0
    log = (half / "log.txt").read_text()
    assert words in log and ("damaged" not in words or "Traceback" not in log)
    assert checkpoints(half) == ["model_0000003.pth", "model_0000005.pth"]
    assert not list(half.glob("*.partial"))
    assert json.loads((half / "results.json").read_text())["run"]["iterations"] == 6


def test_what_has_changed_is_said_and_done(train_net, half, tmp_path):
    more = ["train.seed=1", "dataloader.train.total_batch_size=4", "train.eval_period=0"]
    more += ["optimizer.lr=0.007", "optimizer.weight_decay=0.2", "train.reference_batch_size=0"]
    assert train_net(half, *RUN, "--resume", *more) == 0
    assert train_net(tmp_path / "alone", *RUN, *more) == 0
    resumed, alone = scores(half), scores(tmp_path / "alone")
    for number in (4, 5):
        assert resumed[number]["lr"] == alone[number]["lr"] > 0
    content = torch.load(half / "model_final.pth", weights_only=True)["trainer"]["optimizer"]
    assert {group["weight_decay"] for group in content["param_groups"]} == {0, 0.2}
    log = (half / "log.txt").read_text()
    assert "resumed with optimizer.lr 0.007, which was 0.001" in log
    assert "resumed with optimizer.weight_decay 0.2, which was 0.05" in log
    assert "resumed with train.seed 1, which was 0" in log
    assert "resumed with images in an iteration 4, which was 2" in log
    assert "processes" not in log.partition("resumed with")[2]


@pytest.mark.parametrize(
    "more, words",
    [
        ("model.backbone.net.model.depth=3", "another architecture"),
        ("optimizer.params.layer_decay=0.5", "other groups of parameters"),
        ("train.ema_decay=0.9", "averaged weights"),
    ],
)
def test_what_cannot_be_resumed_with_leaves_the_recipe_that_can(
    train_net, half, capsys, more, words
):
    kept = [half / name for name in ("config.yaml", "metrics.json", "model_0000003.pth")]
    before = [file.read_bytes() for file in kept]
    assert train_net(half, *RUN, "--resume", more) == 2
    assert words in error_of(capsys)
    assert [file.read_bytes() for file in kept] == before


def test_nothing_whole_is_left(train_net, half, capsys):
    for path in half.glob("model_0*.pth"):
        path.write_bytes(b"no")
    assert train_net(half, *RUN, "--resume") == 2
    assert "all checkpoints in" in error_of(capsys)


def test_without_last_checkpoint_a_run_is_not_started_over(train_net, half, capsys):
    (half / "last_checkpoint").unlink()
    assert train_net(half, *RUN) == 2
    assert "already holds a run (model_0000003.pth)" in error_of(capsys)


def test_two_runs_in_one_folder(train_net, tmp_path, capsys):
    held = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX)"
    code = f"{held}; print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    lock = str(tmp_path / ".lock")
    with subprocess.Popen([sys.executable, "-c", code, lock], text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert train_net(tmp_path, *RUN) == 2
        assert f"train.output_dir={tmp_path} is in use" in error_of(capsys)
        other.kill()
    assert train_net(tmp_path, "train.max_iter=1", *FEW) == 0


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), RuntimeError("failed")))
def test_no_room_for_a_checkpoint(train_net, tmp_path, monkeypatch, capsys, error):
    def save(_, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    assert train_net(tmp_path, *RUN) == 2
    message = error_of(capsys)
    assert "cannot save" in message and "--resume" in message and "model_0000001" in message
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.pth"))


def of_two_processes(output, strategy):
    """Arguments of a run that would take hours, of two processes."""
    sizes = [o for o in SMALL if "total_batch_size" not in o]
    more = [f"train.output_dir={output}", "train.max_iter=100000", "train.device=cpu"]
    more += ["dataloader.train.total_batch_size=2", "train.checkpointer.period=100000"]
    return ["--config", DEMO, "--num-gpus", "2", *sizes, *more, f"train.strategy={strategy}"]


def has_begun(output):
    return (output / "metrics.json").is_file() and bool(scores(output))


def test_two_processes_stop_together(tmp_path, datasets_root):
    """As users start them."""
    command = [sys.executable, "revdet/train_net.py", *of_two_processes(tmp_path, "ddp")]
    env = {**os.environ, "DETECTRON2_DATASETS": str(datasets_root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        while not has_begun(tmp_path):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        error = run.stderr.read()
        status = run.wait(60)
    assert status == 143, error
    assert f"is saved in {tmp_path}; --resume continues" in error and "Traceback" not in error
    saved = (tmp_path / "last_checkpoint").read_text()
    assert int(saved[6:13]) == max(scores(tmp_path))


def test_one_of_two_processes_is_killed(tmp_path):
    """As for memory."""
    log = tmp_path / "printed.txt"
    run = forked.start(main, of_two_processes(tmp_path, "fsdp"), log)
    while not has_begun(tmp_path):
        assert run.is_alive(), log.read_text()
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    run.join(60)
    error = log.read_text()
    last = error.strip().splitlines()[-1]
    assert run.exitcode == 2 and "Traceback" not in error
    assert last.startswith("error: process 1 was killed (SIGKILL), which has ended the run")
