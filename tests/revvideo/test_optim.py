"""Parameter groups and the learning rate, step by step."""

from __future__ import annotations

import math

import pytest

import backbones
from revvideo.settings import OptimConfig
from revvideo.training.optim import build_optimizer, lr_factor, param_groups


@pytest.fixture(scope="module")
def model():
    return backbones.create_model(
        "rev_mvit_base_16x4",
        num_frames=4,
        img_size=32,
        embed_dim=8,
        depth=4,
        transitions=(1, 3),
        num_classes=3,
    )


def test_every_parameter_is_in_one_group_and_only_matrices_decay(model):
    groups = param_groups(model, lr=0.1, weight_decay=0.05)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.05 if p.ndim > 1 else 0.0)
        assert group["lr"] == 0.1


def test_layer_decay_falls_from_the_head_to_the_stem(model):
    groups = param_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    depths = {name: -math.log2(rates[id(p)]) for name, p in model.named_parameters()}
    assert {depths[name] for name in depths if name.startswith(("head", "norm"))} == {0}
    # Four blocks, of which the second and the fourth are transitions.
    assert {v for n, v in depths.items() if n.startswith("stages.2.transition")} == {1}
    assert {v for n, v in depths.items() if n.startswith("stages.1.blocks")} == {2}
    assert {v for n, v in depths.items() if n.startswith("stages.1.transition")} == {3}
    assert {v for n, v in depths.items() if n.startswith("stages.0.blocks")} == {4}
    assert {v for n, v in depths.items() if n.startswith(("patch_embed", "pos_embed"))} == {5}
    # The first group is the head's: its rate is the one that is logged.
    assert groups[0]["lr"] == 1.0


def test_frozen_parameters_are_left_out(model):
    model.head.requires_grad_(False)
    listed = {id(p) for group in param_groups(model, 1.0, 0.0) for p in group["params"]}
    model.head.requires_grad_(True)
    assert id(model.head.weight) not in listed and id(model.norm.weight) in listed


def test_the_schedule_has_its_published_points():
    schedule = dict(warmup=10, total=110, start=0.01, end=0.02)
    assert lr_factor(0, **schedule) == 0.01
    assert lr_factor(5, **schedule) == pytest.approx(0.505)
    assert lr_factor(10, **schedule) == 1.0
    assert lr_factor(60, **schedule) == pytest.approx(0.51)
    assert lr_factor(110, **schedule) == pytest.approx(0.02)
    assert lr_factor(500, **schedule) == pytest.approx(0.02)
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
