"""Every recipe builds what it is named after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import backbones
from revvideo.config import load_config
from revvideo.data.transforms import TestTransform, TrainTransform
from revvideo.models import build_model

ROOT = Path("configs/video")
RECIPES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_a_model_and_clips_that_fit_it(recipe):
    config = load_config(ROOT / recipe)
    with torch.device("meta"):
        model = build_model(config, 101)
    frames = torch.randint(0, 256, (config.data.num_frames, 3, 60, 80), dtype=torch.uint8)
    clip = TrainTransform(config.augment, config.data)(frames)
    size = config.data.crop_size
    assert clip.shape == (3, config.data.num_frames, size, size)
    assert TestTransform(config.test, config.data)(frames).shape == (config.test.crops, *clip.shape)
    outputs = config.model.num_classes or 101
    assert model(clip[None].to("meta")).shape == (1, outputs)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("kinetics400/rev_mvit_b_16x4.yaml", 34_963_120),
        ("kinetics600/rev_mvit_b_32x3.yaml", 51_823_800),  # published: 51.8 M
    ],
)
def test_models_have_their_published_size(recipe, parameters):
    with torch.device("meta"):
        model = build_model(load_config(ROOT / recipe))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_published_settings():
    """Of SlowFast's yaml, whose learning rates are for one of 16 machines with 16 videos each."""
    config = load_config(ROOT / "kinetics400/rev_mvit_b_16x4.yaml")
    assert config.optim.lr == pytest.approx(16 * 1e-4)
    for factor in (config.optim.start_factor, config.optim.end_factor):
        assert config.optim.lr * factor == pytest.approx(16 * 1e-6)
    assert config.optim.batch_size == 16 * 16 and config.augment.repeats == 2
    assert (config.optim.epochs, config.optim.warmup_epochs) == (200, 50)
    assert config.optim.weight_decay == 0.07 and config.model.drop_path_rate == 0.05
    assert (config.augment.mixup, config.augment.cutmix) == (0.8, 1.0)
    assert config.augment.rand_augment == "rand-m7-n4-mstd0.5-inc1"
    assert (config.test.clips, config.test.crops, config.test.short_side) == (5, 1, 256)


def test_the_twin_differs_in_the_coupling():
    models = []
    for name in ("rev_mvit_b_16x4", "mvit_b_16x4"):
        with torch.device("meta"):
            models.append(build_model(load_config(ROOT / f"kinetics400/{name}.yaml")))
    reversible, twin = models
    assert any(isinstance(m, backbones.ReversibleBlock) for m in reversible.modules())
    assert not any(isinstance(m, backbones.ReversibleBlock) for m in twin.modules())
    blocks = [
        {n: p.shape for n, p in model.named_parameters() if n.startswith("stages.0.")}
        for model in models
    ]
    assert sorted(blocks[0].values()) == sorted(blocks[1].values())


def test_motions_are_not_mirrored():
    assert load_config(ROOT / "demo/motion.yaml").augment.flip == 0
