"""Two processes do what one does, however they were started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from revvideo.run import main
from revvideo.scan import main as scan
from tests import forked
from tests.revvideo.tiny_set import arguments, build_set, losses, predictions, results, spoil


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scanned set of which a video for validation has broken since the scan."""
    root = build_set(tmp_path_factory.mktemp("spoilt"))
    assert scan(["--split", "train", "val", "--", str(root)]) == 0
    spoil(root / "val" / "dark" / "04.mp4")
    return root


def by_the_command(arguments: list[str], folder: Path) -> None:
    """The command starts the other process itself."""
    command = [sys.executable, "revvideo/run.py", *arguments, "train.devices=2"]
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=no_gpu)


def under_torchrun(arguments: list[str], folder: Path) -> None:
    """Both are started with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = [
        forked.start(main, arguments, log, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank, log in enumerate(logs)
    ]
    for process, log in zip(processes, logs, strict=True):
        process.join(timeout=240)
        process.kill()
        assert process.exitcode == 0, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "start", "steps"),
    [("ddp", by_the_command, 6), ("fsdp", under_torchrun, 2)],
    ids=["ddp", "fsdp"],
)
def test_two_processes_train_and_test_like_one(run, spoilt, tmp_path, strategy, start, steps):
    """Seven videos for two processes, of which one has a video that breaks."""
    more = [f"optim.max_steps={steps}", "train.val_every=9"]
    one, two = tmp_path / "one", tmp_path / "two"
    start([*arguments(spoilt, two, *more), f"train.strategy={strategy}"], tmp_path)
    assert run(one, *more, root=spoilt) == 0
    assert sorted(losses(two)) == list(range(steps))
    # Not to the last bit: gradients are summed in another order.
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)

    paths = [row["path"] for row in predictions(two)]
    good = [path for path in spoilt.glob("val/*/*.mp4") if path.name != "04.mp4"]
    assert sorted(paths) == sorted(str(path.relative_to(spoilt)) for path in good)
    alone = predictions(one)
    assert [row["path"] for row in alone] == paths
    assert [row["top1"] for row in alone] == [row["top1"] for row in predictions(two)]
    assert results(two)["test"] == results(one)["test"]
    assert (results(two)["test"]["videos"], results(two)["test"]["of"]) == (6, 7)
    assert list(results(two)["left_out"]) == ["val/dark/04.mp4"]
    assert "on 6 of 7 videos" in (two / "log.txt").read_text()

    if strategy == "ddp":
        for nothing_left in (False, True):  # two epochs are eight steps
            assert run(two, "optim.max_steps=9", "--resume", root=spoilt) == 0
            said = "nothing is left to train after step 8" in (two / "log.txt").read_text()
            assert said == nothing_left
        assert sorted(losses(two)) == list(range(8))
        return
    # What two have saved, one goes on with, the optimizer's state included.
    for output in (one, two):
        assert run(output, "optim.max_steps=4", "--resume", root=spoilt) == 0
    assert sorted(losses(two)) == list(range(4))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
