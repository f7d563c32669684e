"""Models of images under the trainer of videos: folders of images in, the accuracy that the command
`python -m backbones evaluate` measures out."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import backbones
import revvideo
from backbones.__main__ import main as backbones_command
from backbones.common.errors import UserError
from revvideo.config import load_config
from revvideo.data.stills import find_stills
from revvideo.models import build_model
from revvideo.predict import main as predict
from revvideo.run import main
from revvideo.training.weights import load_run
from tests.revvideo.test_resume import left_by, run_with_signal
from tests.revvideo.tiny_set import predictions, results

RECIPES = Path("configs/image")
TINY = (
    "model.name=rev_vit_tiny",
    "model.weights=",
    "model.arguments={depth: 2, embed_dim: 48, num_heads: 3, patch_size: 8}",
    "data.crop_size=32",
    "data.workers=0",
    "optim.batch_size=8",
    "optim.lr=0.004",
    "optim.warmup_epochs=0",
    "optim.epochs=2",
    "train.device=cpu",
    "train.precision=32-true",
    "train.log_every=1",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Crops of four photographs, each a class: 12 to train on, 6 to validate, and two bad files."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        whole = getattr(skimage.data, name)()
        for number in range(18):
            top, left = (rng.integers(side - 128) for side in whole.shape[:2])
            path = root / ("train" if number < 12 else "val") / name / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            crop = Image.fromarray(whole[top : top + 128, left : left + 128])
            crop.resize((64, 48 if number % 2 else 64)).save(path)
    whole = (root / "val/coffee/12.png").read_bytes()
    (root / "val/coffee/cut.png").write_bytes(whole[:-300])
    (root / "train/coffee/text.jpg").write_text("no image")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(root / "train/coffee/deep.png")
    for name, leads_to in {"loop": "coffee", "twin": "coffee", "up": ""}.items():
        (root / "val/coffee" / name).symlink_to(root / "val" / leads_to)  # no more images by that
    Image.new("RGB", (9, 9)).save(root / "val/coffee/.hidden.png")
    return root


@pytest.fixture
def train(images, monkeypatch):
    monkeypatch.setattr("revvideo.training.results.draw_curves", lambda *_: None)
    monkeypatch.setattr("revvideo.training.module.complexity_table", lambda *_: "")

    def call(output: Path, *more: str) -> int:
        recipe = ["--config", str(RECIPES / "finetune/rev_vit_base.yaml"), f"data.root={images}"]
        return main([*recipe, f"train.output_dir={output}", *TINY, *more])

    return call


def test_a_stopped_run_goes_on_exactly_and_evaluation_agrees(
    train, images, tmp_path, monkeypatch, capfd
):
    more = ["augment.mixup=0.8", "augment.cutmix=1", "optim.ema=0.9"]
    assert train(tmp_path / "whole", *more) == 0
    stopped = tmp_path / "stopped"
    assert run_with_signal(train, stopped, monkeypatch, signal.SIGTERM, 7, *more) == 143
    assert train(stopped, *more, "--resume") == 0
    assert left_by(stopped) == left_by(tmp_path / "whole")

    found, log = results(stopped), (stopped / "log.txt").read_text()
    assert "train/coffee/text.jpg: cannot be read (cannot identify image file)" in log
    assert "train/coffee/deep.png: cannot be read (more than 8 bits a channel" in log
    assert "on 24 of 25 images" in log and "val/coffee/cut.png" in json.dumps(found)
    config = load_config(stopped / "config.yaml")
    model, classes = load_run(stopped / "checkpoints/last.ckpt", config)
    assert classes == ["astronaut", "chelsea", "coffee", "rocket"]
    backbones.save_weights(model, tmp_path / "own.safetensors")
    given = ["--data", str(images), "--device", "cpu", "--workers", "0"]
    given += ["--json", str(tmp_path / "e.json"), "--weights", str(tmp_path / "own.safetensors")]
    assert not backbones_command(["evaluate", *given])
    evaluated = json.loads((tmp_path / "e.json").read_text())
    right = sum(row["class"] == row["top1"] for row in predictions(stopped))
    assert evaluated["evaluated"] == 24 and evaluated["top1"] == pytest.approx(100 * right / 24)

    top = revvideo.load(stopped, device="cpu")(images / "val/rocket/12.png")
    assert {entry["class"] for entry in top} == set(classes)
    command = ["--weights", "w", "--input", "x", "--output", "y"]
    assert predict(["--config", str(stopped / "config.yaml"), *command]) == 2
    assert "python -m backbones predict IMAGES --model rev_vit_tiny" in capfd.readouterr().err


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_build_and_step(recipe):
    size, width = (64, "embed_dim=16") if "mvit" in recipe.stem else (32, "depth=1")
    size = 28 if "dinov2" in recipe.stem else size
    small = [f"data.crop_size={size}", f"model.arguments.{width}", "model.weights="]
    model = build_model(load_config(recipe, small), 7)
    images = torch.randn(1, 3, 1, size, size)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model(images[:, :, 0]))


@pytest.mark.parametrize(
    "more, parts",
    [
        (["data.num_frames=2"], ["data.num_frames=1"]),
        (["test.clips=3"], ["test.clips=1"]),
        (["data.mean=0.5"], ["data.mean=0.5", "ImageNet's"]),
        (["model.name=rev_mvit_base_16x4", "model.arguments={}"], ["a model of images"]),
        (["data.val_split=none"], ["holds no folders of classes with images"]),
    ],
)
def test_what_is_wrong_is_one_line(train, tmp_path, capfd, more, parts):
    assert train(tmp_path / "run", *more) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert error.startswith("error: ") and all(part in error for part in parts), error


def test_folders_that_are_refused(tmp_path):
    for name in ("val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "val/a/1.png")
    with pytest.raises(UserError, match=r"no image in .*val is of b"):
        find_stills(tmp_path, "val", None)
    with pytest.raises(UserError, match=r"class 'b' in .*val is none of the 1 of the model"):
        find_stills(tmp_path, "val", ["a"])
