"""What the optimizer gets of a recipe."""

from __future__ import annotations

import logging

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

import backbones
from revdet.config import load_config
from revdet.models import TrunkBackbone, find_trunk
from revdet.training.optim import get_optimizer_params, layer_factors, scale_learning_rate
from tests.revdet.conftest import DEMO


def detector(name: str, **arguments) -> nn.Module:
    trunk = backbones.create_model(name, img_size=32, num_classes=0, **arguments)
    return nn.ModuleDict({"backbone": TrunkBackbone(trunk), "head": nn.Linear(2, 2)})


def test_the_learning_rate_falls_from_block_to_block():
    factors = layer_factors(detector("vit_tiny", depth=3, patch_size=8), 0.5)
    trunk = "backbone.model."
    assert (
        factors[f"{trunk}patch_embed.proj.weight"] == factors[f"{trunk}pos_embed.weight"] == 1 / 16
    )
    blocks = {name: f for name, f in factors.items() if name.startswith(f"{trunk}blocks.")}
    assert {name.split(".")[3]: f for name, f in blocks.items()} == {
        "0": 1 / 8,
        "1": 1 / 4,
        "2": 1 / 2,
    }
    rest = {f for name, f in factors.items() if name.startswith((f"{trunk}norm", "head"))}
    assert rest == {1.0}


def test_layers_are_counted_through_stages_and_transitions():
    model = detector("rev_mvit_base", embed_dim=8, depth=5, transitions=(1, 3))
    factors = layer_factors(model, 0.5)
    parts = [f"stages.{i}.{part}." for i in (1, 2) for part in ("transition", "blocks")]
    layers = [
        {factor for name, factor in factors.items() if name.startswith(f"backbone.model.{part}")}
        for part in ("stages.0.", *parts)
    ]
    assert layers == [{0.5**5}, {0.5**4}, {0.5**3}, {0.5**2}, {0.5}]
    assert factors["backbone.norms.scale2.weight"] == 1.0


def test_parameter_groups_hold_every_parameter_once():
    model = detector("rev_vit_tiny", depth=2, patch_size=8, use_rel_pos=True, window_size=2)
    groups = get_optimizer_params(model, 0.1, weight_decay_norm=0.0, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=9.0, weight_decay=0.3)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len([*model.parameters()])
    factors = layer_factors(model, 0.5)
    without_decay = set()
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        assert group["lr"] == pytest.approx(0.1 * factors[name])
        assert group["weight_decay"] in (0.0, 0.3)
        if group["weight_decay"] == 0.0:
            without_decay.add(name)
    _, trunk = find_trunk(model)
    norms = [n for n, m in trunk.named_modules() if isinstance(m, nn.LayerNorm)]
    expected = {f"backbone.model.{n}.{kind}" for n in norms for kind in ("weight", "bias")}
    expected |= {name for name in factors if "rel_pos_" in name or "pos_embed." in name}
    assert without_decay == expected and any("rel_pos_h" in name for name in expected)


def test_layer_decay_needs_a_trunk_and_a_sensible_value():
    with pytest.raises(ValueError, match="TrunkBackbone"):
        layer_factors(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"\(0, 1\], got 1\.5"):
        layer_factors(nn.Linear(2, 2), 1.5)
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
