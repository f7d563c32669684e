"""Any COCO-format dataset from the command line, whole or broken."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from iopath.common.file_io import g_pathmgr
from PIL import Image
from pycocotools import mask as rle

from revdet.config import load_config
from revdet.data.annotations import BROKEN, Findings, sound_annotations, sound_images
from revdet.data.classes import categories_of, class_counts, fit_recipe
from revdet.data.datasets import (
    NOT_FACTS,
    dataset_names,
    name_own_data,
    register_datasets,
    sources,
)
from revdet.data.normalise import normalise, use_normalised
from tests.revdet.conftest import DEMO, FEW, error_of, own_files

ITERATION = "train.max_iter=1"


class OwnData:
    """A copy of the small dataset under names of its own, to change and to train on."""

    def __init__(self, source: Path, root: Path) -> None:
        shutil.copytree(source / "train", root / "photos")
        self.images = root / "photos"
        self.json = root / "mine.json"
        self.content = json.loads((source / "annotations" / "instances_train.json").read_text())

    def arguments(self) -> list[str]:
        """Write the annotations; the dataset on the command line."""
        self.json.write_text(json.dumps(self.content))
        return own_files(self.json, self.images)

    def of_image(self, index: int) -> list[dict[str, Any]]:
        """The annotations of an image, given by its place in the list."""
        image_id = self.content["images"][index]["id"]
        return [a for a in self.content["annotations"] if a["image_id"] == image_id]


@pytest.fixture
def own(datasets_root: Path, tmp_path: Path) -> OwnData:
    return OwnData(datasets_root / "demo", tmp_path)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def test_the_length_of_a_run_in_epochs(own, train_net, tmp_path, refusal):
    assert "both given" in refusal("train.epochs=1", ITERATION)
    length = ["train.epochs=0.25", "train.warmup_iters=1", *FEW]
    assert train_net(tmp_path / "run", *own.arguments(), *length) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["run"]["iterations"] == 2  # of 2 images, a quarter of 16
    saved = load_config(str(tmp_path / "run" / "config.yaml"))
    assert saved.train.epochs == 0.25
    rates = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").open()]
    assert [line["lr"] for line in rates if "lr" in line][-1] > 1e-5  # after one of warm-up
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "on cpu (no GPU), 1 processes" in log and "0.25 epochs of 16" in log
    recipe = "configs/detection/finetune/mask_rcnn_vit_base_zoo.py"
    assert load_config(recipe).train.epochs == 50
    assert load_config(recipe, [ITERATION]).train.epochs == 0


def test_own_data_may_lie_behind_a_prefix_of_iopath(own, monkeypatch, refusal):
    known = {"lab://own.json": own.json, "lab://images": own.images}
    monkeypatch.setattr(g_pathmgr, "get_local_path", lambda path: str(known.get(path, path)))
    arguments = [f"dataset.{s}_json=lab://own.json" for s in ("train", "val")]
    arguments += [f"dataset.{s}_images=lab://images" for s in ("train", "val")]
    cfg = load_config(DEMO, arguments)
    name_own_data(cfg)
    assert sources(cfg)["own_train"] == (Path(own.json), Path(own.images))
    error = refusal(*arguments, "dataset.train_json=s4://own.json")
    assert "dataset.train_json=s4://own.json: iopath has no handler for s4://" in error


def test_own_data_trains_without_code(own, train_net, tmp_path):
    # Other classes than the recipe's, with ids in another order than in the file.
    for category in own.content["categories"]:
        category["name"] = f"my {category['name']}"
    own.content["categories"].reverse()
    own.content["categories"].append({"id": 5, "name": "comet"})
    output = tmp_path / "run"
    assert train_net(output, *own.arguments(), ITERATION, *FEW) == 0

    log = (output / "log.txt").read_text()
    table, training = log.index("my motorcycle"), log.index("Starting training")
    assert table < training
    objects = sum(not a["iscrowd"] for a in own.content["annotations"])
    assert f"| own_train |       16 |                 1 |        {objects} |" in log
    assert "the model learns 6 classes" in log and "boxes only" not in log

    weights = weights_of(output)
    assert len(weights["roi_heads.box_predictor.cls_score.bias"]) == 7
    assert len(weights["roi_heads.mask_head.predictor.bias"]) == 6
    results = json.loads((output / "results.json").read_text())
    assert {"AP-my cat", "AP-comet"} <= results["bbox"].keys()
    assert results["dataset"]["own_train"]["images"] == 16

    # The config that the run has saved knows the data; order is that of the ids.
    saved = load_config(str(output / "config.yaml"))
    assert [c["id"] for c in saved.dataset.categories] == [1, 3, 5, 7, 11, 12]
    config = str(output / "config.yaml")
    assert train_net(output, "--eval-only", config=config) == 0
    again = json.loads((output / "results.json").read_text())
    assert (again["bbox"], again["dataset"]) == (results["bbox"], results["dataset"])


def test_every_class_count_of_a_cascade_follows(own):
    cfg = load_config(DEMO, own.arguments())
    cfg.model = model_zoo.get_config("common/models/cascade_rcnn.py").model
    cfg.model.roi_heads.box_predictors[1].num_classes = 80  # not by reference
    fit_recipe(cfg, {"own_train": {"classes": own.content["categories"], "masks": True}})
    heads = cfg.model.roi_heads
    counts = [predictor.num_classes for predictor in heads.box_predictors]
    assert [*counts, heads.num_classes, heads.mask_head.num_classes] == [5] * 5


def test_the_trunks_head_is_not_a_class_count():
    cfg = load_config(DEMO, [])
    assert cfg.model.backbone.net.model.num_classes == 0
    assert [path for path, _ in class_counts(cfg.model)] == ["roi_heads"]


def test_boxes_without_masks_train_a_model_without_masks(own, train_net, tmp_path):
    for annotation in own.content["annotations"]:
        del annotation["segmentation"]
    output = tmp_path / "run"
    assert train_net(output, *own.arguments(), ITERATION) == 0
    assert "boxes only" in (output / "log.txt").read_text()
    assert not [key for key in weights_of(output) if "mask" in key]
    results = json.loads((output / "results.json").read_text())
    assert "bbox" in results and "segm" not in results


def test_area_and_iscrowd_may_be_missing(own, train_net, tmp_path):
    own.content["annotations"] = [a for a in own.content["annotations"] if not a["iscrowd"]]
    whole = {a["id"]: a["area"] for a in own.content["annotations"]}
    for annotation in own.content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    output = tmp_path / "run"
    assert train_net(output, *own.arguments(), ITERATION) == 0
    used = json.loads((output / "dataset" / "own_val.json").read_text())
    areas = {a["id"]: a["area"] for a in used["annotations"]}
    assert areas == pytest.approx(whole, rel=0.1)
    assert "bbox" in json.loads((output / "results.json").read_text())


@pytest.mark.parametrize(
    ("drop", "change", "words"),
    [
        ("dataset.train_images", [], ["dataset.train_json", "dataset.train_images"]),
        ("dataset.val_", [], ["dataset.val_json", "set"]),
        ("", ["dataset.val_images=nowhere"], ["dataset.val_images=nowhere"]),
        (
            "",
            ["dataset.train_images=docs", "dataset.skip_broken=true"],
            ["no image of", "in docs:"],
        ),
        ("", ["dataset.train_json=no.json"], ["no.json", "does not exist"]),
        ("", ["dataset.train_json=README.md"], ["README.md is not COCO JSON"]),
        ("", ["dataset.train_jsn=no.json"], ["dataset.train_jsn", "dataset.train_json"]),
    ],
)
def test_files_that_are_missing_or_others(own, refusal, drop, change, words):
    arguments = [a for a in own.arguments() if not drop or not a.startswith(drop)]
    message = refusal(*arguments, *change)
    assert all(word in message for word in words), message


def test_categories_of_both_files_must_agree(own, refusal, tmp_path):
    arguments = own.arguments()
    own.content["categories"][0]["name"] = "lion"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(own.content))
    message = refusal(*arguments, f"dataset.val_json={other}")
    assert "other.json has classes that the run has not learnt (lion)" in message


def test_classes_keep_their_names_under_other_ids(own, train_net, tmp_path, capsys):
    """Evaluated, predicted with, resumed: a run's classes are known by their names."""
    output = tmp_path / "run"
    assert train_net(output, *own.arguments(), ITERATION, *FEW) == 0
    config, weights = str(output / "config.yaml"), f"{output}/model_final.pth"
    first = json.loads((output / "results.json").read_text())
    saved = json.loads((output / "dataset" / "own_train.json").read_text())

    new = {c["id"]: 90 - c["id"] for c in own.content["categories"]}
    for category in own.content["categories"]:
        category["id"] = new[category["id"]]
    for annotation in own.content["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    other = own.arguments()
    arguments = [*other, "--eval-only", f"train.init_checkpoint={weights}"]
    assert train_net(tmp_path / "again", *arguments, config=config) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["bbox"] == first["bbox"]
    # The recipe in place of the config: the run is known by its checkpoint.
    normalise(load_config(DEMO, [*other, f"train.output_dir={tmp_path}/c"]), weights=weights)
    assert json.loads((tmp_path / "c" / "dataset" / "own_train.json").read_text()) == saved
    ids = [category["id"] for category in categories_of(load_config(DEMO, other), weights)]
    assert ids == [category["id"] for category in saved["categories"]]

    own.content["categories"][0]["name"] = "lion"
    own.arguments()
    capsys.readouterr()
    assert train_net(tmp_path / "again", *arguments, config=config) == 2
    assert "classes that the run has not learnt (lion)" in error_of(capsys)


# --- broken data -------------------------------------------------------------------------------


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


def test_a_checkpoint_of_another_architecture(own, train_net, tmp_path, capsys):
    output = tmp_path / "run"
    assert train_net(output, "train.max_iter=1") == 0
    assert train_net(output, "--eval-only", "model.backbone.net.model.depth=3") == 2
    assert "another architecture" in error_of(capsys)
    weights = f"train.init_checkpoint={output / 'model_final.pth'}"
    other = "model.backbone.net.model.embed_dim=96"
    assert train_net(tmp_path / "other", weights, other) == 2
    assert "another architecture" in error_of(capsys)
    # Other classes are what fine-tuning is for.
    own.content["categories"].append({"id": 40, "name": "comet"})
    assert train_net(tmp_path / "classes", weights, *own.arguments(), "train.max_iter=1") == 0


def test_a_run_reads_only_what_it_has_written(own, datasets_root, tmp_path):
    source = datasets_root / "demo" / "train"
    cfg = load_config(DEMO, [*own.arguments(), f"train.output_dir={tmp_path / 'run'}"])
    cfg.dataloader.test.dataset.names = "demo_val"
    register_datasets()
    known = MetadataCatalog.get("demo_val").as_dict()
    normalise(cfg)
    own.json.write_text("{}")
    others = [copy.deepcopy(cfg) for _ in range(2)]
    for other in others:  # of a process that has not read the data, and of another run
        other.dataset.categories = []
        other.model.roi_heads.num_classes = 80
        use_normalised(other)
        assert other.dataset.categories == cfg.dataset.categories
        assert other.model.roi_heads.num_classes == 5
        records = instantiate(other.dataloader.train.dataset)
        for record in records:
            record["file_name"] = record["file_name"].replace(str(own.images), str(source))
        assert records == get_detection_dataset_dicts("demo_train", filter_empty=False)
    assert not {*dataset_names(others[0])} & {*dataset_names(others[1])}
    assert other.dataloader.evaluator.dataset_name == other.dataloader.test.dataset.names
    assert MetadataCatalog.get("demo_val").as_dict() == known
    assert dataset_names(cfg) == ["own_train", "demo_val"]


def test_evaluation_alone_reads_the_test_set_alone(own, tmp_path):
    arguments = [*own.arguments(), f"train.output_dir={tmp_path / 'run'}", "train.check_data=false"]
    normalise(load_config(DEMO, arguments))
    report = tmp_path / "run" / "dataset" / "report.json"
    content = json.loads(report.read_text())
    # As an earlier version has left it, and with training data that are gone.
    old = {key: value for key, value in content["own_train"].items() if key not in NOT_FACTS}
    report.write_text(json.dumps({"own_train": old, "other": {}}))
    del own.content["annotations"]  # as COCO's own test sets
    own.arguments()
    cfg = load_config(DEMO, [*arguments, "dataset.train_json=gone.json"])
    normalise(cfg, evaluation_only=True)
    use_normalised(cfg, evaluation_only=True)
    content = json.loads(report.read_text())
    assert list(content) == ["own_train", "own_val"] and content["own_train"] == old
    assert cfg.dataloader.train.dataset.names == "own_train"
    assert len(instantiate(cfg.dataloader.test.dataset)) == len(own.content["images"])
    assert "annotations" not in json.loads((report.parent / "own_val.json").read_text())


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


def test_a_resumed_run_does_not_decode_again(own, monkeypatch, tmp_path):
    arguments = [*own.arguments(), f"train.output_dir={tmp_path}/run"]
    decoded = []

    def counting(path: Path, **options: Any) -> Image.Image:
        decoded.append(path.name)
        return Image.open(path)

    monkeypatch.setattr("revdet.data.normalise.read_image", counting)
    normalise(load_config(DEMO, arguments))
    assert len(decoded) == 16
    changed = own.images / own.content["images"][3]["file_name"]
    changed.write_bytes(changed.read_bytes() + b"x")
    normalise(load_config(DEMO, arguments))
    assert decoded[16:] == [changed.name]


def test_image_files_that_do_not_fit(own, refusal):
    size, empty, deep = (own.images / image["file_name"] for image in own.content["images"][:3])
    with Image.open(size) as image:
        image.resize((50, 50)).save(size)
    empty.write_bytes(b"")
    with Image.open(deep) as image:  # Pillow would make it white
        pixels = np.full(image.size[::-1], 3000, np.uint16)
    Image.fromarray(pixels).save(deep, format="png")
    assert "(2 unreadable_image, 1 wrong_image_size)" in refusal(*own.arguments())
