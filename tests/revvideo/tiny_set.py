"""A set of very small videos for runs of a second or two, and the settings that go with it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from revvideo.errors import VideoError
from revvideo.training.metrics import read_metrics
from tests.revvideo.make_videos import encode

CLASSES = ("bright", "dark", "striped")

TINY = {"embed_dim": 8, "depth": 4, "transitions": [1, 3], "kv_stride": 2}

# What makes a run of any recipe small.
SHRINK = (
    "data.crop_size=32",
    "data.workers=0",
    f"model.arguments={TINY}",
    "optim.batch_size=4",
    "train.device=cpu",
    "train.log_every=1",
    "test.short_side=32",
)

# A run of a second or two. No drop path or augmentation by default: tests switch on what they are
# about.
SMALL = (
    *SHRINK,
    "data.num_frames=4",
    "data.stride=2",
    "augment.scale=[1.0,1.0]",
    "augment.ratio=[1.0,1.0]",
    "optim.epochs=2",
    "optim.lr=0.002",
    "optim.warmup_epochs=0",
    "test.clips=1",
    "test.batch_size=2",
)

# Everything that draws random numbers.
RANDOM = (
    "augment.flip=0.5",
    "augment.scale=[0.5,1.0]",
    "augment.rand_augment=rand-m7-n1-mstd0.5-inc1",
    "augment.erase=0.5",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.repeats=2",
    "augment.label_smoothing=0.1",
    "model.drop_path_rate=0.2",
    "model.drop_rate=0.2",
)


def write_video(path: Path, kind: str, seed: int) -> None:
    """A video of (40, 36) px at 30 frames per second whose picture tells its class."""
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(16):
        picture = rng.integers(0, 60, (36, 40, 3)) + {"bright": 180, "dark": 0}.get(kind, 90)
        if kind == "striped":
            picture[:, (number + np.arange(0, 40, 8)) % 40] = 255
        frames.append(picture.astype(np.uint8))
    encode(path, frames, "mpeg4")


def build_set(root: Path, train: int = 18, val: int = 7) -> Path:
    """``root/split/class/N.mp4``, as many videos as asked for, the classes in turn."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            kind = CLASSES[number % len(CLASSES)]
            write_video(root / split / kind / f"{number:02d}.mp4", kind, seed=number)
    return root


class Film:
    """In the place of an opened video: a frame at each of ``times``, brighter every time."""

    def __init__(self, times: Sequence[float], size=(64, 48), broken: int = -1) -> None:
        self.timestamps, self.size, self.broken = list(times), size, broken
        self.info = SimpleNamespace(width=size[0], height=size[1], fps=25.0)

    def __len__(self) -> int:
        return len(self.timestamps)

    def frames(self, numbers: Sequence[int], short_side: int = 10_000) -> torch.Tensor:
        if self.broken in numbers:
            raise VideoError(f"frame {self.broken} does not decode")
        scale = min(1, short_side / min(self.size))
        width, height = (round(scale * side) for side in self.size)
        levels = torch.tensor([100 + number % 100 for number in numbers], dtype=torch.uint8)
        return levels[:, None, None, None].expand(-1, 3, height, width)


# The model of the golden file of clips.
GOLDEN = Path(__file__).parents[1] / "golden" / "rev_mvit_video_tiny.pyth"
GOLDEN_MODEL = (
    "model.arguments={embed_dim: 10, depth: 5, transitions: [1, 3], kv_stride: 8}",
    "model.num_classes=5",
    "data.num_frames=4",
    "data.crop_size=64",
    "test.short_side=64",
)


def spoil(path: Path) -> None:
    """Break a file in a way that neither its size nor its time of change tells."""
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-900] + bytes(900))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def arguments(root: Path, output: Path, *more: str) -> Sequence[str]:
    """Of ``run.py``, for the small set in ``root``."""
    recipe = "configs/video/demo/motion.yaml"
    return ["--config", recipe, f"data.root={root}", f"train.output_dir={output}", *SMALL, *more]


def losses(output: Path) -> dict[int, float]:
    """Of a run, by step; no step twice."""
    rows = [row for row in read_metrics(output / "metrics.csv") if "train/loss" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {int(row["step"]): row["train/loss"] for row in rows}


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def predictions(output: Path) -> list[dict[str, str]]:
    with (output / "predictions.csv").open() as file:
        return list(csv.DictReader(file))
