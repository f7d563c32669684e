"""Every recipe builds, trains a step when shrunk, and is saved and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.structures import BitMasks, Boxes, Instances
from omegaconf import DictConfig

import backbones
from backbones.weights.download import RELEASED_WEIGHTS
from revdet.config import load_config
from revdet.models import find_trunk
from revdet.training.build import amp_dtype, build_model, build_optimizer
from revdet.training.checkpoint import Checkpointer
from revdet.training.trainer import Trainer

RECIPES = sorted(
    str(path) for path in Path("configs/detection").glob("*/*.py") if path.parent.name != "common"
)
SIDE = 64


def shrink(cfg: DictConfig) -> None:
    """The same recipe at a size that takes a second on a CPU: narrower, shallower, fewer boxes."""
    net = cfg.model.backbone.get("net") or cfg.model.backbone.bottom_up
    net.model.update(img_size=SIDE, embed_dim=16)
    if "mvit" in net.model.name:
        stages = len(net.model.get("transitions", (1, 3, 14))) + 1
        net.model.update(depth=stages + 1, transitions=tuple(range(1, stages)))
    else:
        net.model.update(depth=3, num_heads=2)
    if net.model.get("window_size"):
        net.model.update(window_size=2, global_attn_indexes=(2,))
    if cfg.model.backbone.get("square_pad"):
        cfg.model.backbone.square_pad = SIDE
    cfg.model.proposal_generator.update(pre_nms_topk=(50, 20), post_nms_topk=(20, 10))
    heads = cfg.model.roi_heads
    heads.batch_size_per_image = 8
    for head in heads.get("box_heads") or [heads.box_head]:
        head.update(conv_dims=head.conv_dims[:1], fc_dims=[32])
    for predictor in heads.get("box_predictors") or [heads.box_predictor]:
        predictor.input_shape.channels = 32
    heads.mask_head.conv_dims = heads.mask_head.conv_dims[:2]
    cfg.train.update(device="cpu", max_iter=1, init_checkpoint="")


def images(count: int, num_classes: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(count):
        truth = Instances((SIDE, SIDE))
        truth.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]]))
        truth.gt_classes = torch.tensor([0, num_classes - 1])
        truth.gt_masks = BitMasks(torch.rand(2, SIDE, SIDE, generator=generator) > 0.5)
        pixels = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        batch.append({"image": pixels, "height": SIDE, "width": SIDE, "instances": truth})
    return batch


@pytest.mark.parametrize("recipe", RECIPES, ids=[Path(recipe).stem for recipe in RECIPES])
def test_recipe_builds_trains_saves_and_loads(recipe, tmp_path):
    cfg = load_config(recipe)
    shrink(cfg)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    torch.manual_seed(0)
    model = build_model(cfg)
    reversible = any(isinstance(m, backbones.ReversibleSequence) for m in model.modules())
    assert reversible is ("_rev_" in recipe)
    optimizer, schedule = build_optimizer(cfg, model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    # The warm-up starts near zero, which would leave the weights as they are.
    batch = images(2, cfg.model.roi_heads.num_classes)
    Trainer(model, [batch], optimizer, amp_dtype=amp_dtype(cfg)).train(0, 1)
    assert 0 < schedule(0.0) < schedule(0.5)
    untrained = [n for n, value in model.named_parameters() if torch.equal(value, before[n])]
    assert not untrained

    Checkpointer(model, str(tmp_path)).save("model")
    # As one would some day: from the config that lies beside the weights.
    again = build_model(load_config(str(tmp_path / "config.yaml")))
    Checkpointer(again).load(str(tmp_path / "model.pth"))
    model.eval(), again.eval()
    with torch.no_grad():
        one, other = (m.backbone(torch.ones(1, 3, SIDE, SIDE)) for m in (model, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in again.state_dict().items()
    }


# Iterations, learning rate, layer decay and drop path of Detectron2's ViTDet and MViTv2, whose
# schedules are 100 and 36 epochs of 64 images.
PUBLISHED = {
    "vit_base_100ep": (184375, 1e-4, 0.7, 0.1),
    "vit_large_100ep": (184375, 1e-4, 0.8, 0.4),
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
        depth = {"base": 12, "large": 24}[key.split("_")[1]]
        assert list(trunk.global_attn_indexes) == [depth * (i + 1) // 4 - 1 for i in range(4)]
    assert cfg.train.max_iter == cfg.lr_multiplier.scheduler.num_updates == iterations
    assert cfg.dataloader.train.total_batch_size == cfg.train.reference_batch_size == 64
    assert (cfg.optimizer.lr, cfg.optimizer.params.layer_decay) == (rate, decay)
    assert cfg.train.amp.enabled and cfg.train.amp.dtype == "bfloat16"
    assert cfg.train.memory == ("store" if twin else "reversible")
    assert Path(cfg.train.output_dir).name == stem
    assert ("cascade" in stem) is ("box_heads" in cfg.model.roi_heads)


def test_a_cascade_has_three_heads_and_learns_other_classes_by_one_key():
    recipe = "configs/detection/coco/cascade_mask_rcnn_rev_vit_base_100ep.py"
    cfg = load_config(recipe, ["model.roi_heads.num_classes=7"])
    shrink(cfg)
    heads = build_model(cfg).roi_heads
    assert [p.num_classes for p in heads.box_predictor] == [7, 7, 7]
    assert [m.thresholds[1] for m in heads.proposal_matchers] == [0.5, 0.6, 0.7]
    assert heads.mask_head.predictor.out_channels == 7
    weights = [p.box2box_transform.weights[0] for p in heads.box_predictor]
    assert weights == [10, 20, 30]


@pytest.mark.parametrize("name", ["rev_vit_base", "rev_mvit_base"])
def test_published_trunks_start_from_the_released_weights(name):
    cfg = load_config(str(next(Path("configs/detection/coco").glob(f"mask_rcnn_{name}_*.py"))))
    assert cfg.train.init_checkpoint == RELEASED_WEIGHTS[name]


def test_find_trunk_says_what_is_missing():
    with pytest.raises(ValueError, match="TrunkBackbone"):
        find_trunk(torch.nn.Linear(1, 1))
