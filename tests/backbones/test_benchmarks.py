"""The benchmarks run from end to end at small sizes, and their page says what the results say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import backbones
from benchmarks import (
    bench_keep,
    bench_memory,
    bench_rewire,
    bench_speed,
    gpu,
    gpu_report,
    plots,
    report,
)
from benchmarks.contestants import EAGER
from benchmarks.measuring import RESULTS, Trainer, alternate, sharing

CPU = torch.device("cpu")
ALL = EAGER | bench_keep.CONTESTANTS


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plots, "IMAGES", tmp_path / "images")
    return tmp_path / "images"


def test_turns_are_alternated_and_ratios_are_of_one_round() -> None:
    """A machine that becomes slower and slower weighs on both alike."""
    turns: list[str] = []

    def stepper(name: str, seconds: float) -> Callable[[], float]:
        def step() -> float:
            turns.append(name)
            second_of_turn = turns.count(name) % 2 == 0
            return seconds * ((len(turns) + 3) // 4) if second_of_turn else 1e9

        return step

    found = alternate({"a": stepper("a", 100.0), "b": stepper("b", 125.0)}, "a", rounds=5)
    assert turns == ["a", "a", "b", "b"] * 5
    assert found["b"]["throughput"] == pytest.approx(0.8)
    assert found["b"]["quartiles"] == pytest.approx([0.8, 0.8])
    assert found["a"]["seconds"] == 300  # the median of rounds 1 to 5


@pytest.mark.parametrize("name", ALL)
def test_contestants_have_the_gradients_of_stored_activations(name: str) -> None:
    model = backbones.create_model("rev_vit_tiny", num_classes=0, depth=2, img_size=32)
    model = model.double().train()
    trainer = Trainer((2, 3, 32, 32), CPU)
    trainer.x = trainer.x.double()
    params = list(model.parameters())
    gradients = []
    for apply in (ALL["store"], ALL[name]):
        own = sharing(model)
        apply(own)
        assert next(own.parameters()) is params[0]
        gradients.append(torch.autograd.grad(trainer.forward(own), params))
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_gpu_benchmark_rehearsed_and_reported(images: Path) -> None:
    scale = replace(gpu.rehearsal(), sizes=(("tiny", 1), ("tiny", 2)), rounds=2, largest_batch=4)
    parts = [part for part in gpu.PARTS if part != "speed"]  # compiles for a minute
    saved: list[str] = []
    results = gpu.run(scale, parts, 500, lambda found: saved.append(json.dumps(found)))
    assert results["out_of_time"] == results["out_of_memory"] == []
    assert len(saved) == len(parts)
    # The rehearsal says that an image takes 1 MB.
    rows = results["budgets"]["contestants"]["reversible"]
    assert rows["8 GB"]["largest_batch"] == 4 and rows["8 GB"]["images_per_second"] > 0
    facts = {"command": "c", "device_name": "d", "torch": "t", "date": "2000-01-01"}
    page = "\n".join(gpu_report.section({**json.loads(saved[-1]), **facts}))
    assert page.count("Not yet measured") == 1
    assert {path.stem for path in images.iterdir()} >= {"gpu_depth", "gpu_mixture", "gpu_drift"}


def test_the_largest_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    scale = replace(gpu.rehearsal(), largest_batch=10_000)
    for room in (1, 3, 77, 1000, 9_500):
        found = gpu._largest_batch(scale, model, room * 10**6)
        assert 0.95 * room <= found <= room
    assert gpu._largest_batch(scale, model, 20_000 * 10**6) == 10_000
    assert gpu._largest_batch(scale, model, 0) == 0


def test_a_part_that_does_not_fit_the_card(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    def too_large(_: gpu.Scale) -> dict[str, object]:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setitem(gpu.PARTS, "slope", too_large)
    results = gpu.run(gpu.rehearsal(), ["slope", "drift"], 500, lambda _: None)
    assert results["out_of_memory"] == ["slope"] and "drift" in results
    facts = {"command": "c", "device_name": "d", "torch": "t", "date": "2000-01-01"}
    assert "not enough memory" in "\n".join(gpu_report.section({**results, **facts}))


def test_gpu_benchmark_leaves_out_what_there_is_no_time_for() -> None:
    results = gpu.run(gpu.rehearsal(), ["slope", "depth"], 0.0, lambda _: None)
    assert results["out_of_time"] == ["slope", "depth"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: torch finds no GPU")


def test_cpu_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--model", "rev_vit_tiny", "--img-size", "32", "--output", str(tmp_path / "out.json")]
    depths = ["--depths", "1", "2", "--batches", "1", "2"]
    bench_memory.main([*small, *depths, "--depth", "2"])
    found = json.loads((tmp_path / "out.json").read_text())
    held = found["depths"]["held"]
    assert held["reversible"][0] == held["reversible"][1] < held["store"][0] < held["store"][1]

    parts = ["--only", "eager", "overhead"]
    bench_speed.main([*small, "--depth", "4", "--rounds", "2", "--batch", "2", *parts])
    found = json.loads((tmp_path / "out.json").read_text())["eager"]["contestants"]
    stored = {
        values["stored_blocks"]: values["held"] for values in found.values() if "held" in values
    }
    assert list(stored) == [4, 0, 1, 2, 3]
    assert stored[0] < stored[1] < stored[2] < stored[3] < stored[4]

    bench_keep.main([*small, "--depth", "4", "--rounds", "2", "--batch", "2"])
    kept = json.loads((tmp_path / "out.json").read_text())["contestants"]

    def tiny(name: str, **sizes: Any) -> torch.nn.Module:
        return backbones.create_model(name.replace("base", "tiny"), **sizes)

    monkeypatch.setattr(bench_rewire, "create_model", tiny)
    few = ["--first", "2", "--steps", "6", "--seeds", "1", "--crops", "60", "--depth", "1"]
    bench_rewire.main([*few, "--rounds", "2", "--output", str(tmp_path / "out.json")])
    rewired = json.loads((tmp_path / "out.json").read_text())
    assert [step for step, _ in rewired["seeds"][0]["rewired"]] == [0, 1, 2, 3, 4, 5, 6]
    assert rewired["held"]["rewired"] < rewired["held"]["plain"] / 20

    # Counted where they really are: as much as in the simulated step.
    for name, blocks in (("store", 4), ("nothing kept", 0), ("half of the blocks stored", 2)):
        assert stored[blocks] - 4 == kept[name]["held"]  # of which 4 are the loss
    nothing, fc2, mlp, qkv, products = (kept[name]["held"] for name in [*kept][1:6])
    stream = (fc2 - nothing) / 4
    assert (mlp - fc2, qkv - mlp) == (4 * 4 * stream, 4 * 3 * stream)
    assert qkv < products < kept["torch's selective checkpoint, products"]["held"]


def test_the_page_is_made_of_the_results(tmp_path: Path, images: Path) -> None:
    report.main(["--output", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == report.PAGE.read_text()
    for name in ("memory_depth", "mixture", "drift", "recipes"):
        assert (images / f"{name}.png").stat().st_size > 10_000
        assert f"images/{name}.png" in report.PAGE.read_text()
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        assert found["command"].startswith("python -m benchmarks."), path
        assert found["device_name"] and found["torch"] and found["date"], path
