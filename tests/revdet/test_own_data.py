"""Any COCO-format dataset from the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from iopath.common.file_io import g_pathmgr
from PIL import Image

from revdet.config import load_config
from revdet.data.classes import categories_of, class_counts, fit_recipe
from revdet.data.datasets import (
    NOT_FACTS,
    dataset_names,
    name_own_data,
    register_datasets,
    sources,
)
from revdet.data.normalise import normalise, use_normalised
from tests.revdet.conftest import DEMO, FEW, error_of

ITERATION = "train.max_iter=1"


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
    assert load_config(recipe).train.memory_budget == "auto"
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
