"""The Detectron2 backbone and the metrics."""

from __future__ import annotations

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import backbones
from revdet.data.datasets import register_datasets
from revdet.models import TrunkBackbone
from revdet.training.evaluation import FasterCOCOEvaluator


def test_backbone_describes_what_it_returns():
    trunk = backbones.create_model(
        "rev_vit_tiny", img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2
    )
    backbone = TrunkBackbone(trunk)
    shape = backbone.output_shape()["scale3"]
    out = backbone(torch.zeros(2, 3, 40, 72))
    assert out["scale3"].shape == (2, shape.channels, 40 // shape.stride, 72 // shape.stride)
    assert backbone.size_divisibility == 8
    with pytest.raises(ValueError, match=r"scale4.*scale3"):
        TrunkBackbone(trunk, out_features=["scale4"])


def test_maps_of_several_stages_are_normalised():
    trunk = backbones.create_model(
        "rev_mvit_base", img_size=64, embed_dim=8, depth=4, transitions=(1, 2, 3), num_classes=0
    )
    backbone = TrunkBackbone(trunk, out_features=["scale3", "scale4", "scale5"])
    maps = backbone(torch.randn(2, 3, 64, 96))
    shapes = backbone.output_shape()
    assert list(maps) == list(shapes) == ["scale3", "scale4", "scale5"]
    for name, value in maps.items():
        stride = 2 ** int(name[-1])
        assert value.shape == (2, shapes[name].channels, 64 // stride, 96 // stride)
        # Up to the bias of 0.02 that the trunk's own norm starts with.
        assert value.mean(dim=1).abs().max() < 0.03
        assert (value.std(dim=1) - 1).abs().max() < 0.1
    maps["scale3"].sum().backward()
    assert backbone.norms["scale3"].weight.grad is not None


def test_a_trunk_for_clips_sees_an_image_as_one_frame():
    trunk = backbones.create_model(
        "mvit_base_16x4", img_size=32, embed_dim=8, depth=3, transitions=(1, 2), num_classes=0
    )
    image = torch.randn(2, 3, 40, 64)
    maps = TrunkBackbone(trunk)(image)
    assert [tuple(m.shape[-2:]) for m in maps.values()] == [(10, 16), (5, 8), (3, 4)]
    assert torch.equal(maps["scale4"], trunk.feature_maps(image[:, :, None])[2][:, :, 0])


def predictions(record: dict, rng: np.random.Generator, noise: float) -> Instances:
    """The ground truth of an image as predictions, its boxes and masks shifted by ``noise`` px."""
    annotations = [a for a in record["annotations"] if not a["iscrowd"]]
    height, width = record["height"], record["width"]
    instances = Instances((height, width))
    boxes, masks = [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        dx, dy = rng.normal(scale=noise, size=2) if noise else (0, 0)
        boxes.append([x + dx, y + dy, x + w + dx, y + h + dy])
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
        mask = mask_util.decode(segmentation)
        masks.append(np.roll(mask, (round(dy), round(dx)), axis=(0, 1)))
    instances.pred_boxes = Boxes(torch.tensor(np.reshape(boxes, (-1, 4)), dtype=torch.float32))
    instances.pred_masks = torch.tensor(np.reshape(masks, (-1, height, width)))
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
    instances.scores = torch.tensor(rng.uniform(0.1, 1, size=len(annotations)))
    return instances


SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


# The second: what is added to the ids of images, of which the first ones are then negative.
@pytest.mark.parametrize("noise, more", [(0.0, 0), (4.0, 0), (4.0, -7)])
def test_metrics_are_those_of_pycocotools(datasets_root, tmp_path, noise, more):
    root = datasets_root / "demo"
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    for image in content["images"]:
        image["id"] += more
    for annotation in content["annotations"]:
        annotation["image_id"] += more
    file, name = tmp_path / "val.json", f"val {noise} {more}"
    file.write_text(json.dumps(content))
    register_coco_instances(name, {}, str(file), str(root / "val"))
    records = DatasetCatalog.get(name)
    evaluator = FasterCOCOEvaluator(name, output_dir=str(tmp_path))
    evaluator.reset()
    rng = np.random.default_rng(0)
    for record in records:
        evaluator.process([record], [{"instances": predictions(record, rng, noise)}])
    results = evaluator.evaluate()

    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    masks = [{k: v for k, v in each.items() if k != "bbox"} for each in written]  # of their area
    truth = COCO(str(file))
    for task, given in (("bbox", written), ("segm", masks)):
        reference = COCOeval(truth, truth.loadRes(given), task)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
        for name, value in zip(SCORES, reference.stats, strict=False):
            score = float("nan") if value == -1 else 100 * value
            assert results[task][name] == pytest.approx(score, abs=1e-6, nan_ok=True), name
    if noise == 0:
        assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    else:
        assert results["bbox"]["AP"] < 95


def test_a_model_that_predicts_nothing_scores_zero(datasets_root):
    register_datasets()
    evaluator = FasterCOCOEvaluator("demo_val", tasks=("bbox", "segm"))
    evaluator.reset()
    for record in DatasetCatalog.get("demo_val"):
        empty = predictions({**record, "annotations": []}, np.random.default_rng(0), 0)
        evaluator.process([record], [{"instances": empty}])
    assert evaluator.evaluate()["bbox"]["AP50"] == 0
