"""Every recipe trains, evaluates and is loaded again, through the command that users type.

On images in COCO's format with polygons, both kinds of RLE, a crowd and nothing at all, with the
recipe's own augmentations, mapper, schedule and weights; ``key=value`` alone makes it small.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from iopath.common.file_io import g_pathmgr
from omegaconf import OmegaConf
from pycocotools import mask as rle

import backbones
from backbones.registry import MODELS
from backbones.weights.download import ZOO
from revdet.config import load_config
from revdet.models import build_model
from revdet.train_net import main
from revdet.training.checkpoint import Checkpointer
from revdet.training.metrics import read_metrics
from revdet.training.trainer import Trainer
from tests.revdet.conftest import own_files

RECIPES = sorted(
    str(path) for path in Path("configs/detection").glob("*/*.py") if path.parent.name != "common"
)
ARCHITECTURE = ("embed_dim", "depth", "num_heads", "transitions")
SIDE = 64  # pixels of what the model sees
CLASSES = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]


def small(recipe: str) -> list[str]:
    """Overrides for the sizes of the model and of the images; everything else is the recipe's."""
    cfg = load_config(recipe)
    trunk = "model.backbone." + ("net" if "net" in cfg.model.backbone else "bottom_up") + ".model"
    arguments: dict[str, Any] = {"img_size": SIDE, "embed_dim": 16}
    if "mvit" in recipe:
        stages = len(OmegaConf.select(cfg, f"{trunk}.transitions") or (1, 3, 14)) + 1
        arguments |= {"depth": stages + 1, "transitions": [*range(1, stages)]}
    else:
        arguments |= {"depth": 3, "num_heads": 2}
    if "window_size" in OmegaConf.select(cfg, trunk):
        arguments |= {"window_size": 2, "global_attn_indexes": [2]}
    values = {f"{trunk}.{key}": value for key, value in arguments.items()}
    if cfg.model.backbone.get("square_pad"):
        values["model.backbone.square_pad"] = SIDE
    values["model.proposal_generator.pre_nms_topk"] = [50, 20]
    values["model.proposal_generator.post_nms_topk"] = [20, 10]
    heads = cfg.model.roi_heads
    values["model.roi_heads.batch_size_per_image"] = 8
    narrow = ["model.backbone.out_channels", "model.proposal_generator.head.in_channels"]
    narrow.append("model.roi_heads.mask_head.input_shape.channels")
    values["model.roi_heads.mask_head.conv_dims"] = narrower(heads.mask_head.conv_dims[:2])
    for stage in ("s.0", "s.1", "s.2") if "box_heads" in heads else ("",):
        head, predictor = (f"model.roi_heads.box_{what}{stage}" for what in ("head", "predictor"))
        values[f"{head}.fc_dims"] = [32]
        values[f"{head}.conv_dims"] = narrower(OmegaConf.select(cfg, head).conv_dims[:1])
        narrow.append(f"{head}.input_shape.channels")
        values[f"{predictor}.input_shape.channels"] = 32
    values |= {key: narrower([OmegaConf.select(cfg, key)])[0] for key in narrow}
    if test := cfg.dataloader.test.mapper.augmentations:
        for split in ("train", "test"):
            path = f"dataloader.{split}.mapper.augmentations"
            for key, pixels in lengths(OmegaConf.select(cfg, path), path):
                values[key] = (np.array(pixels) * SIDE // test[0].short_edge_length).tolist()
    return [f"{key}={value}".replace(" ", "") for key, value in values.items()]


def narrower(channels: Iterable[int]) -> list[int]:
    """Of the pyramid and the heads: what does not fit together, still does not."""
    return [number // 8 for number in channels]


def lengths(node: Any, path: str) -> Iterator[tuple[str, int | list[int]]]:
    """All that augmentations measure in pixels: numbers above 100, alone and in lists."""
    if OmegaConf.is_list(node) and isinstance(node[0], int):
        yield path, list(node)
    elif OmegaConf.is_config(node):
        for key in range(len(node)) if OmegaConf.is_list(node) else node:
            yield from lengths(node[key], f"{path}.{key}")
    elif isinstance(node, int) and node > 100:
        yield path, node


@pytest.fixture(scope="module")
def data(datasets_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name four images: with none of COCO's objects, with polygons, RLE, a crowd."""
    content = json.loads((datasets_root / "demo/annotations/instances_train.json").read_text())
    annotations = [a for a in content["annotations"] if a["image_id"] <= 4]
    for number, annotation in enumerate(annotations):
        annotation["category_id"] = CLASSES[number]["id"]
    crowd, *others = (a for a in annotations if "counts" in a["segmentation"])
    assert 0 < len(others) < len(annotations) - 1  # RLE, and polygons
    mask = rle.decode(crowd["segmentation"]).ravel("F")
    changes = np.flatnonzero(np.diff(mask, prepend=np.uint8(0)))
    crowd["segmentation"]["counts"] = np.diff([0, *changes, len(mask)]).tolist()
    crowd["iscrowd"] = 1  # and not compressed, as in COCO
    content["images"] = content["images"][:4]
    file = tmp_path_factory.mktemp("coco") / "mine.json"
    file.write_text(json.dumps({**content, "annotations": annotations, "categories": CLASSES}))
    return own_files(file, datasets_root / "demo" / "train")


@pytest.mark.parametrize("recipe", RECIPES, ids=[Path(recipe).stem for recipe in RECIPES])
def test_a_recipe_trains_evaluates_and_is_loaded_again(recipe, data, tmp_path, monkeypatch):
    sizes = small(recipe)
    cfg = load_config(recipe, sizes)
    trunk = (cfg.model.backbone.get("net") or cfg.model.backbone.bottom_up).model
    name = trunk.name

    def download(address: str) -> Path:
        """A file like that of the recipe's address: a trunk for classification, as small."""
        foreign = cfg.train.init_checkpoint in ZOO
        assert address == (ZOO[cfg.train.init_checkpoint] if foreign else MODELS[name].weights)
        arguments = {key: trunk[key] for key in ARCHITECTURE if key in trunk}
        file = tmp_path / "released.safetensors"
        source = name.removeprefix("rev_") if foreign else name
        backbones.save_weights(backbones.create_model(source, **arguments), file)
        return file

    start: dict[str, torch.Tensor] = {}
    train = Trainer.train

    def spy(trainer: Trainer, *iterations: int) -> None:
        model = trainer.model
        reversible = any(isinstance(m, backbones.ReversibleSequence) for m in model.modules())
        assert reversible is ("_rev_" in recipe)
        start.update({name: value.detach().clone() for name, value in model.named_parameters()})
        train(trainer, *iterations)

    monkeypatch.setattr("backbones.weights.download.download", download)
    monkeypatch.setattr(g_pathmgr, "get_local_path", download)
    monkeypatch.setattr("revdet.training.results.draw_curves", lambda *_: None)  # takes its time
    monkeypatch.setattr(Trainer, "train", spy)
    cheap = ["train.max_iter=2", "train.log_period=1", "train.pictures=0", "train.device=cpu"]
    cheap += ["train.warmup_iters=0", "train.memory_budget="]  # auto needs a GPU
    # Of this seed, MViTv2's crop of every other image is among those of the two iterations.
    cheap += ["train.seed=0", "dataloader.train.total_batch_size=2"]
    cheap += [f"dataloader.{split}.num_workers=0" for split in ("train", "test")]
    run = tmp_path / "run"
    assert main(["--config", recipe, *sizes, *data, *cheap, f"train.output_dir={run}"]) == 0

    lines = read_metrics(run / "metrics.json")
    assert sum(line.get("total_loss", 0) > 0 for line in lines) == 2
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["bbox"]["AP"] <= 100 and 0 <= results["segm"]["AP"] <= 100
    log = (run / "log.txt").read_text()
    assert ("tensors loaded" in log) is bool(cfg.train.init_checkpoint)
    end = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert not [name for name, value in start.items() if torch.equal(value, end[name])]
    # As one would some day: by the config that lies beside the weights.
    again = build_model(load_config(str(run / "config.yaml")))
    Checkpointer(again).load(str(run / "model_final.pth"))


# Iterations, learning rate, layer decay and drop path of Detectron2's ViTDet and MViTv2, whose
# schedules are 100, 75 and 36 epochs of 64 images.
PUBLISHED = {
    "vit_base_100ep": (184375, 1e-4, 0.7, 0.1),
    "vit_large_100ep": (184375, 1e-4, 0.8, 0.4),
    "vit_huge_75ep": (138281, 1e-4, 0.9, 0.5),
    "mvit_base_36ep": (67500, 1.6e-4, 1.0, 0.2),
}


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "/coco/" in recipe])
def test_recipes_and_their_twins_are_as_published(recipe):
    stem = Path(recipe).stem
    key = next(key for key in PUBLISHED if f"_{key}" in stem)
    iterations, rate, decay, drop_path = PUBLISHED[key]
    cfg = load_config(recipe)
    trunk = (cfg.model.backbone.get("net") or cfg.model.backbone.bottom_up).model
    twin = "_rev_" not in stem
    assert trunk.name == ("" if twin else "rev_") + key.rsplit("_", 1)[0]
    assert trunk.drop_path_rate == drop_path
    if "_vit_" in stem:
        assert (trunk.window_size, trunk.use_rel_pos, trunk.img_size) == (14, True, 1024)
        depth = {"base": 12, "large": 24, "huge": 32}[key.split("_")[1]]
        assert list(trunk.global_attn_indexes) == [depth * (i + 1) // 4 - 1 for i in range(4)]
    assert cfg.train.max_iter == cfg.lr_multiplier.scheduler.num_updates == iterations
    assert cfg.dataloader.train.total_batch_size == cfg.train.reference_batch_size == 64
    assert (cfg.optimizer.lr, cfg.optimizer.params.layer_decay) == (rate, decay)
    assert cfg.train.init_checkpoint == (MODELS[trunk.name].weights or "")
    assert cfg.train.amp.enabled and cfg.train.amp.dtype == "bfloat16"
    assert cfg.train.memory == ("store" if twin else "reversible")
    assert Path(cfg.train.output_dir).name == stem
    assert ("cascade" in stem) is ("box_heads" in cfg.model.roi_heads)


def test_a_cascade_has_three_heads_and_learns_other_classes_by_one_key():
    recipe = "configs/detection/coco/cascade_mask_rcnn_rev_vit_base_100ep.py"
    cfg = load_config(recipe, [*small(recipe), "model.roi_heads.num_classes=7"])
    heads = build_model(cfg).roi_heads
    assert [p.num_classes for p in heads.box_predictor] == [7, 7, 7]
    assert [m.thresholds[1] for m in heads.proposal_matchers] == [0.5, 0.6, 0.7]
    assert heads.mask_head.predictor.out_channels == 7
    weights = [p.box2box_transform.weights[0] for p in heads.box_predictor]
    assert weights == [10, 20, 30]
