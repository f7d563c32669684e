"""The tutorial's commands as it has them, label files of other tools, and a trained detector from
Python."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import revdet
from backbones.common.errors import UserError
from backbones.common.videos import h264_writer
from revdet.convert import main as convert
from revdet.export import main as export
from tests.revdet.conftest import SMALL, error_of

ROOT = Path(__file__).resolve().parents[2]
BRIEF = ["train.max_iter=2", "train.epochs=0", "train.pictures=1", "dataloader.train.num_workers=0"]


@pytest.fixture(scope="module")
def mine(datasets_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a reader's own: pictures of the demo, labels as YOLO writes them, a video."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(ROOT / "configs")
    demo = datasets_root / "demo"
    content = json.loads((demo / "annotations/instances_train.json").read_text())
    names = {c["id"]: number for number, c in enumerate(content["categories"])}
    photos, labels = folder / "mine/photos", folder / "mine/labels"
    photos.mkdir(parents=True)
    labels.mkdir()
    (labels / "classes.txt").write_text("\n".join(c["name"] for c in content["categories"]))
    for image in content["images"][:10]:
        stem = Path(image["file_name"]).stem
        (photos / f"{stem}.jpg").write_bytes((demo / "train" / image["file_name"]).read_bytes())
        lines = []
        for thing in content["annotations"]:
            if thing["image_id"] != image["id"] or thing["iscrowd"]:
                continue
            x, y, w, h = thing["bbox"]
            points = [x, y, x + w, y, x + w, y + h, x, y + h]  # of a polygon
            sides = image["width"], image["height"]
            corners = [point / sides[i % 2] for i, point in enumerate(points)]
            lines.append(" ".join(map(str, [names[thing["category_id"]], *corners])))
        (labels / f"{stem}.txt").write_text("\n".join(lines))
    frames = np.random.default_rng(0).integers(0, 255, (4, 96, 128, 3), dtype=np.uint8)
    with h264_writer(folder / "mine/clip.mp4", Fraction(1, 10), {}) as write:
        for number, frame in enumerate(frames):
            write(frame, number)
    return folder


def commands(text: str) -> list[list[str]]:
    """Of the page, without the one that needs a card and a download."""
    found = re.findall(r"^    (python (?:.*\\\n)*.*)$", text, re.MULTILINE)
    split = [shlex.split(command.replace("\\\n", " ")) for command in found]
    return [words for words in split if not any("configs/detection/finetune" in w for w in words)]


def test_the_tutorial(mine, monkeypatch):
    monkeypatch.chdir(mine)
    monkeypatch.setattr("revdet.training.results.draw_curves", lambda *_: None)  # takes its time
    text = (ROOT / "docs/tutorial_detection.md").read_text(encoding="utf-8")
    steps = commands(text)
    assert [words[1:3][-1] for words in steps[:1]] == ["revdet.convert"] and len(steps) == 4
    for words in steps:
        more = [*SMALL, *BRIEF] if words[1] == "revdet/train_net.py" else []
        if "--resume" in words:
            more = ["train.max_iter=3"]
        name, *given = words[2:] if words[1] == "-m" else words[1:]
        script = ROOT / f"{name.removesuffix('.py').replace('.', '/')}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *given, *more])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        assert end.value.code == 0, words
    content = json.loads((mine / "mine/objects.json").read_text())
    assert len(content["images"]) == 10 and any("segmentation" in a for a in content["annotations"])
    split = [json.loads(p.read_text()) for p in sorted((mine / "output/mine/dataset").glob("sp*"))]
    assert [len(part["images"]) for part in split] == [8, 2]
    assert {i["id"] for i in split[0]["images"]}.isdisjoint(i["id"] for i in split[1]["images"])
    assert (mine / "output/found/videos/clip.mp4").stat().st_size > 1000

    shutil.copy(next((mine / "mine/photos").glob("*.jpg")), mine / "mine/photos/0001.jpg")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(compile(code, "page", "exec"), {})

    detector = revdet.load(mine / "output/mine", device="cpu", threshold=0.0)
    path = next((mine / "mine/photos").glob("*.jpg"))
    found = detector(path)
    again = detector(np.array(Image.open(path).convert("RGB")))
    assert len(found) and torch.equal(found.scores, again.scores)
    assert set(found.names) <= set(detector.classes) == {c["name"] for c in content["categories"]}
    with pytest.raises(UserError, match=r"uint8 \(H, W, 3\), got float64"):
        detector(np.zeros((4, 4, 3)))
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read"):
        detector("gone.jpg")

    graph = mine / "trunk.pt2"
    assert export([str(mine / "output/mine"), "--to", str(graph), "--size", "64", "96"]) == 0
    backbone, images = detector.model.backbone, torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        maps = torch.export.load(str(graph)).module()(images)
        for made, own in zip(maps, backbone(images).values(), strict=True):
            torch.testing.assert_close(made, own)


VOC = """<annotation><object><name> cat </name><bndbox><xmin>3</xmin><ymin>5</ymin><xmax>12</xmax>
<ymax>10</ymax></bndbox></object></annotation>"""
SHAPES = [
    {"label": "dog", "shape_type": "polygon", "points": [[0, 0], [10, 0], [10, 4]]},
    {"label": "cat", "shape_type": "rectangle", "points": [[9, 8], [1, 2]]},
]


def test_label_files_of_other_tools(tmp_path, capsys):
    for name in ("a.png", "b.png", "c.png", "e.png", "alone.png"):
        Image.new("RGB", (20, 16)).save(tmp_path / name)
    (tmp_path / "a.xml").write_text(VOC)
    (tmp_path / "b.json").write_text(json.dumps({"shapes": SHAPES}))
    (tmp_path / "c.xml").write_text(VOC[:40])
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / "e.txt").write_text("0 0.5 0.5 0.5 0.25\n")
    (tmp_path / "classes.txt").write_text("dog\n")
    assert not convert([str(tmp_path), str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    boxes = [(a["category_id"], a["bbox"], a["area"]) for a in content["annotations"]]
    assert boxes[:3] == [(1, [2, 4, 10, 6], 60), (2, [0, 0, 10, 4], 20), (1, [1, 2, 8, 6], 48)]
    assert content["annotations"][3]["bbox"] == [5, 6, 10, 4]
    error = capsys.readouterr().err
    assert "3 unreadable" in error and "alone.png: has no label file" in error
    assert re.search("c.xml: .*ParseError|c.xml: ", error) and "d.json: no image of this" in error


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("a.txt", "-1 0.5 0.5 0.5 0.25", "class -1 is none of the 1 that have names"),
        ("a.txt", "1 0.5 0.5 0.5 0.25", "class 1 is none"),
        ("a.txt", "0 10 8 5 4", "far outside of 20 x 16 pixels (YOLO's numbers are fractions"),
        ("a.txt", "0 nan 0.5 0.5 0.25", "reaches to nan"),
        ("a.xml", VOC.replace(" cat ", ""), "an object has no name"),
        ("a.json", '{"images": []}', "it has no shapes"),
    ],
)
def test_labels_that_would_become_something_else(tmp_path, capsys, file, content, why):
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    (tmp_path / "classes.txt").write_text("dog\n")
    (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit, match="2"):
        convert([str(tmp_path), str(tmp_path / "out.json")])
    assert f"{tmp_path / file}: " in (error := capsys.readouterr().err) and why in error


def test_names_of_yolo(tmp_path, capsys):
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("1.0 0.5 0.5 0.5 0.25\n")
    (tmp_path / "a.xml").write_text(VOC)
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog}\n")
    assert not convert([str(tmp_path), str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["dog"] and len(content["images"]) == 1
    assert "a.xml: a.png has another label file, a.txt" in capsys.readouterr().err
    for text, why in (
        ("nc: 2", "has no names of classes"),
        ("names: [a]\nkpt_shape: [2]", "key p"),
    ):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            convert([str(tmp_path), str(tmp_path / "out.json")])
        assert why in error_of(capsys)


def test_what_cannot_be_converted_or_split(train_net, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        convert([str(tmp_path), str(tmp_path / "out.json")])
    assert "holds no label file" in error_of(capsys)
    assert train_net(tmp_path / "run", "dataset.val_fraction=0.2") == 2
    assert "dataset.val_fraction=0.2 splits dataset.train_json" in error_of(capsys)
