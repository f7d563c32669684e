"""Pyramid, RPN and heads that keep their inputs alone: the same losses and gradients."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from detectron2.utils.events import EventStorage

import backbones
from backbones.common.errors import UserError
from backbones.engine.policies import blocks_of
from backbones.memory.simulation import Simulation
from revdet.config import load_config
from revdet.heads import Piece, make_pieces, set_heads_memory
from revdet.models import build_model
from revdet.training.budget import ShapeOnlyDetector
from tests.revdet.conftest import DEMO
from tests.revdet.test_ddp import batch
from tests.revdet.test_recipes import SIDE, small

COCO = "configs/detection/coco"
CASCADE = f"{COCO}/cascade_mask_rcnn_rev_vit_base_100ep.py"
FPN = f"{COCO}/mask_rcnn_rev_mvit_base_36ep.py"


def step(model: torch.nn.Module, *images: dict) -> dict[str, torch.Tensor]:
    """Losses and gradients of a training step, in which proposals are drawn alike."""
    model.zero_grad()
    torch.manual_seed(0)
    with EventStorage():
        losses = model([copy.deepcopy(image) for image in images])
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses | grads


@pytest.mark.parametrize("recipe", (DEMO, CASCADE, FPN), ids=("plain", "cascade", "fpn"))
def test_every_policy_has_the_gradients_of_store(recipe):
    torch.manual_seed(0)
    overrides = small(recipe) if recipe is not DEMO else []
    model = build_model(load_config(recipe, [*overrides, "train.memory=store"])).train()
    names = list(model.state_dict())
    images = [*batch(0, 0, SIDE), *batch(0, 1, SIDE)]
    expected = step(model, *images)
    assert {block.memory_policy for block in blocks_of(model).values()} == {"store"}
    for policy, slices in (("reversible", 0), ("checkpoint", 3), ("reversible", 1)):
        backbones.set_memory(model, policy)
        set_heads_memory(model, "checkpoint", slices)
        for _ in range(2):
            found = step(model, *images)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                # Some gradients are zero but for rounding, as those of key biases.
                error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-3)
                assert error < 1e-5, (policy, slices, name, float(error))
    assert list(model.state_dict()) == names
    with torch.no_grad():
        model.eval()([image | {"height": SIDE, "width": SIDE} for image in images])


def test_what_the_recipe_says(caplog):
    def policies(*overrides: str) -> tuple[set[str], set[int]]:
        model = build_model(load_config(DEMO, [*overrides, "model.backbone.net.model.depth=1"]))
        pieces = [
            piece for pieces in make_pieces(copy.deepcopy(model)).values() for piece in pieces
        ]
        assert len(pieces) == 5 and all(isinstance(piece, Piece) for piece in pieces)
        found = [m for m in model.modules() if isinstance(m, Piece)]
        return {m.memory_policy for m in found}, {m.slices for m in found}

    with caplog.at_level(logging.INFO, logger="revdet"):
        assert policies("train.memory=store")[0] == {"store"}
        assert policies("train.memory=reversible") == ({"checkpoint"}, {1})
        assert policies("train.heads_memory=store")[0] == {"store"}
        assert policies("train.memory=store", "train.heads_memory=checkpoint")[0] == {"checkpoint"}
        assert policies("train.heads_slices=3")[1] == {3}
    assert "pyramid and heads: checkpoint" in caplog.text


def test_batch_norm_is_refused():
    norm = "model.roi_heads.mask_head.conv_norm=BN"
    with pytest.raises(UserError, match=r"BatchNorm2d in the mask head.*heads_memory=store"):
        build_model(load_config(DEMO, [norm, "train.memory=reversible"]))
    build_model(load_config(DEMO, [norm, "train.memory=store"]))


def test_what_is_held_behind_the_trunk():
    model = build_model(load_config(DEMO, []))
    images = torch.empty(2, 3, SIDE, SIDE)
    stored, reversed_ = (
        Simulation(ShapeOnlyDetector(model), images, "cpu").step(policy).held
        for policy in ("store", "reversible")
    )
    assert list(stored) == ["stem", "trunk", "pyramid", "rpn", "box_heads", "mask_head", "head"]
    behind = ("pyramid", "rpn", "box_heads", "mask_head")
    assert sum(reversed_[part] for part in behind) < 0.5 * sum(stored[part] for part in behind)
