"""``python -m backbones memory``: its table, its picture, what it measures, its errors."""

from __future__ import annotations

import re
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from backbones import RevViT
from backbones.__main__ import main
from backbones.commands import memory
from backbones.commands.memory_plot import frontier
from backbones.memory.budget import parse_budget
from backbones.registry import MODELS, ModelRecord
from tests.backbones.helpers import Capture, refused

# Each step of the small model is counted once for all tests.
simulate = cache(memory._simulate)


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_simulate", simulate)
    arguments = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8, "num_classes": 10}
    monkeypatch.setitem(MODELS, "small", ModelRecord(RevViT, arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # measures nothing unasked


def table(output: str) -> dict[str, list[str]]:
    """The rows of the table by their label, and the policies under ``""``."""
    lines = takewhile(bool, output.splitlines()[2:])
    return {line[:16].strip(): re.findall(r"\S+(?: [KMG]B)?", line[16:]) for line in lines}


def run(capsys: Capture, *arguments: str) -> tuple[dict[str, list[str]], str]:
    main(["memory", "--model", "small", "--input", "16x3x64x64", *arguments])
    output = capsys.readouterr().out
    return table(output), output


def test_a_table_whose_parts_add_up(capsys: Capture) -> None:
    rows, output = run(capsys, "--budget", "11MB")
    assert rows.pop("") == ["store", "checkpoint", "reversible", "fitted"]
    assert re.search(r"set_memory\(model, 'reversible', \d, keep=.+\)", output)
    assert "speed, measured" not in rows and "not measured, because no GPU is here" in output

    below = {label: rows.pop(label) for label in ("total", "held", "speed, counted")}
    assert list(rows) == [
        *("parameters", "gradients", "optimizer state", "input"),
        *("stem", "stage 1", "head", "working set"),
    ]
    totals = [parse_budget(cell) for cell in below["total"]]
    for column, total in enumerate(totals):
        parts = [float(cells[column].split()[0]) for cells in rows.values()]
        units = [{"KB": 1e3, "MB": 1e6}[cells[column].split()[1]] for cells in rows.values()]
        together = sum(part * unit for part, unit in zip(parts, units, strict=True))
        assert together == pytest.approx(total, abs=0.5e6)  # each is rounded
    store, _, reversible, chosen = totals
    assert store > 11e6 >= chosen > reversible
    speeds = [float(cell) for cell in below["speed, counted"]]
    assert speeds[0] == 1.0 >= speeds[3] > speeds[2] >= 0.75


def test_autocast_takes_less(capsys: Capture) -> None:
    held = []
    for arguments, precision in (((), "float32"), (("--amp", "float16"), "float16 autocast")):
        rows, output = run(capsys, *arguments)
        held.append(parse_budget(rows["held"][0]))
        assert f"64x64, {precision}: peak" in output
    assert held[1] < 0.75 * held[0]


def test_a_picture(capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    run(capsys, "--budget", "11MB", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    # What fit_memory chooses from is never behind whole blocks, nor behind checkpointing.
    curves = frontier(memory._simulate("small", (16, 3, 64, 64), torch.device("cuda"), None))
    best = curves.pop("products kept")
    assert best == sorted(best) and len(best) > 5
    assert [len(points) for points in curves.values()] == [4, 1, 1, 1]
    for size, speed in (p for name in ("whole blocks stored", "store") for p in curves[name]):
        affordable = [fast for bytes_, fast in best if bytes_ <= size * 1.02]
        assert max(affordable) >= speed - 0.03


def test_the_speed_is_measured_on_request(capsys: Capture) -> None:
    rows, output = run(capsys, "--device", "cpu", "--budget", "11MB", "--measure")
    assert rows["speed, measured"][0] == "1.00" and len(rows["speed, measured"]) == 4
    assert all(float(cell) > 0 for cell in rows["speed, measured"])
    assert "batch 16, median of 5 rounds" in output


def test_the_speed_where_store_has_room(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = ("--device", "cpu", "--measure", "--input")
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 10_000_000)
    assert "batch 8, median" in run(capsys, *on_cpu, "16x3x64x64")[1]
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 1_000_000)
    assert "no room for one sample" in run(capsys, *on_cpu, "2x3x64x64")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("rev_vit_tiny --input 8x3x224", "give BxCxHxW"),
        ("rev_vit_tiny --input 99999999999x3x22400x22400", "give BxCxHxW"),
        ("rev_vit_tiny --input 8x3x0x224", "give BxCxHxW"),
        ("rev_vit_tinny --input 8x3x224x224", "did you mean"),
        ("rev_vit_tiny --input 8x4x224x224", "expected images"),
        ("small --input 2x3x64x64 --budget 1MB", "smallest"),
        ("small --input 1x3x32x32 --measure", "--device cpu"),
        ("small --input 1x3x32x32 --plot no/m.png", "no such folder"),
        ("small --input 1x3x32x32 --plot memory", "should end in .png"),
    ],
)
def test_what_is_refused(arguments: str, message: str, capsys: Capture) -> None:
    assert message in refused(["memory", "--model", *arguments.split()], capsys)
