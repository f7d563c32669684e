"""The road from a recipe to results.json, through the command that users type."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from revdet.train_net import main
from revdet.training.metrics import read_metrics
from revdet.training.pictures import draw_curves
from revdet.training.trainer import Trainer
from tests import forked
from tests.revdet.conftest import DEMO, FEW, SMALL, error_of


def losses(output: Path) -> dict[int, float]:
    lines = read_metrics(output / "metrics.json")
    return {int(line["iteration"]): line["total_loss"] for line in lines if "total_loss" in line}


def test_every_memory_policy_gives_the_same_loss_curve(train_net, tmp_path):
    curves = {}
    for policy in ("store", "checkpoint", "reversible"):
        arguments = [f"train.memory={policy}", "train.max_iter=8", "train.check_data=false"]
        arguments.append("model.backbone.net.model.drop_path_rate=0.2")
        assert train_net(tmp_path / policy, *arguments) == 0
        curves[policy] = losses(tmp_path / policy)
    assert len(curves["store"]) == 8
    assert curves["checkpoint"] == pytest.approx(curves["store"], rel=1e-3)
    assert curves["reversible"] == pytest.approx(curves["store"], rel=1e-3)
    # Each run has a log of its own, also where one process runs several.
    log = (tmp_path / "store" / "log.txt").read_text()
    assert "memory policy store" in log and "memory policy checkpoint" not in log


def test_a_run_leaves_results_pictures_and_a_checkpoint_that_evaluates_the_same(
    train_net, tmp_path, monkeypatch
):
    monkeypatch.setattr("revdet.training.results.draw_curves", draw_curves)
    output = tmp_path / "run"
    arguments = ["train.max_iter=2", "train.pictures=2", "train.memory_keep=[g.mlp.fc2,*.qkv]"]
    arguments += ["train.memory_slices=2"]
    assert train_net(output, *arguments, *FEW) == 0
    results = json.loads((output / "results.json").read_text())
    for task in ("bbox", "segm"):
        assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= results[task].keys()
        assert 0 <= results[task]["AP50"] <= 100
    assert results["bbox"]["AP"] > 0
    assert results["run"]["memory"] == "reversible"
    assert results["run"]["memory_keep"] == ["g.mlp.fc2", "*.qkv"]
    assert results["run"]["memory_slices"] == 2
    assert len(list((output / "pictures").glob("*.png"))) == 2
    for name in ("curves.png", "config.yaml", "environment.txt", "log.txt", "model_final.pth"):
        assert (output / name).stat().st_size > 0
    assert list(output.glob("events.out.tfevents.*"))
    assert not list(output.glob("*.partial"))

    assert train_net(output, "--eval-only", *FEW) == 0
    again = json.loads((output / "results.json").read_text())
    assert (again["bbox"], again["segm"]) == (results["bbox"], results["segm"])
    assert again["run"]["iterations"] == 2

    # The config that a run saves is a recipe itself, and evaluating does not change it.
    assert "model_final" not in (output / "config.yaml").read_text()
    assert train_net(output, "--eval-only", config=str(output / "config.yaml")) == 0

    # Resuming a finished run evaluates it, and changes nothing that is known about its training.
    del again["run"]["checkpoint"]
    (output / "results.json").write_text(json.dumps(again))
    assert train_net(output, "--resume", "train.max_iter=2", "train.memory=store", *FEW) == 0
    assert json.loads((output / "results.json").read_text()) == results
    assert sorted(losses(output)) == [0, 1]


def test_a_finished_run_is_not_overwritten(refusal, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert "--resume" in refusal(f"train.output_dir={tmp_path}")


def test_autocast_trains(train_net, tmp_path):
    runs = ("float32", "bfloat16", "float16")
    for dtype in runs:
        autocast = ["train.amp.enabled=true", f"train.amp.dtype={dtype}"]
        arguments = ["train.max_iter=2", *(autocast if dtype != "float32" else [])]
        assert train_net(tmp_path / dtype, "train.check_data=false", *arguments) == 0
    assert len({losses(tmp_path / dtype)[1] for dtype in runs}) == 3
    # Of the very same anchors; proposals differ, where two scores are nearly alike.
    full, *halves = (
        read_metrics(tmp_path / dtype / "metrics.json")[0]["loss_rpn_cls"] for dtype in runs
    )
    assert halves == pytest.approx([full, full], rel=0.01)


@pytest.fixture
def cpu_only(monkeypatch):
    """No GPU, here and in every process that is started, for which nothing is imported again."""
    monkeypatch.setattr("torch.multiprocessing.start_processes", forked.start_processes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def command(output: Path, *arguments: str) -> list[str]:
    sizes = [*SMALL, *arguments, f"train.output_dir={output}", "train.check_data=false"]
    return ["--config", DEMO, *sizes]


def killed_in_iteration_5(arguments: list[str]) -> int:
    """The command in a process of its own, without a word and without an end."""
    run_step = Trainer.run_step

    def run_step_or_die(trainer: Trainer) -> None:
        if trainer.iter == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        run_step(trainer)

    Trainer.run_step = run_step_or_die
    return main(arguments)


def test_a_killed_run_resumes_as_if_nothing_had_happened(train_net, tmp_path, cpu_only):
    arguments = ["train.max_iter=10", "train.checkpointer.period=2", "train.accumulate=2"]
    arguments += ["train.ema_decay=0.9", "model.backbone.net.model.drop_path_rate=0.2"]
    killed = tmp_path / "killed"
    # A process that reads the images is killed with it; it does not change them.
    line = command(killed, *arguments, "dataloader.train.num_workers=1")
    process = forked.start(killed_in_iteration_5, line, log := tmp_path / "log.txt")
    process.join(timeout=400)
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert not (killed / "results.json").exists()

    assert train_net(killed, "--resume", *arguments) == 0
    assert train_net(tmp_path / "whole", *arguments) == 0
    log = (killed / "log.txt").read_text()
    starts = [int(n) for n in re.findall(r"Starting training from iteration (\d+)", log)]
    assert starts == [0, 4]
    whole, resumed = losses(tmp_path / "whole"), losses(killed)
    assert sorted(resumed) == list(range(10)) and resumed == whole
    ends = [torch.load(run / "model_final.pth") for run in (tmp_path / "whole", killed)]
    for kind in ("model", "training_model"):
        for name, value in ends[0][kind].items():
            assert torch.equal(ends[1][kind][name], value), name


def test_two_processes_train_alike_however_they_are_started(train_net, tmp_path, cpu_only):
    arguments = ["train.max_iter=2", "train.device=cpu", "dataloader.train.total_batch_size=4"]
    arguments.append("train.accumulate=2")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["revdet/train_net.py", *command(tmp_path / "launched", *arguments)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as torchrun:
        assert train_net(tmp_path / "spawned", "--num-gpus", "2", *arguments) == 0
        assert torchrun.wait(timeout=400) == 0
    results = json.loads((tmp_path / "spawned" / "results.json").read_text())
    assert "bbox" in results and results["run"]["iterations"] == 2
    assert losses(tmp_path / "launched") == losses(tmp_path / "spawned")
    log = (tmp_path / "launched" / "log.txt").read_text()
    assert "2 × 2 × 1" in log
    assert (tmp_path / "launched" / "log.txt.rank1").exists()


def test_an_error_in_a_spawned_process_is_one_line_too(refusal, cpu_only):
    arguments = ["--num-gpus", "2", "train.device=cpu", "train.stored_blocks=9"]
    assert "stored_blocks" in refusal("train.check_data=false", *arguments)


def test_machines_resume_together_or_not_at_all(refusal, tmp_path, monkeypatch):
    elsewhere = tmp_path / "model_final.pth"  # as the first process sees it
    monkeypatch.setattr("revdet.training.run.comm.all_gather", lambda _: [elsewhere])
    message = f"not every process finds the checkpoint {elsewhere}"
    assert message in refusal("train.max_iter=1", "--resume")


def test_of_torchruns_processes_the_first_says_what_is_wrong(
    train_net, tmp_path, monkeypatch, capsys
):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    wait = Mock()
    monkeypatch.setattr("revdet.train_net.time.sleep", wait)

    def as_process(rank: str, *arguments: str) -> int:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        return train_net(tmp_path, *arguments)

    assert as_process("1", "train.accumulate=0") == 2
    assert "error" not in capsys.readouterr().err and wait.call_count == 1
    assert as_process("0", "train.accumulate=0") == 2
    assert "train.accumulate=0" in error_of(capsys) and wait.call_count == 1
    assert as_process("0", "--num-gpus", "2") == 2
    assert "leave out --num-gpus" in error_of(capsys)


def test_averaged_weights_are_what_is_evaluated(train_net, tmp_path, monkeypatch):
    evaluated = []

    def evaluate(_, model):
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return {}

    monkeypatch.setattr("revdet.training.evaluation.evaluate", evaluate)
    monkeypatch.setattr("revdet.training.run.evaluate", evaluate)
    arguments = ["train.max_iter=3", "train.ema_decay=0.9", "optimizer.lr=0.01"]
    arguments.append("train.check_data=false")
    assert train_net(tmp_path, *arguments) == 0
    end = torch.load(tmp_path / "model_final.pth")
    name = "roi_heads.box_predictor.cls_score.bias"
    assert not torch.equal(end["model"][name], end["training_model"][name])
    assert train_net(tmp_path, "--eval-only", "train.check_data=false") == 0
    assert len(evaluated) == 2
    for weights in evaluated:
        assert all(torch.equal(weights[name], value) for name, value in end["model"].items())


def test_the_best_weights_are_kept_also_when_a_run_resumes(train_net, tmp_path, monkeypatch):
    scores = [{"bbox": {"AP": score}} for score in (20.0, 30.0, float("nan"), 25.0, 30.0, 31.0)]
    scores += [RuntimeError("killed in its evaluation"), {"bbox": {"AP": 32.0}}]
    monkeypatch.setattr("revdet.training.evaluation.evaluate", Mock(side_effect=scores))
    monkeypatch.setattr("revdet.training.results.draw_predictions", lambda *_: [])
    arguments = ["train.eval_period=1", "train.checkpointer.period=1", "train.check_data=false"]
    arguments += ["train.checkpointer.max_to_keep=9", "--resume"]

    def best() -> tuple[int, float]:
        content = torch.load(tmp_path / "model_best.pth")
        run = json.loads((tmp_path / "results.json").read_text())["run"]
        assert run["best"] == {"iteration": content["iteration"], "bbox/AP": content["bbox/AP"]}
        at = torch.load(tmp_path / f"model_{content['iteration'] - 1:07d}.pth")["model"]
        assert all(torch.equal(at[name], value) for name, value in content["model"].items())
        return content["iteration"], content["bbox/AP"]

    for iterations, expected in ((4, (2, 30.0)), (5, (2, 30.0)), (6, (6, 31.0))):
        assert train_net(tmp_path, f"train.max_iter={iterations}", *arguments) == 0
        assert best() == expected
    with pytest.raises(RuntimeError, match="killed"):
        train_net(tmp_path, "train.max_iter=7", *arguments)
    assert train_net(tmp_path, "train.max_iter=7", *arguments) == 0
    assert best() == (7, 32.0)


def test_a_memory_budget_chooses_the_policy(train_net, tmp_path):
    arguments = ["train.memory_budget=1GB", "train.max_iter=1", "train.accumulate=2"]
    assert train_net(tmp_path, *arguments) == 0
    run = json.loads((tmp_path / "results.json").read_text())["run"]
    assert (run["memory"], run["stored_blocks"]) == ("reversible", 7)  # two of them the trunk's
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"a training step on 1 x 3 x \d+ x \d+\n", log) and "not counted" in log


def test_a_deterministic_run(train_net, tmp_path, monkeypatch, capsys):
    arguments = ["train.deterministic=true", "train.max_iter=1"]
    try:
        assert train_net(tmp_path / "possible", *arguments) == 0
        assert torch.are_deterministic_algorithms_enabled()
        # No operation of a CPU is refused; this is how torch refuses one of a GPU.
        refusal = RuntimeError("some_backward_cuda does not have a deterministic implementation, …")
        monkeypatch.setattr("revdet.training.trainer.Trainer._run_step", Mock(side_effect=refusal))
        assert train_net(tmp_path / "impossible", *arguments) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert "train.deterministic=true is not possible here: some_back" in capsys.readouterr().err
