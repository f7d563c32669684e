"""A very small build of the embedded dataset, and the command run inside the test process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from demo.detection import build
from revdet.config import load_config

DEMO = "configs/detection/demo/mask_rcnn_rev_vit_demo.py"

# A model and a schedule that run in a second or two.
SMALL = [
    "model.backbone.net.model.depth=2",
    "model.backbone.net.model.embed_dim=48",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "train.log_period=1",
    "train.pictures=0",
]
# An untrained model calls everything background; what it finds all the same has a score. Of that a
# few objects, because drawing takes its time.
FEW = [
    "model.roi_heads.box_predictor.test_topk_per_image=8",
    "model.roi_heads.box_predictor.test_score_thresh=0.0",
]


def detector(*overrides: str, recipe: str = DEMO) -> nn.Module:
    return instantiate(load_config(recipe, overrides).model)


def own_files(json: Path, images: Path) -> list[str]:
    """The dataset for training and validation on the command line."""
    files = [f"_json={json}", f"_images={images}"]
    return [f"dataset.{split}{file}" for split in ("train", "val") for file in files]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command has ended with."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="session")
def datasets_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 16 + 6 images in ``demo``."""
    root = tmp_path_factory.mktemp("datasets")
    build(root / "demo", train_images=16, val_images=6)
    return root


@pytest.fixture(autouse=True, scope="module")
def _found_as_datasets(datasets_root: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(datasets_root))
        yield


@pytest.fixture
def train_net(datasets_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``train_net(output, *arguments)``: the command on the small model; returns its status.

    It draws no curves, which would take longer than all the rest.
    """
    from revdet.train_net import main

    monkeypatch.setattr("revdet.training.results.draw_curves", lambda *_: None)

    def call(output: Path, *arguments: str, config: str = DEMO) -> int:
        torch.manual_seed(0)
        return main(["--config", config, f"train.output_dir={output}", *SMALL, *arguments])

    return call


@pytest.fixture
def refusal(train_net: Callable[..., int], tmp_path: Path, capsys: Any) -> Callable[..., str]:
    """``refusal(*arguments)``: the error of that command, which leaves no checkpoint."""

    def call(*arguments: str, **options: str) -> str:
        assert train_net(tmp_path / "refused", *arguments, **options) == 2
        assert not list(tmp_path.rglob("model*.pth"))
        return error_of(capsys)

    return call


class OwnData:
    """A copy of the small dataset under names of its own, to change and to train on."""

    def __init__(self, source: Path, root: Path) -> None:
        shutil.copytree(source / "train", root / "photos")
        self.images = root / "photos"
        self.json = root / "mine.json"
        self.content = json.loads((source / "annotations" / "instances_train.json").read_text())

    def arguments(self) -> list[str]:
        """Write the annotations; the dataset on the command line."""
        self.json.write_text(json.dumps(self.content))
        return own_files(self.json, self.images)

    def of_image(self, index: int) -> list[dict[str, Any]]:
        """The annotations of an image, given by its place in the list."""
        image_id = self.content["images"][index]["id"]
        return [a for a in self.content["annotations"] if a["image_id"] == image_id]


@pytest.fixture
def own(datasets_root: Path, tmp_path: Path) -> OwnData:
    return OwnData(datasets_root / "demo", tmp_path)
