"""The demo images: what their annotations claim is true, and they hold the special cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from demo import cutouts, detection

SIZES = {"train": 60, "val": 16}


def read(folder: Path, split: str) -> dict[str, Any]:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    return detection.build(folder, train_images=SIZES["train"], val_images=SIZES["val"])


@pytest.mark.parametrize("split", SIZES)
def test_images_and_segmentations_are_as_recorded(dataset: Path, split: str) -> None:
    content = read(dataset, split)
    taken = {}
    for record in content["images"]:
        with Image.open(dataset / split / record["file_name"]) as image:
            image.load()
            assert image.mode == "RGB" and image.size == (record["width"], record["height"])
            taken[record["id"]] = np.zeros((image.height, image.width), int)
    assert len(taken) == SIZES[split] == len(list((dataset / split).iterdir()))
    assert len({mask.shape for mask in taken.values()}) > 5
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
        assert item["area"] == mask.sum() >= detection.MIN_VISIBLE_PIXELS
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


def test_splits_share_no_background_photograph() -> None:
    files = {split: set(names.split()) for split, names in cutouts.BACKGROUNDS.items()}
    assert files["train"].isdisjoint(files["val"])


def test_cutouts_are_opaque_inside_and_clear_outside() -> None:
    objects = cutouts.cutouts()
    assert set(objects) == set(detection.CATEGORIES)
    assert len(objects["coin"]) == 24
    for image in (image for images in objects.values() for image in images):
        alpha = np.asarray(image)[..., 3]
        soft = (alpha > 25) & (alpha < 230)
        assert 0.25 < (alpha > 127).mean() < 0.95
        assert soft.mean() < 0.2, "only the edge is half transparent"


def test_outline_is_exact_and_refuses_holes() -> None:
    touching = np.zeros((9, 11), bool)
    touching[1:4, 2:5] = touching[4:8, 5:9] = touching[0, 10] = touching[8, 0] = True
    polygons = detection.outline(touching)
    assert polygons is not None
    assert len(polygons) == 4, "pieces that touch at a corner stay apart"
    again = rle.decode(rle.merge(rle.frPyObjects(polygons, 9, 11)))
    assert np.array_equal(again, touching)
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    assert detection.outline(ring) is None


def test_an_image_depends_on_its_number_only(dataset: Path, tmp_path: Path) -> None:
    few = detection.build(tmp_path / "few", train_images=3, val_images=2)
    for path in few.glob("*/*.jpg"):
        assert path.read_bytes() == (dataset / path.relative_to(few)).read_bytes()
    items = read(few, "train")["annotations"]
    assert items == read(dataset, "train")["annotations"][: len(items)]
    assert len({path.read_bytes() for path in few.glob("*/*.jpg")}) == 5
