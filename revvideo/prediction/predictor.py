"""A trained classifier on videos: whole ones, and over time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones.common.console import try_device
from revvideo.config import load_config
from revvideo.data.clips import collate, test_dataset, uniform_clips
from revvideo.data.decode import Video
from revvideo.data.loader import batches_to_test
from revvideo.data.manifest import VideoRecord
from revvideo.data.transforms import TestTransform, normalised
from revvideo.errors import VideoError
from revvideo.models import AUTOCAST, TOP_K
from revvideo.settings import Config
from revvideo.training.checkpoint import LAST
from revvideo.training.weights import load_run

LONG = 3.0  # clip lengths; scores over time say nothing about a video that is no longer
MOST_WINDOWS = 240


def load(run: str | Path, *, checkpoint: str = "", device: str = "auto") -> Predictor:
    """The classifier that a run has trained, on a video: ``revvideo.load(RUN)("clip.mp4")``.

    ``run`` is its ``train.output_dir``, ``checkpoint`` a file in the place of the newest one, and
    ``device`` ``cuda``, ``cpu``, …, or ``auto``: a GPU where there is one. A UserError says that
    the folder holds no run, or that its checkpoint cannot be read.
    """
    config = load_config(Path(run) / "config.yaml")
    file = checkpoint or str(Path(run) / "checkpoints" / LAST)
    on = try_device(device, f"device={device}", "try cpu")
    return Predictor(config, file, device=on, batch_size=16)


class Windows(NamedTuple):
    """Scores of a video over time, (windows, classes); when windows start and end, in seconds."""

    starts: list[float]
    ends: list[float]
    scores: Tensor


class Predictor:
    """Scores videos as testing does: the softmax of each view, averaged.

    ``config`` and ``weights`` are as for :func:`revvideo.training.weights.load_run`, which gives
    ``model`` and ``classes``, or a UserError; ``batch_size`` counts clips.
    """

    def __init__(
        self, config: Config, weights: str, *, device: torch.device, batch_size: int
    ) -> None:
        model, self.classes = load_run(weights, config)
        self.config, self.device, self.batch_size = config, device, batch_size
        self.model = model.to(device)

    def best(self, scores: Tensor) -> list[dict[str, Any]]:
        """The ``TOP_K`` best of scores (classes,), each as its ``class`` and ``score``."""
        values, labels = scores.topk(min(TOP_K, len(scores)))
        return [
            {"class": self.classes[label], "score": round(value, 6)}
            for value, label in zip(values.tolist(), labels.tolist(), strict=True)
        ]

    def __call__(self, path: str | Path) -> list[dict[str, Any]]:
        """The best classes of a video, the likeliest first; a VideoError if it cannot be read."""
        ((_, scores, problem),) = self.videos([Path(path)], workers=0)
        if scores is None:
            raise VideoError(problem)
        return self.best(scores)

    @torch.no_grad()
    def score(self, clips: Tensor) -> Tensor:
        """Clips (N, 3, T, H, W), as ``TestTransform`` gives them, to scores (N, classes)."""
        dtype = AUTOCAST[self.config.train.precision]
        scores = []
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            for part in clips.split(self.batch_size):
                part = part.to(self.device, non_blocking=True)
                logits = self.model(normalised(part, self.config.data))
                scores.append(logits.float().softmax(dim=1).cpu())
        return torch.cat(scores)

    def videos(
        self, paths: Sequence[Path], workers: int
    ) -> Iterator[tuple[Path, Tensor | None, str]]:
        """Score whole videos, decoded by ``workers`` processes besides this, or by this one.

        Yields path, scores (classes,) or None, and "" or the reason why the file cannot be used.
        """
        views = self.config.test.clips * self.config.test.crops
        records = [VideoRecord(str(path), label=-1) for path in paths]
        dataset = test_dataset(records, "", self.config.data, self.config.test)
        batches = batches_to_test(len(dataset), max(1, self.batch_size // views))
        loader: DataLoader[Any] = DataLoader(
            dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers
        )
        for batch in loader:
            for path, problem in batch["problems"]:
                yield Path(path), None, problem
            if len(batch["index"]):
                scores = self.score(batch["video"]).unflatten(0, (-1, views)).mean(dim=1)
                for index, row in zip(batch["index"][::views].tolist(), scores, strict=True):
                    yield paths[index], row, ""

    def windows(self, video: Video, step: float | None = None) -> Windows | None:
        """Scores of clips all along a video; None if it is no longer than ``LONG`` clips.

        From one window to the next it is at most ``step`` seconds, or half a clip's length, or
        more, so that there are no more than ``MOST_WINDOWS``. Damage is a VideoError.
        """
        data, test = self.config.data, self.config.test
        length = float(uniform_clips(data.num_frames, data.stride).duration)
        last = video.timestamps[-1]
        if last <= LONG * length:  # equal where both are 0: a single frame, of stills
            return None
        step = step or max(length / 2, (last - length) / (MOST_WINDOWS - 1))
        count = 1 + math.ceil((last - length) / step)
        clips = uniform_clips(data.num_frames, data.stride, clips=count)(video.timestamps)
        transform = TestTransform(replace(test, crops=1), data)
        # A clip's worth of large frames is fine, a group's would fill the memory.
        short_side = data.decode_short_side or 2 * test.short_side
        scores = []
        shown = {"desc": "over time", "unit": "batch", "leave": False, "delay": 2, "disable": None}
        for first in tqdm(range(0, count, self.batch_size), **shown):
            # Neighbours share frames: decoded together, each is decoded once.
            group = clips[first : first + self.batch_size]
            numbers = sorted({number for clip in group for number in clip})
            frames = video.frames(numbers, short_side)
            row = {number: row for row, number in enumerate(numbers)}
            views = [transform(frames[[row[number] for number in clip]]) for clip in group]
            scores.append(self.score(torch.cat(views)))
        starts, ends = ([video.timestamps[clip[place]] for clip in clips] for place in (0, -1))
        return Windows(starts, ends, torch.cat(scores))
