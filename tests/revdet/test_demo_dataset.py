"""The demo dataset: what its files claim is true, and building it is repeatable and careful."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from revdet import demo_cutouts, demo_dataset

SIZES = {"train": 60, "val": 16}


def read(folder: Path, split: str) -> dict[str, Any]:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def small(folder: Path, **changes: Any) -> Path:
    return demo_dataset.build(folder, **{"train_images": 3, "val_images": 2} | changes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    return demo_dataset.build(folder, train_images=SIZES["train"], val_images=SIZES["val"])


@pytest.mark.parametrize("split", SIZES)
def test_jpegs_have_the_recorded_sizes(dataset: Path, split: str) -> None:
    records = read(dataset, split)["images"]
    assert len(records) == SIZES[split]
    assert {record["file_name"] for record in records} == {
        path.name for path in (dataset / split).iterdir()
    }
    for record in records:
        with Image.open(dataset / split / record["file_name"]) as image:
            image.load()
            assert image.mode == "RGB"
            assert image.size == (record["width"], record["height"])
            assert all(
                demo_dataset.IMAGE_SIDE[0] <= side <= demo_dataset.IMAGE_SIDE[1]
                for side in image.size
            )
    assert len({(record["width"], record["height"]) for record in records}) > 5


@pytest.mark.parametrize("split", SIZES)
def test_segmentations_decode_to_area_and_box(dataset: Path, split: str) -> None:
    content = read(dataset, split)
    images = {record["id"]: record for record in content["images"]}
    taken = {key: np.zeros((r["height"], r["width"]), int) for key, r in images.items()}
    for item in content["annotations"]:
        height, width = taken[item["image_id"]].shape
        shape = item["segmentation"]
        if isinstance(shape, list):
            assert all(len(polygon) >= 8 for polygon in shape)
            shape = rle.merge(rle.frPyObjects(shape, height, width))
        else:
            assert shape["size"] == [height, width]
        mask = rle.decode(shape)
        rows, columns = np.nonzero(mask)
        assert item["area"] == mask.sum() >= demo_dataset.MIN_VISIBLE_PIXELS
        left, top, w, h = item["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + w - 1, top + h - 1) == (columns.max(), rows.max())
        taken[item["image_id"]] += mask
    assert max(mask.max() for mask in taken.values()) == 1, "a pixel shows one object"


@pytest.mark.parametrize("split", SIZES)
def test_the_special_cases_are_there(dataset: Path, split: str) -> None:
    content = read(dataset, split)
    items = content["annotations"]
    numbers = sorted(category["id"] for category in content["categories"])
    assert numbers != list(range(numbers[0], numbers[0] + len(numbers))), "ids have gaps"
    assert {item["category_id"] for item in items} == set(numbers)
    assert [item["id"] for item in items] == list(range(1, len(items) + 1))
    assert {item["image_id"] for item in items} < {image["id"] for image in content["images"]}
    assert any(isinstance(item["segmentation"], list) for item in items)
    assert any(isinstance(item["segmentation"], dict) for item in items if not item["iscrowd"])
    crowds = [item for item in items if item["iscrowd"]]
    assert crowds
    assert all(isinstance(item["segmentation"], dict) for item in crowds)


def test_splits_share_no_background_photograph(dataset: Path) -> None:
    listed = {
        split: {file for file, _ in choices} for split, choices in demo_cutouts.BACKGROUNDS.items()
    }
    assert listed["train"].isdisjoint(listed["val"])
    for split in SIZES:
        used = {image["background"] for image in read(dataset, split)["images"]}
        assert len(used) > 2
        assert used <= listed[split]


def test_cutouts_are_opaque_inside_and_clear_outside() -> None:
    objects = demo_cutouts.cutouts()
    assert set(objects) == set(demo_dataset.CATEGORIES)
    assert len(objects["coin"]) == 24
    for image in (image for images in objects.values() for image in images):
        alpha = np.asarray(image)[..., 3]
        soft = (alpha > 25) & (alpha < 230)
        assert 0.25 < (alpha > 127).mean() < 0.95
        assert soft.mean() < 0.2, "only the edge is half transparent"


def test_outline_is_exact_and_refuses_holes() -> None:
    touching = np.zeros((9, 11), bool)
    touching[1:4, 2:5] = touching[4:8, 5:9] = touching[0, 10] = touching[8, 0] = True
    polygons = demo_dataset.outline(touching)
    assert polygons is not None
    assert len(polygons) == 4, "pieces that touch at a corner stay apart"
    again = rle.decode(rle.merge(rle.frPyObjects(polygons, 9, 11)))
    assert np.array_equal(again, touching)
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    assert demo_dataset.outline(ring) is None


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = small(tmp_path / "a"), small(tmp_path / "b")
    assert contents(first) == contents(second)
    assert contents(small(tmp_path / "c", seed=1)) != contents(first)


def test_an_image_does_not_depend_on_how_many_there_are(dataset: Path, tmp_path: Path) -> None:
    few = small(tmp_path / "few")
    for path in (few / "train").iterdir():
        assert path.read_bytes() == (dataset / "train" / path.name).read_bytes()
    items = read(few, "train")["annotations"]
    assert items == read(dataset, "train")["annotations"][: len(items)]


def test_rebuilds_only_when_asked_or_different(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small(tmp_path / "nested" / "demo")
    before = (folder / "preview.png").stat().st_mtime_ns
    capsys.readouterr()
    assert small(folder) == folder
    assert capsys.readouterr().out.count("\n") == 1
    assert (folder / "preview.png").stat().st_mtime_ns == before
    small(folder, force=True)
    assert (folder / "preview.png").stat().st_mtime_ns > before
    small(folder, val_images=1)
    assert len(read(folder, "val")["images"]) == 1
    (folder / "train" / "000001.jpg").unlink()
    small(folder, val_images=1)
    assert (folder / "train" / "000001.jpg").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["demo"], "no scratch folder is left"


def test_never_touches_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"mine .*another output folder"):
        small(foreign, force=True)
    demo = small(tmp_path / "demo")
    (demo / "train" / "notes.txt").write_text("mine too")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        small(demo, force=True)
    assert (foreign / "thesis.txt").read_text() == "years of work"
    assert (demo / "train" / "notes.txt").read_text() == "mine too"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        demo_dataset.main(["--output", str(foreign)])
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_dataset, "_preview", stop)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "demo")
    assert not any(tmp_path.iterdir())


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    for wrong in ({"seed": -1}, {"train_images": 0}, {"val_images": -3}):
        with pytest.raises(ValueError, match="or more"):
            small(tmp_path / "demo", **wrong)


def test_command_line_says_what_it_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    demo_dataset.main(["--output", str(folder), "--train-images", "2", "--val-images", "1"])
    assert "train: 2 images with" in capsys.readouterr().out
    assert (folder / "preview.png").is_file()
