"""Every recipe trains and tests as it stands, and builds what it is named after."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import backbones
from backbones.registry import MODELS
from revvideo.config import load_config, save_config
from revvideo.data.transforms import TestTransform, TrainTransform, normalised
from revvideo.models import build_model
from revvideo.run import main
from tests.revvideo.tiny_set import CLASSES, SHRINK, TINY, losses, results

ROOT = Path("configs/video")
RECIPES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/*.yaml"))

# How the videos lie, in each of the layouts that people have; folders of classes where none is
# named. The labels of a list are those of the model, which may have more classes.
LAYOUTS = {
    "finetune/ucf101.yaml": "ucf101",
    "kinetics400/rev_mvit_b_16x4.yaml": "list",
    "kinetics600/rev_mvit_b_32x3.yaml": "csv",
}

PARAMETERS = {
    "kinetics400/rev_mvit_b_16x4.yaml": 34_963_120,
    "kinetics600/rev_mvit_b_32x3.yaml": 51_823_800,  # published: 51.8 M
}


def lay_out(videos: Path, folder: Path, layout: str) -> list[str]:
    """Describe the small set in ``folder`` as people have theirs; gives the overrides for it."""
    if layout == "folders":
        return [f"data.root={videos}"]
    for split, name in (("train", "trainlist01.txt"), ("val", "testlist01.txt")):
        lines = {"ucf101": [], "list": [], "csv": ["label,youtube_id,time_start,time_end,split"]}
        for path in sorted(videos.glob(f"{split}/*/*.mp4")):
            kind, label = path.parent.name, CLASSES.index(path.parent.name)
            copy = folder / "UCF-101" / kind / f"{split}{path.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
            lines["ucf101"].append(f"{kind}/{copy.name} {label + 1}")
            lines["list"].append(f"{path} {label}")
            lines["csv"].append(f"{kind},{path.stem},0,10,{split}")
        file = name if layout == "ucf101" else f"{split}.csv"
        (folder / file).write_text("\n".join(lines[layout]))
    if layout == "ucf101":
        return [f"data.root={folder / 'UCF-101'}", f"data.annotations={folder}/{{split}}01.txt"]
    annotations = f"data.annotations={folder}/{{split}}.csv"
    return [f"data.root={videos}", f"data.layout={layout}", annotations]


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        *((recipe, []) for recipe in RECIPES),
        # What no recipe names.
        ("demo/motion.yaml", ["test.crops=3", "optim.ema=0.5", "augment.color_jitter=0.4"]),
    ],
)
def test_a_recipe_trains_two_steps_and_is_tested(recipe, more, videos, tmp_path, monkeypatch):
    monkeypatch.setattr("revvideo.training.results.draw_curves", lambda *_: None)
    own = load_config(ROOT / recipe)
    layout, output = LAYOUTS.get(recipe, "folders"), tmp_path / "run"
    # Augmentations, views, schedule and precision are those of the recipe.
    overrides = [*SHRINK, "data.decode_short_side=32", "optim.max_steps=2", *more]
    overrides += [f"train.output_dir={output}", *lay_out(videos, tmp_path, layout)]
    if own.model.num_classes and layout != "list":
        overrides.append("model.num_classes=3")
    if own.model.weights:
        # In the place of the released file: of other classes, so that its head is left out.
        other = backbones.create_model(own.model.name, num_classes=5, **TINY)
        backbones.save_weights(other, tmp_path / "weights.safetensors")
        overrides.append(f"model.weights={tmp_path / 'weights.safetensors'}")
    assert main(["--config", str(ROOT / recipe), *overrides]) == 0
    found = results(output)
    assert found["run"]["steps"] == 2 and found["left_out"] == {}
    assert sorted(losses(output)) == [0, 1] and all(map(math.isfinite, losses(output).values()))
    used = load_config(output / "config.yaml")
    assert found["test"]["videos"] == found["test"]["of"] == 7
    assert found["test"]["clips"] == own.test.clips and found["test"]["crops"] == used.test.crops
    assert more or used.augment == own.augment


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_a_model_and_clips_that_fit_it(recipe, tmp_path):
    config = load_config(ROOT / recipe)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert recipe != "demo/motion.yaml" or config.augment.flip == 0  # mirrored, it is another
    with torch.device("meta"):
        model = build_model(config, 101)
    frames = torch.randint(0, 256, (config.data.num_frames, 3, 60, 80), dtype=torch.uint8)
    clip = normalised(TrainTransform(config.augment, config.data)(frames)[0], config.data)
    size = config.data.crop_size
    assert clip.shape == (3, config.data.num_frames, size, size)
    assert TestTransform(config.test, config.data)(frames).shape == (config.test.crops, *clip.shape)
    assert model(clip[None].to("meta")).shape == (1, config.model.num_classes or 101)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get(recipe, count)


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
    assert config.test.published_top1 == MODELS["rev_mvit_base_16x4"].top1


def test_the_twin_differs_in_the_coupling():
    names = ("rev_mvit_b_16x4", "mvit_b_16x4")
    own, twin = (load_config(ROOT / f"kinetics400/{name}.yaml") for name in names)
    assert (own.model.name, twin.model.name) == ("rev_mvit_base_16x4", "mvit_base_16x4")
    assert (own.data, own.augment, own.model.arguments) == (twin.data, twin.augment, {})
    arguments = [MODELS[config.model.name].arguments for config in (own, twin)]
    assert arguments[0] == {**arguments[1], "fusion": "avg"}  # of the two streams
