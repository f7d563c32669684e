"""Parameter groups and the learning rate, step by step."""

from __future__ import annotations

import math

import pytest

import backbones
from revvideo.settings import OptimConfig
from revvideo.training.optim import build_optimizer, lr_factor, param_groups

SMALL = {"num_frames": 4, "img_size": 32, "embed_dim": 8, "depth": 4, "transitions": (1, 3)}


@pytest.fixture(scope="module")
def model():
    return backbones.create_model("rev_mvit_base_16x4", num_classes=3, **SMALL)


def test_every_parameter_is_in_one_group_and_only_matrices_decay(model):
    groups = param_groups(model, lr=0.1, weight_decay=0.05)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    assert {group["lr"] for group in groups} == {0.1}
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.05}


def test_layer_decay_falls_from_the_head_to_the_stem(model):
    groups = param_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    depths = {name: -math.log2(rates[id(p)]) for name, p in model.named_parameters()}
    # Four blocks, of which the second and the fourth are transitions.
    starts = [("head", "norm"), "stages.2.transition", "stages.1.blocks", "stages.1.transition"]
    starts += ["stages.0.blocks", ("patch_embed", "pos_embed")]
    for depth, start in enumerate(starts):
        assert {depths[name] for name in depths if name.startswith(start)} == {depth}
    assert groups[0]["lr"] == 1.0, "the first group is the head's: its rate is the one logged"


def test_groups_are_those_that_optimizers_were_saved_with(model):
    """Two for each depth, also where all have the same rate."""
    sizes = [len(group["params"]) for group in param_groups(model, 1.0, 0.0)]
    assert sizes == [len(group["params"]) for group in param_groups(model, 1.0, 0.0, 0.5)]
    assert len(sizes) == 2 * (4 + 2)


def test_frozen_parameters_are_left_out(model):
    model.head.requires_grad_(False)
    listed = {id(p) for group in param_groups(model, 1.0, 0.0) for p in group["params"]}
    model.head.requires_grad_(True)
    assert id(model.head.weight) not in listed and id(model.norm.weight) in listed


def test_the_schedule_has_its_published_points():
    schedule = dict(warmup=10, total=110, start=0.01, end=0.02)
    points = {0: 0.01, 5: 0.505, 10: 1.0, 60: 0.51, 110: 0.02, 500: 0.02}
    assert {step: lr_factor(step, **schedule) for step in points} == pytest.approx(points)
    assert lr_factor(0, warmup=0, total=5, start=0.5, end=0.0) == 1.0
    factors = [lr_factor(step, **schedule) for step in range(111)]
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:])[::-1]


def test_every_group_follows_the_schedule(model):
    config = OptimConfig(lr=0.1, layer_decay=0.5, start_factor=0.1, end_factor=0.0)
    optimizer, scheduler = build_optimizer(model, config, warmup_steps=2, total_steps=6)
    for step in range(6):
        factor = lr_factor(step, warmup=2, total=6, start=0.1, end=0.0)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(group["initial_lr"] * factor)
        optimizer.step()
        scheduler.step()
