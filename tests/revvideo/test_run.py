"""The road from a recipe to results, through the command that users type."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import backbones
from revvideo.data.clips import ClipDataset
from revvideo.run import main
from revvideo.scan import main as scan
from revvideo.training import module
from revvideo.training.module import VideoModule
from tests.revvideo.tiny_set import (
    GOLDEN,
    GOLDEN_MODEL,
    RANDOM,
    arguments,
    build_set,
    losses,
    predictions,
    results,
    spoil,
    write_video,
)


def test_a_run_leaves_its_results_and_tests_the_same_again(videos, tmp_path, capfd, opened):
    output = tmp_path / "run"
    assert main(arguments(videos, output, "test.clips=2")) == 0
    first = results(output)
    assert first["test"].keys() == {*("top1", "top5", "videos", "of", "what", "clips", "crops")}
    assert (first["test"]["videos"], first["test"]["of"]) == (7, 7)
    assert first["run"]["steps"] == 8 and first["run"]["memory"] == "reversible"
    assert 0 <= first["run"]["data_wait"] <= 1
    for name in ("curves.png", "config.yaml", "log.txt", "metrics.csv", "checkpoints/last.ckpt"):
        assert (output / name).stat().st_size > 0
    assert list(output.glob("tensorboard/events.out.tfevents.*"))
    assert not list(output.rglob("*.partial"))
    assert sorted(losses(output)) == list(range(8))
    log = (output / "log.txt").read_text()
    assert "top-1, " in log and "on 7 of 7 videos" in log and "waiting for data" in log
    # Nobody reads past warnings that they cannot act on.
    err = capfd.readouterr().err
    assert "warn" not in err.lower() and "deprecat" not in err.lower(), err
    rows = predictions(output)
    for row in rows:  # of the mean over the views of a video
        assert sum(float(row[f"score{k}"]) for k in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    correct = sum(row["class"] == row["top1"] for row in rows)
    assert first["test"]["top1"] == pytest.approx(100 * correct / 7)

    # The config that a run saves is a recipe itself.
    recipe = str(output / "config.yaml")
    opened.reset_mock()
    assert main(["--config", recipe, "--eval-only", "train.memory_budget=1KB"]) == 0
    assert opened.call_count == 1
    again = results(output)
    assert again["test"] == first["test"] and again["run"] == first["run"]
    (output / "results.json").write_text("{")
    assert main(["--config", recipe, "--eval-only"]) == 0
    assert results(output)["test"] == first["test"]
    assert (output / "results.json.damaged").read_text() == "{"
    assert sorted(losses(output)) == list(range(8))


@pytest.mark.parametrize(
    ("more", "change", "tolerance"),
    [
        (RANDOM, "train.memory=store", 1e-4),
        (RANDOM, "train.memory_keep=[g.mlp.fc2,f.*]", 1e-4),
        (RANDOM, "train.memory_slices=2", 1e-4),
        ([], "optim.accumulate=4", 1e-3),
        ([], "train.precision=bf16-mixed", 0.05),
    ],
    ids=["policy", "keep", "slices", "parts", "half precision"],
)
def test_what_saves_memory_does_not_change_the_losses(run, tmp_path, more, change, tolerance):
    more = [*more, "optim.clip_grad_norm=0.1", "optim.max_steps=5"]
    assert run(tmp_path / "one", *more) == 0 and run(tmp_path / "two", change, *more) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(one) == list(range(5)) and two == pytest.approx(one, rel=tolerance)
    assert one != two or change.startswith("train.memory")
    kept = results(tmp_path / "two")["run"]["memory_keep"]
    assert kept == (["g.mlp.fc2", "f.*"] if "keep" in change else [])


def test_a_budget_chooses_the_memory_policy(run, tmp_path, monkeypatch):
    asked = []

    def fit(model: torch.nn.Module, example: torch.Tensor, *rest: object) -> SimpleNamespace:
        """In the place of the real one, which takes seconds and has tests of its own."""
        asked.append((tuple(example.shape), *rest))
        return SimpleNamespace(policy="reversible", stored_blocks=3, keep="products", slices=2)

    monkeypatch.setattr(backbones, "fit_memory", fit)
    more = ["train.memory_budget=1GB", "train.precision=bf16-mixed", "augment.repeats=2"]
    more += ["optim.accumulate=2", "optim.max_steps=1"]
    assert run(tmp_path, *more) == 0
    assert asked == [((4, 3, 4, 32, 32), "1GB", torch.bfloat16)]
    found = results(tmp_path)["run"]
    assert (found["stored_blocks"], found["memory_keep"]) == (3, ["products"])
    assert found["memory_slices"] == 2
    assert "stored_blocks=3" in (tmp_path / "log.txt").read_text()


def test_a_loss_that_is_no_number_ends_the_run_and_spoils_no_checkpoint(run, tmp_path, capfd):
    assert run(tmp_path, "optim.lr=1e30", "train.checkpoint_every=1") == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the loss is nan at step") and "optim.lr" in error
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_out_of_memory_is_one_line(run, tmp_path, monkeypatch, capfd):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(VideoModule, "training_step", full)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path)
    assert caught.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: CUDA out of memory: ") and "train.memory_budget=auto" in error


def test_the_golden_checkpoint_gives_its_scores(run, tmp_path, monkeypatch):
    expected = torch.load(GOLDEN.with_suffix(".expected.pt"), weights_only=True)

    def golden_clip(self: ClipDataset, key: tuple[int, int]) -> dict:
        """In the place of decoded ones: the clips of the golden data are no videos."""
        index, _ = key
        video = expected["input"][index].expand(2, -1, -1, -1, -1)
        sample = {"video": video, "erased": [], "label": 0, "index": index}
        return {**sample, "path": str(index), "problem": ""}

    monkeypatch.setattr(ClipDataset, "__getitem__", golden_clip)
    output, listed = tmp_path / "out", tmp_path / "list.txt"
    listed.write_text("val/bright/00.mp4 0\nval/dark/01.mp4 0\n")
    more = ["--eval-only", f"model.weights={GOLDEN}", "data.layout=list"]
    assert run(output, *more, f"data.annotations={listed}", *GOLDEN_MODEL, "test.clips=2") == 0
    for row, scores in zip(predictions(output), expected["eval_output"].tolist(), strict=True):
        found = {int(row[f"top{rank}"]): float(row[f"score{rank}"]) for rank in range(1, 6)}
        assert found == pytest.approx(dict(enumerate(scores)), abs=1e-5)
    assert results(output)["test"]["videos"] == 2


def test_a_batch_without_any_readable_video_is_passed_over(run, videos, tmp_path, monkeypatch):
    root = shutil.copytree(videos, tmp_path / "set")
    assert scan(["--split", "train", "val", "--", str(root)]) == 0
    broken = sorted(root.glob("train/*/*.mp4"))[:12]
    for path in broken:
        spoil(path)
    more = ["optim.batch_size=1", "optim.epochs=1", "test.batch_size=1", "augment.repeats=2"]
    more.append("augment.erase=1")
    seen = Mock(wraps=module.normalised)
    monkeypatch.setattr(module, "normalised", seen)
    spoil(root / "val" / "striped" / "02.mp4")
    assert run(tmp_path / "out", *more, root=root) == 0
    found = results(tmp_path / "out")
    assert (tmp_path / "out" / "manifest_train.csv").is_file()  # what the scan has found
    names = {str(path.relative_to(root)) for path in broken} | {"val/striped/02.mp4"}
    assert found["left_out"].keys() == names
    assert (found["test"]["videos"], found["test"]["of"]) == (6, 7)
    # In training both clips of a video are erased, where there is one.
    trained = [call.args[2] for call in seen.call_args_list if len(call.args) > 2]
    assert sorted(map(len, trained)) == 12 * [0] + 6 * [2]
    zero = [step for step, loss in losses(tmp_path / "out").items() if loss == 0]
    assert len(losses(tmp_path / "out")) == 18 and len(zero) == 12
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(name in log for name in names)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["data.root=nowhere"], ["data.root=nowhere", "no such folder"]),
        (["data.root="], ["data.root=", "not set"]),
        (["data.root=nowhere", "model.arguments.dept=3"], ["'dept'; did you mean depth"]),
        (["train.output_dir="], ["train.output_dir= cannot be made", "another folder"]),
        (["data.val_split=tset"], ["tset"]),
        (["optim.batch_size=6", "optim.accumulate=4"], ["optim.batch_size=6", "use 8"]),
        (["optim.batch_size=32"], ["18 readable", "optim.batch_size"]),
        (["optim.accumulate=4", "augment.mixup=1"], ["one video at a time", "augment.mixup=0"]),
        (["model.num_classes=4"], ["3 classes (bright, dark, striped)", "model.num_classes=3"]),
        (["model.name=rev_mvit"], ["rev_mvit_base"]),
        (["model.name=mvit_base_16x4"], ["no reversible blocks", "checkpoint"]),
        (["model.weights=nowhere.pyth"], ["nowhere.pyth"]),
        (["--eval-only"], ["holds no checkpoint", "model.weights"]),
        (["train.memory_budget=lots"], ["train.memory_budget=lots", "12GB"]),
        (["train.memory_budget=auto"], ["train.memory_budget=auto", "needs a GPU"]),
        (["train.memory_keep=[g.mlp.fc3]"], ["'g.mlp.fc3'", "mean g.mlp.fc"]),
        (["train.memory_budget=1GB", "train.memory_keep=[f.*]"], ["train.memory_keep", "one of"]),
        (["train.sede=3"], ["train.sede", "train.seed"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(run, tmp_path, capfd, more, parts):
    assert run(tmp_path / "out", *more) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert all(part in errors[0] for part in parts), errors[0]


def test_a_run_is_neither_overwritten_nor_resumed_from_a_damaged_checkpoint(run, tmp_path, capfd):
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.write_bytes(b"half a checkpoint")
    assert run(tmp_path) == 2
    assert "add --resume" in capfd.readouterr().err
    assert run(tmp_path, "--resume") == 2
    error = capfd.readouterr().err
    assert f"{last} is no checkpoint, or a damaged one" in error and "move it away" in error
    assert run(tmp_path, "--eval-only") == 2
    assert str(last) in capfd.readouterr().err


@pytest.mark.parametrize("script", ["run.py", "predict.py", "scan.py"])
def test_a_command_that_is_run_by_its_path_hides_no_module(script, monkeypatch):
    folder = str(Path("revvideo").resolve())
    monkeypatch.setattr(sys, "path", [folder, *sys.path])  # as Python does
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(f"revvideo/{script}", run_name="__main__")
    assert folder not in sys.path


def test_fine_tuning_starts_from_a_run_and_other_classes_get_a_new_head(run, tmp_path, capfd):
    assert run(tmp_path / "first", "optim.epochs=1") == 0
    other = build_set(tmp_path / "other", train=8, val=2)
    for split in ("train", "val"):
        write_video(other / split / "more" / "0.mp4", "dark", seed=1)
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    more = [f"model.weights={last}", "optim.layer_decay=0.7", "optim.epochs=1"]
    assert run(tmp_path / "second", *more, root=other) == 0
    log = capfd.readouterr().err
    assert "left out head.weight, head.bias: 3 classes, the model has 4" in log
    assert results(tmp_path / "second")["test"]["of"] == 3
    # A run whose config names weights is tested with its own.
    assert run(tmp_path / "second", "--eval-only", root=other) == 0
