"""The road from a recipe to results.json, through the command that users type."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import backbones
from revdet.trainer import read_metrics
from tests.revdet.conftest import DEMO, SMALL


def losses(output: Path) -> dict[int, float]:
    lines = read_metrics(output / "metrics.json")
    return {int(line["iteration"]): line["total_loss"] for line in lines if "total_loss" in line}


def test_every_memory_policy_gives_the_same_loss_curve(train_net, tmp_path):
    curves = {}
    for policy in ("store", "checkpoint", "reversible"):
        arguments = [f"train.memory={policy}", "train.max_iter=20", "train.check_data=false"]
        arguments.append("model.backbone.net.model.drop_path_rate=0.2")
        assert train_net(tmp_path / policy, *arguments) == 0
        curves[policy] = losses(tmp_path / policy)
    assert len(curves["store"]) == 20
    assert curves["checkpoint"] == pytest.approx(curves["store"], rel=1e-3)
    assert curves["reversible"] == pytest.approx(curves["store"], rel=1e-3)


def test_a_run_leaves_results_pictures_and_a_checkpoint_that_evaluates_the_same(
    train_net, tmp_path
):
    output = tmp_path / "run"
    assert train_net(output, "train.max_iter=3") == 0
    results = json.loads((output / "results.json").read_text())
    for task in ("bbox", "segm"):
        assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= results[task].keys()
        assert 0 <= results[task]["AP50"] <= 100
    assert results["run"]["memory"] == "reversible"
    assert len(list((output / "pictures").glob("*.png"))) == 2
    for name in ("curves.png", "config.yaml", "environment.txt", "log.txt", "model_final.pth"):
        assert (output / name).stat().st_size > 0
    assert list(output.glob("events.out.tfevents.*"))
    assert not list(output.glob("*.partial"))

    assert train_net(output, "--eval-only") == 0
    again = json.loads((output / "results.json").read_text())
    assert (again["bbox"], again["segm"]) == (results["bbox"], results["segm"])

    assert again["run"]["iterations"] == 3

    # The config that a run saves is a recipe itself, and evaluating does not change it.
    assert "model_final" not in (output / "config.yaml").read_text()
    assert train_net(output, "--eval-only", config=str(output / "config.yaml")) == 0


def test_resuming_a_finished_run_evaluates_it(train_net, tmp_path):
    assert train_net(tmp_path, "train.max_iter=2") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert train_net(tmp_path, "train.max_iter=2", "train.memory=store", "--resume") == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again == results
    assert sorted(losses(tmp_path)) == [0, 1]


def test_the_policy_reaches_every_block(train_net, tmp_path, monkeypatch):
    seen = []
    set_memory = backbones.set_memory

    def spy(model, *arguments):
        set_memory(model, *arguments)
        blocks = [m for m in model.modules() if isinstance(m, backbones.ReversibleBlock)]
        seen.extend(block.memory_policy for block in blocks)

    monkeypatch.setattr(backbones, "set_memory", spy)
    arguments = ["train.memory=checkpoint", "train.stored_blocks=1", "train.max_iter=1"]
    assert train_net(tmp_path, *arguments) == 0
    assert seen == ["checkpoint", "store"]


def test_a_finished_run_is_not_overwritten(train_net, tmp_path, capsys):
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert train_net(tmp_path, "train.max_iter=1") == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_trains(train_net, tmp_path, dtype):
    arguments = ["train.amp.enabled=true", f"train.amp.dtype={dtype}", "train.max_iter=2"]
    assert train_net(tmp_path / "half", *arguments) == 0
    assert train_net(tmp_path / "fp32", "train.max_iter=2") == 0
    half, full = losses(tmp_path / "half"), losses(tmp_path / "fp32")
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def cpu_only() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(output: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "revdet/train_net.py",
        "--config",
        DEMO,
        *SMALL,
        f"train.output_dir={output}",
        "train.check_data=false",
        *arguments,
    ]


def test_a_killed_run_resumes_as_if_nothing_had_happened(datasets_root, tmp_path):
    arguments = [
        "train.max_iter=16",
        "train.checkpointer.period=2",
        "dataloader.train.num_workers=1",
    ]
    arguments.append("model.backbone.net.model.drop_path_rate=0.2")
    subprocess.run(command(tmp_path / "whole", *arguments), check=True, capture_output=True)

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(killed, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (killed / "model_0000005.pth").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "results.json").exists()

    subprocess.run(
        command(killed, "--resume", *arguments), check=True, capture_output=True, timeout=240
    )
    log = (killed / "log.txt").read_text()
    starts = [int(n) for n in re.findall(r"Starting training from iteration (\d+)", log)]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 6
    whole, resumed = losses(tmp_path / "whole"), losses(killed)
    assert sorted(resumed) == list(range(16))
    assert resumed == pytest.approx(whole, rel=1e-4)


def test_two_processes_train_on_the_cpu(datasets_root, tmp_path):
    arguments = ["--num-gpus", "2", "train.max_iter=2", "train.device=cpu"]
    subprocess.run(
        command(tmp_path, *arguments),
        check=True,
        capture_output=True,
        timeout=240,
        env=cpu_only(),
    )
    assert "bbox" in json.loads((tmp_path / "results.json").read_text())


def test_an_error_in_a_spawned_process_is_one_line_too(datasets_root, tmp_path):
    arguments = ["--num-gpus", "2", "train.device=cpu", "train.memory=revresible"]
    run = subprocess.run(
        command(tmp_path, *arguments), capture_output=True, text=True, timeout=240, env=cpu_only()
    )
    assert run.returncode == 2
    assert [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "revresible" in run.stderr
