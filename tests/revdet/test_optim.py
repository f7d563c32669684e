"""What the optimizer gets of a recipe."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

import backbones
from revdet.config import load_config
from revdet.models import TrunkBackbone, find_trunk
from revdet.training.optim import get_optimizer_params, scale_learning_rate
from tests.revdet.conftest import DEMO


def detector(name: str, **arguments) -> nn.Module:
    trunk = backbones.create_model(name, img_size=32, num_classes=0, **arguments)
    return nn.ModuleDict({"backbone": TrunkBackbone(trunk), "head": nn.Linear(2, 2)})


def groups_by_name(model: nn.Module, layer_decay: float) -> dict[str, dict[str, Any]]:
    """Of every parameter the group that the optimizer has it in: just one."""
    groups = get_optimizer_params(model, 0.1, weight_decay_norm=0.0, layer_decay=layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=9.0, weight_decay=0.3)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len([*model.parameters()])
    return {name: of[id(parameter)] for name, parameter in model.named_parameters()}


def test_the_learning_rate_falls_from_block_to_block():
    groups = groups_by_name(detector("vit_tiny", depth=3, patch_size=8), 0.5)
    trunk = "backbone.model."
    expected = {f"{trunk}patch_embed": 1 / 16, f"{trunk}pos_embed": 1 / 16}
    expected |= {f"{trunk}blocks.{index}.": 1 / 2 ** (3 - index) for index in range(3)}
    expected |= {f"{trunk}norm": 1.0, "head": 1.0}
    for name, group in groups.items():
        (factor,) = (factor for start, factor in expected.items() if name.startswith(start))
        assert group["lr"] == pytest.approx(0.1 * factor), name


def test_layers_are_counted_through_stages_and_transitions():
    groups = groups_by_name(
        detector("rev_mvit_base", embed_dim=8, depth=5, transitions=(1, 3)), 0.5
    )
    parts = [f"stages.{i}.{part}." for i in (1, 2) for part in ("transition", "blocks")]
    rates = [
        {group["lr"] for name, group in groups.items() if f"backbone.model.{part}" in name}
        for part in ("stages.0.", *parts)
    ]
    assert rates == [{0.1 * 0.5**layer} for layer in (5, 4, 3, 2, 1)]
    assert groups["backbone.norms.scale2.weight"]["lr"] == 0.1


def test_norms_and_positions_have_no_weight_decay():
    model = detector("rev_vit_tiny", depth=2, patch_size=8, use_rel_pos=True, window_size=2)
    groups = groups_by_name(model, 0.5)
    assert {group["weight_decay"] for group in groups.values()} == {0.0, 0.3}
    without_decay = {name for name, group in groups.items() if group["weight_decay"] == 0}
    _, trunk = find_trunk(model)
    norms = [n for n, m in trunk.named_modules() if isinstance(m, nn.LayerNorm)]
    expected = {f"backbone.model.{n}.{kind}" for n in norms for kind in ("weight", "bias")}
    expected |= {name for name in groups if "rel_pos_" in name or "pos_embed." in name}
    assert without_decay == expected and any("rel_pos_h" in name for name in expected)


def test_layer_decay_needs_a_trunk():
    with pytest.raises(ValueError, match="TrunkBackbone"):
        get_optimizer_params(nn.Linear(2, 2), 0.1, layer_decay=0.5)
    assert get_optimizer_params(nn.Linear(2, 2), 0.1)[0]["lr"] == 0.1


def test_the_learning_rate_follows_the_batch(caplog):
    overrides = ["dataloader.train.total_batch_size=16", "optimizer.lr=1e-4"]
    cfg = load_config(DEMO, [*overrides, "train.reference_batch_size=64"])
    with caplog.at_level(logging.INFO, logger="revdet"):
        scale_learning_rate(cfg)
    assert cfg.optimizer.lr == pytest.approx(2.5e-5)
    assert "learning rate 2.5e-05 = 0.0001 × 16 / 64" in caplog.text
    cfg.optimizer.params.model = nn.Linear(2, 2)
    assert instantiate(cfg.optimizer).param_groups[0]["lr"] == pytest.approx(2.5e-5)

    unscaled = load_config(DEMO, overrides)
    scale_learning_rate(unscaled)
    assert unscaled.optimizer.lr == 1e-4
