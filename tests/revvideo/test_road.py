"""The tutorial for videos, walked literally on a small set, with a small net."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import revvideo
from revvideo.data.manifest import load_manifest
from tests.revvideo.tiny_set import CLASSES, SHRINK, results

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial_video.md"
# In place of the card and of the released weights, which are for the net as it is.
CARDLESS = (*SHRINK, "model.weights=", "data.num_frames=4", "train.precision=32-true")
BRIEF = ("optim.epochs=1", "optim.warmup_epochs=0", "test.clips=2", "train.checkpoint_every=1")


def commands() -> list[list[str]]:
    """Of the page, without those of the demo, which `make demo` runs."""
    found = re.findall(r"^    (python (?:.*\\\n)*.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    split = [shlex.split(command.replace("\\\n", " ")) for command in found]
    return [words for words in split if "motion" not in " ".join(words)]


def test_the_tutorial(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A second each time.
    monkeypatch.setattr("revvideo.training.results.draw_curves", lambda *_: None)
    monkeypatch.setattr("revvideo.training.module.complexity_table", lambda *_: "")
    shutil.copytree(videos, "mine")
    shutil.copy(videos / "val/bright/00.mp4", "new.mp4")
    steps = commands()
    modules = [words[2] if words[1] == "-m" else words[1] for words in steps]
    run = "revvideo/run.py"
    assert modules == ["revvideo.scan", "revvideo.transcode", run, run, "revvideo/predict.py"]
    for module, words in zip(modules, steps, strict=True):
        given = words[3:] if words[1] == "-m" else words[2:]
        if "--resume" in given:
            given = [*given, "optim.epochs=2"]
        elif module == run:
            recipe = given.index("--config") + 1
            given[recipe] = str(PAGE.parents[1] / given[recipe])
            given += [*CARDLESS, *BRIEF]
        name = module.removesuffix(".py").replace("/", ".")
        assert importlib.import_module(name).main(given) == 0, words

    for split, count in (("train", 18), ("val", 7)):
        assert len(load_manifest(Path(f"mine/manifest_{split}.csv")).records) == count
    assert len([*Path("mine_256").rglob("*.mp4")]) == 25
    assert results(Path("output/mine"))["run"]["steps"] == 8  # 18 videos, 4 at a time, twice
    assert "which were in" not in Path("output/mine/log.txt").read_text()
    (found,) = json.loads(Path("output/new/predictions.json").read_text())
    assert Path("output/new/videos/new.mp4").stat().st_size > 1000
    classes = revvideo.load("output/mine")("new.mp4")
    assert {entry["class"] for entry in classes} == set(CLASSES)
    assert found["path"] == "new.mp4" and "index" not in found
