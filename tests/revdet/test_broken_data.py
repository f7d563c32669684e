"""What is broken in a dataset is named and stops the run, or is left out and counted."""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from pycocotools import mask as rle

from revdet.data.annotations import BROKEN, Findings, sound_annotations, sound_images
from tests.revdet.conftest import OwnData

ITERATION = "train.max_iter=1"


def break_everything(own: OwnData) -> dict[str, str]:
    """One of each kind, at another image each; kind -> how its line names it."""
    images = own.content["images"]
    single = [i for i in range(len(images)) if any(not a["iscrowd"] for a in own.of_image(i))]
    names = {}
    missing, cut, hollow, outside, unknown, crowd = (images[i]["file_name"] for i in single[:6])
    (own.images / missing).unlink()
    names["missing_image"] = missing
    (own.images / cut).write_bytes((own.images / cut).read_bytes()[:900])
    names["unreadable_image"] = cut

    annotation = own.of_image(single[2])[0]
    annotation["segmentation"] = [[]]
    names["no_mask"] = f"annotation {annotation['id']} of {hollow}"
    annotation = own.of_image(single[3])[0]
    annotation["bbox"] = [images[single[3]]["width"] + 5, 10, 30, 20]
    names["box_outside_image"] = f"annotation {annotation['id']} of {outside}"
    annotation = own.of_image(single[4])[0]
    annotation["category_id"] = 99
    names["unknown_category"] = f"annotation {annotation['id']} of {unknown}"
    for annotation in own.of_image(single[5]):
        annotation["iscrowd"] = 1
    names["crowd_only_image"] = f"image {images[single[5]]['id']} ({crowd})"
    return names


def test_broken_data_stops_before_the_first_iteration(own, refusal, tmp_path):
    names = break_everything(own)
    output = tmp_path / "run"
    message = refusal(*own.arguments(), f"train.output_dir={output}")
    assert "dataset.skip_broken=true" in message and "1 missing_image" in message
    assert "own_train" in message and "5 places" in message
    log = (output / "log.txt").read_text()
    report = json.loads((output / "dataset" / "report.json").read_text())["own_train"]["lines"]
    for kind, name in names.items():
        assert f"1 {kind}" in log and name in log, kind
        assert len(report[kind]) == 1 and name in report[kind][0]
    assert not (output / "metrics.json").exists() and "Starting training" not in log


def test_broken_data_trains_to_the_end_when_told_to_skip(own, train_net, tmp_path):
    names = break_everything(own)
    images, annotations = len(own.content["images"]), len(own.content["annotations"])
    output = tmp_path / "run"
    arguments = [*own.arguments(), "dataset.skip_broken=true"]
    # Ten iterations of two images: every image has its turn.
    assert train_net(output, *arguments, "train.max_iter=10") == 0
    results = json.loads((output / "results.json").read_text())
    for name in ("own_train", "own_val"):
        facts = results["dataset"][name]
        noted = facts["noted"].pop("crowd_only_image")
        assert noted >= 1 and {kind: 1 for kind in facts["broken"]} == facts["broken"]
        assert facts["broken"].keys() | {"crowd_only_image"} == names.keys()
        assert (facts["left_out_images"], facts["images"]) == (2, images - 2)
        kept = facts["objects"] + facts["crowd_regions"]
        assert facts["left_out_annotations"] == annotations - kept >= 5
    log = (output / "log.txt").read_text()
    assert "left out 2 images" in log
    assert all(f"1 {kind}" in log for kind in names)
    assert results["bbox"]["AP50"] is not None

    # Resuming looks again: what has been repaired meanwhile is back.
    other = own.images / own.content["images"][-1]["file_name"]
    missing = own.images / re.search(r"\d+\.jpg", names["missing_image"])[0]
    with Image.open(other) as image:
        size = next(i for i in own.content["images"] if i["file_name"] == missing.name)
        image.resize((size["width"], size["height"])).save(missing)
    assert train_net(output, *arguments, "train.max_iter=11", "--resume") == 0
    again = json.loads((output / "results.json").read_text())
    assert again["dataset"]["own_train"]["images"] == images - 1
    used = json.loads((output / "dataset" / "own_train.json").read_text())
    assert missing.name in [image["file_name"] for image in used["images"]]


def test_an_image_that_stops_decoding_during_training(own, refusal):
    image = own.images / "000005.jpg"
    image.write_bytes(image.read_bytes()[:800])
    arguments = ["train.check_data=false", "dataloader.train.num_workers=1"]
    assert "000005.jpg" in refusal(*own.arguments(), *arguments)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("categories", None, "no list 'categories'"),
        ("categories", [], "no category"),
        ("categories", [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "one id or one name"),
        ("categories", [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "one id or one name"),
        ("categories", [{"id": "one", "name": "cat"}], "number 'id'"),
        ("categories", [{"id": 1, "name": "\ud800"}], "cannot be printed"),
        ("annotations", [{"segments_info": []}], "panoptic"),
        ("images", 5, "no list 'images'"),
        ("images", [], "no object to learn"),
        ("annotations", [5], "no list 'annotations'"),
        ("annotations", [], "no object to learn"),
    ],
)
def test_annotations_that_mean_nothing(own, refusal, key, value, words):
    own.content[key] = value
    assert words in refusal(*own.arguments(), "dataset.skip_broken=true")


def test_a_registered_dataset_can_be_skipped_through_and_stays_as_it_is(own, train_net, tmp_path):
    break_everything(own)
    own.arguments()
    register_coco_instances("mended", {"thing_colors": [(1, 2, 3)]}, str(own.json), own.images)
    arguments = [f"dataloader.{split}.dataset.names=mended" for split in ("train", "test")]
    known = MetadataCatalog.get("mended").as_dict()
    try:
        assert train_net(tmp_path / "a", *arguments, "dataset.skip_broken=true", ITERATION) == 0
        used = json.loads((tmp_path / "a" / "dataset" / "mended.json").read_text())
        assert len(used["images"]) == 14
        assert MetadataCatalog.get("mended").as_dict() == known
        (ours,) = (name for name in MetadataCatalog.list() if name.startswith("mended ("))
        assert MetadataCatalog.get(ours).thing_colors == [(1, 2, 3)]
        assert "names: mended" in (tmp_path / "a" / "config.yaml").read_text()
        assert "mended" in json.loads((tmp_path / "a" / "results.json").read_text())["dataset"]
        assert train_net(tmp_path / "b", *arguments, ITERATION) == 2
        assert not (tmp_path / "b" / "dataset" / "mended.json").exists()
    finally:
        DatasetCatalog.remove("mended")
        MetadataCatalog.remove("mended")


IMAGE = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}
SQUARE = [[5.0, 5.0, 15.0, 5.0, 15.0, 15.0, 5.0, 15.0]]
GOOD = {"id": 7, "image_id": 1, "category_id": 2, "bbox": [5, 5, 10, 10], "segmentation": SQUARE}
MASK = np.zeros((30, 40), np.uint8, order="F")
MASK[5:15, 5:15] = 1


def compressed(mask: np.ndarray) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("incomplete_annotation", {"image_id": None}),
        ("incomplete_annotation", {"id": "seven"}),
        ("incomplete_annotation", {"id": 10**400}),
        ("", {"id": "9", "image_id": 1.0, "category_id": "2"}),
        ("", {"id": -3}),
        ("bad_iscrowd", {"iscrowd": "yes"}),
        *(("", {"iscrowd": nothing}) for nothing in (None, False, "0", 0.0)),
        ("relative_box", {"bbox": [0.25, 0.25, 0.5, 0.5]}),
        ("", {"bbox": ["5", "5", "10", "10"]}),
        *(("", {"area": area}) for area in (-1, None, float("nan"), 10**400)),
        ("incomplete_annotation", {"category_id": 2.5}),
        ("repeated_annotation", {"id": 1}),
        ("unknown_image", {"image_id": 3}),
        ("unknown_category", {"category_id": 3}),
        ("ignored_annotation", {"ignore": 1}),
        ("bad_box", {"bbox": []}),
        ("bad_box", {"bbox": None}),
        ("bad_box", {"bbox": [1, 2, 3]}),
        ("bad_box", {"bbox": [1, 2, float("nan"), 4]}),
        ("bad_box", {"bbox": [20, 20, -5, 5]}),
        ("box_outside_image", {"bbox": [50, 5, 10, 10]}),
        ("box_outside_image", {"bbox": [-20, -20, 10, 10]}),
        ("box_outside_image", {"bbox": [-6, 5, 10, 10]}),
        ("clipped_box", {"bbox": [-4, 5, 10, 10]}),
        ("", {"bbox": [-1, 5, 10, 10]}),
        ("empty_box", {"bbox": [5, 5, 10, 0]}),
        *(("no_mask", {"segmentation": nothing}) for nothing in (None, [], [[]], [None], {})),
        ("bad_polygon", {"segmentation": [[5, 5, 9, 9]]}),
        ("bad_polygon", {"segmentation": [["a"] * 6]}),
        ("bad_polygon", {"segmentation": [[*SQUARE[0][:-1], float("inf")]]}),
        ("bad_polygon", {"segmentation": [[*SQUARE[0][:-1], 1e300]]}),
        ("polygon_far_outside", {"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}),
        ("mask_outside_image", {"segmentation": [[50, 5, 60, 5, 60, 9]]}),
        ("", {"segmentation": SQUARE[0]}),
        ("bad_rle", {"segmentation": {"size": [30, 40]}}),
        ("bad_rle", {"segmentation": {"size": [30, 40], "counts": "zzzz\x01"}}),
        ("bad_rle", {"segmentation": {"size": [30, 40], "counts": "P" * 9 + "0"}}),
        ("bad_rle", {"segmentation": {"size": [30, 40], "counts": [1300, -110, 10]}}),
        ("wrong_rle_length", {"segmentation": {"size": [30, 40], "counts": "d0"}}),
        ("wrong_rle_length", {"segmentation": {**compressed(MASK[:, :30]), "size": [30, 40]}}),
        ("empty_mask", {"segmentation": {"size": [30, 40], "counts": [1200]}}),
        ("wrong_rle_length", {"segmentation": {"size": [30, 40], "counts": [5, 5]}}),
        ("mask_of_other_size", {"segmentation": compressed(MASK[:, :30])}),
        ("empty_mask", {"segmentation": compressed(0 * MASK)}),
        ("empty_box", {"bbox": [5, 5, 0, 5], "segmentation": [[5.0, 5, 5, 7, 5, 9]]}),
        ("", {"segmentation": compressed(MASK)}),
        ("", {"segmentation": {"size": [30, 40], "counts": [600.0, 10.0, 590.0]}}),
        ("", {"segmentation": [[1, 2], *SQUARE]}),
        ("", {}),
    ],
)
def test_kinds_of_broken_annotations(kind, change):
    annotations = [{**GOOD, "id": 1}, {**GOOD, **change}]
    content = {"images": [IMAGE], "annotations": annotations, "categories": [{"id": 2}]}
    findings: Findings = defaultdict(list)
    kept = sound_annotations(content, [IMAGE], findings, masks=True)
    assert {name: len(lines) for name, lines in findings.items()} == ({kind: 1} if kind else {})
    assert len(kept) == 1 + (kind not in BROKEN)
    for annotation in kept:
        assert annotation["iscrowd"] == 0 and 1 <= annotation["id"] <= 9
        assert change.get("bbox") or annotation["area"] == pytest.approx(100, abs=91)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("incomplete_image", {"id": None}),
        ("incomplete_image", {"width": 0}),
        ("incomplete_image", {"file_name": 5}),
        ("incomplete_image", {"id": 10**400}),
        ("line_image", {"id": 2, "width": 4000}),
        ("repeated_image", {"id": "1"}),
    ],
)
def test_kinds_of_broken_images(kind, change):
    findings: Findings = defaultdict(list)
    assert sound_images([IMAGE, {**copy.deepcopy(IMAGE), **change}], findings) == [IMAGE]
    assert list(findings) == [kind]


def test_masks_are_stored_in_one_form():
    """Compressed or not, a mask comes back as it is, with any number of runs."""
    generator = np.random.default_rng(0)
    for density in (0.001, 0.1, 0.5, 0.999):
        mask = np.asfortranarray(generator.random((30, 40)) < density, np.uint8)
        packed = compressed(mask)
        flat = mask.flatten(order="F")
        edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
        runs = np.diff(edges, prepend=0).tolist()
        for counts in (packed["counts"], runs):
            given = {**GOOD, "segmentation": {"size": [30, 40], "counts": counts}}
            content = {"images": [IMAGE], "annotations": [given], "categories": [{"id": 2}]}
            (kept,) = sound_annotations(content, [IMAGE], defaultdict(list), masks=True)
            assert kept["segmentation"] == packed and kept["area"] == mask.sum()


def test_image_files_that_do_not_fit(own, refusal):
    size, empty, deep = (own.images / image["file_name"] for image in own.content["images"][:3])
    with Image.open(size) as image:
        image.resize((50, 50)).save(size)
    empty.write_bytes(b"")
    with Image.open(deep) as image:  # Pillow would make it white
        pixels = np.full(image.size[::-1], 3000, np.uint16)
    Image.fromarray(pixels).save(deep, format="png")
    assert "(2 unreadable_image, 1 wrong_image_size)" in refusal(*own.arguments())
