"""A memory budget for a detector: counted as it really is, and kept."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import detectron2.data.transforms as T
import pytest
import torch
from detectron2.utils.events import EventStorage

import backbones
from backbones.engine.policies import blocks_of
from backbones.memory.simulation import Simulation
from revdet.config import load_config
from revdet.heads import set_heads_memory
from revdet.models import build_model, find_trunk
from revdet.training.budget import (
    ShapeOnlyDetector,
    apply_memory_budget,
    fit_detector_memory,
    largest_image,
)
from tests.backbones.saved_bytes import saved_bytes
from tests.revdet.conftest import DEMO, detector
from tests.revdet.test_ddp import batch
from tests.revdet.test_recipes import SIDE, small

SHAPE = (2, 3, SIDE, SIDE)
MVIT = DEMO.replace("rev_vit", "rev_mvit")


@pytest.mark.parametrize("policy, dtype", [("store", torch.bfloat16), ("reversible", None)])
def test_what_is_counted_is_what_a_real_step_holds(policy, dtype):
    model = detector(recipe=MVIT)
    set_heads_memory(model, "store" if policy == "store" else "checkpoint")
    backbones.set_memory(model, policy)
    with EventStorage(), saved_bytes(ignore=model) as held:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = sum(model([*batch(0, 0, SIDE), *batch(0, 1, SIDE)]).values())
        real = held.bytes
    assert loss > 0
    step = ShapeOnlyDetector(model)
    counted = Simulation(step, torch.empty(SHAPE), "cpu", dtype).step(policy).held_bytes
    # Real heads may see fewer proposals than the most that they can.
    # A checkpoint keeps the state of the random generator besides, 5 KB for each slice.
    assert real <= 1.05 * counted and counted <= 1.25 * real


def test_a_budget_is_kept_by_trunk_and_heads_together():
    model = detector("model.backbone.net.model.depth=2")
    generous = fit_detector_memory(model, SHAPE, "10GB")
    assert generous.stored_blocks == generous.blocks == 7  # two of the trunk, and five behind it
    assert list(generous.parts)[4:8] == ["stem", "trunk", "pyramid", "rpn"]
    budget = generous.predicted_bytes - 1
    plan = fit_detector_memory(model, SHAPE, budget + 1000, held_besides=1000)
    assert plan.predicted_bytes <= plan.budget == budget
    assert 0.7 < plan.relative_speed <= 1.0
    policies = [block.memory_policy for block in blocks_of(model).values()]
    assert 0 < policies.count("store") < 7 or plan.keep


def test_the_policy_reaches_every_block(caplog):
    overrides = ["train.memory=checkpoint", "train.stored_blocks=1"]
    overrides += ["train.memory_keep=[g.mlp.fc2,*.qkv]", "model.backbone.net.model.depth=2"]
    with caplog.at_level(logging.INFO, logger="revdet"):
        model = build_model(load_config(DEMO, overrides))
    blocks = blocks_of(find_trunk(model)[1]).values()
    assert [block.memory_policy for block in blocks] == ["checkpoint", "store"]
    assert {block.keep for block in blocks} == {("g.mlp.fc2", "f.attn.qkv")}
    assert "g.mlp.fc2, *.qkv kept of the others" in caplog.text


def test_the_plan_is_in_force(monkeypatch):
    plan = SimpleNamespace(policy="reversible", stored_blocks=1, keep="products", slices=2)
    monkeypatch.setattr("revdet.training.budget._plan", lambda *_: plan)
    cfg = load_config(DEMO, ["model.backbone.net.model.depth=2"])
    model = build_model(cfg)
    apply_memory_budget(cfg, model, [], None)
    assert (cfg.train.stored_blocks, cfg.train.memory_keep) == (1, ["products"])
    assert cfg.train.memory_slices == 2
    found = [(b.memory_policy, b.keep, b.slices) for b in blocks_of(model).values()]
    assert found.count(("store", None, 2)) == 1  # the mask head, which is the last
    assert found.count(("reversible", None, 2)) == 2 and len(found) == 7


def test_budgets_that_cannot_be_kept():
    model = detector()
    with pytest.raises(ValueError, match="2000000 bytes are held besides"):
        fit_detector_memory(model, SHAPE, "1MB", held_besides=2_000_000)
    with pytest.raises(ValueError, match="'auto' needs a GPU"):
        fit_detector_memory(model, SHAPE, "auto")
    with pytest.raises(ValueError, match="an RPN and box heads"):
        fit_detector_memory(torch.nn.Linear(2, 2), SHAPE, "1GB")


def test_every_head_is_run_on_the_most_proposals_it_can_see():
    recipe = "configs/detection/coco/cascade_mask_rcnn_rev_vit_base_100ep.py"
    outputs = ShapeOnlyDetector(detector(*small(recipe), recipe=recipe))(
        torch.zeros(2, 3, SIDE, SIDE)
    )
    levels, (*boxes, masks) = outputs[:10], outputs[10:]
    assert [tuple(x.shape[-2:]) for x in levels] == 2 * [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    # 8 proposals of each image, a quarter of them objects; three heads with classes and boxes.
    assert [tuple(x.shape) for x in boxes] == 3 * [(16, 81), (16, 4)]
    assert tuple(masks.shape) == (4, 80, 28, 28)


def test_the_largest_image_a_batch_is_padded_to():
    records = [{"height": h, "width": w} for h, w in ((480, 640), (600, 400), (300, 900))]
    pyramid = detector().backbone
    pyramid._square_pad = 96
    assert largest_image(pyramid, [], records, 2) == (96, 96)
    fpn = detector(recipe=MVIT).backbone
    # Wide images are batched with wide ones: 480 x 900, and 16 is the coarsest stride.
    assert largest_image(fpn, [], records, 2) == (480, 912)
    assert largest_image(fpn, [], records, 1) == (480, 640)
    resize = T.ResizeShortestEdge([480, 800], 1333, "choice")
    assert largest_image(fpn, [T.RandomFlip(), resize], records, 2) == (800, 1344)
    # A crop of any shape may make a wide image high.
    some_crop = T.RandomApply(T.RandomCrop("absolute_range", (384, 600)))
    assert largest_image(fpn, [some_crop, resize], records, 2) == (1344, 1344)
    assert sorted(largest_image(fpn, [some_crop, resize], records, 1)) == [800, 1344]
    crop = T.FixedSizeCrop((256, 300))
    assert largest_image(fpn, [some_crop, resize, crop], records, 2) == (256, 304)
