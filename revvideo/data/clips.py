"""Clips of labelled videos as a map-style dataset.

PyTorchVideo's ``LabeledVideoDataset`` is an iterable: its length is wrong with several workers, it
repeats or loses videos under DDP, and it puts another video in the place of one that does not
decode. Its clip samplers give times, those here the numbers of frames.
"""

from __future__ import annotations

import os
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset

from backbones.common.seeds import seed_of
from revvideo.data.decode import Video
from revvideo.data.manifest import VideoRecord
from revvideo.errors import VideoError

ClipSampler = Callable[[Sequence[float]], list[list[int]]]
"""Takes when each frame of a video is shown, in seconds; gives the frames of each clip."""

KINETICS_FPS = 30.0


@dataclass(frozen=True)
class _Clips:
    """A sampler of clips.

    Attributes:
        frames: of a clip.
        stride: from a frame of the clip to the next, counted in frames of a video at
            ``KINETICS_FPS``: clips of all videos are equally long in seconds, whatever their
            frame rate. Where a video ends before the clip does, its last frame is repeated.
    """

    frames: int
    stride: int

    def _clip(self, timestamps: Sequence[float], part: float, whole: int) -> list[int]:
        """The clip that starts at ``part / whole`` of the latest start."""
        latest = max(timestamps[-1] - (self.frames - 1) * self.stride / KINETICS_FPS, 0.0)
        # From the time of a frame on: rounded timestamps (Matroska: milliseconds) do no harm.
        first = timestamps[_nearest(timestamps, latest * part / whole)]
        times = [first + i * self.stride / KINETICS_FPS for i in range(self.frames)]
        return [_nearest(timestamps, time) for time in times]


@dataclass(frozen=True)
class RandomClip(_Clips):
    """A clip that starts anywhere in the video, drawn from torch's global generator.

    Attributes:
        views: how often to give it, for repeated augmentation.
    """

    views: int = 1

    def __call__(self, timestamps: Sequence[float]) -> list[list[int]]:
        part = float(torch.rand((), dtype=torch.float64))
        return [self._clip(timestamps, part, 1)] * self.views


@dataclass(frozen=True)
class UniformClips(_Clips):
    """Clips at equal distances, the first at the start of the video and the last at its end.

    A single clip lies in the middle. That is SlowFast's ``DATA.USE_OFFSET_SAMPLING``; without it,
    the last of ``n`` clips starts at ``(n - 1) / n`` of the latest start.

    Attributes:
        clips: how many.
    """

    clips: int = 1

    def __call__(self, timestamps: Sequence[float]) -> list[list[int]]:
        if self.clips == 1:
            return [self._clip(timestamps, 1, 2)]
        return [self._clip(timestamps, part, self.clips - 1) for part in range(self.clips)]


def _nearest(timestamps: Sequence[float], time: float) -> int:
    after = bisect_left(timestamps, time)
    neighbours = [place for place in (after, after - 1) if 0 <= place < len(timestamps)]
    return min(neighbours, key=lambda place: abs(timestamps[place] - time))


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips of videos, each under a seed of its own.

    A key is ``(index, position)``, as the samplers of :mod:`revvideo.data.sampler` give them. Which
    clips are taken and what ``transform`` draws at random depends on ``seed`` and ``position``
    alone, not on the process, the worker or what was read before. The global generators are left
    as they were.

    Args:
        records: the readable videos of a manifest.
        root: the folder that their paths start from.
        clips: which frames to take: ``RandomClip``, ``UniformClips``, or a function like them.
        transform: from a clip, uint8 (T, 3, H, W), to float (3, T, H, W), or (V, 3, T, H, W) for
            several crops. May draw from the global generators of torch, Python and NumPy.
        short_side: shrink frames to this many pixels on their shorter side while decoding.
        seed: of the run.

    A sample is a dict: ``video``, float (V, 3, T, H, W), V being all clips times all crops, or None
    if the file broke after the scan; ``label`` and ``index`` (of the record), int; ``path``; and
    ``problem``: "", or why there is no video.
    """

    def __init__(
        self,
        records: Sequence[VideoRecord],
        root: str | os.PathLike[str],
        clips: ClipSampler,
        transform: Callable[[Tensor], Tensor],
        *,
        short_side: int | None = None,
        seed: int = 0,
    ) -> None:
        # Arrays, not objects: touching an object in a worker copies its page of memory.
        self._paths = np.array([os.fsencode(record.path) for record in records])
        self._labels = np.array([record.label for record in records], dtype=np.int64)
        self._frames = np.array([record.frames for record in records], dtype=np.int64)
        self.root = os.fspath(root)
        self.clips = clips
        self.transform = transform
        self.short_side = short_side
        self.seed = seed

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, position = key
        path = os.fsdecode(self._paths[index])
        video, label, problem = None, int(self._labels[index]), ""
        seed = seed_of(self.seed, position)
        with isolate_rng(include_cuda=False):
            # Not torch.manual_seed, which would seed the generators of the GPUs as well.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            try:  # in here: an error that leaves isolate_rng would pass its end by
                video = self._views(os.path.join(self.root, path), index)
            except VideoError as error:
                problem = error.reason
        return {"video": video, "label": label, "index": index, "path": path, "problem": problem}

    def _views(self, path: str, index: int) -> Tensor:
        with Video(path, known_frames=int(self._frames[index])) as video:
            if video.truncated:
                raise VideoError(video.truncated)
            clips = self.clips(video.timestamps)
            frames = video.frames([number for clip in clips for number in clip], self.short_side)
        views = [self.transform(clip) for clip in frames.split([len(clip) for clip in clips])]
        views = [view if view.dim() == 5 else view[None] for view in views]
        return torch.cat(views) if len(views) > 1 else views[0]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join samples of a ``ClipDataset`` to a batch; of those that broke only the problem is kept.

    Returns:
        ``video``: float (N, 3, T, H, W), N being the views of all videos; ``label``, ``index``:
        int64 (N,); ``problems``: a list of (path, reason). If no video is left, N is 0, and
        ``video`` has the shape (0,).
    """
    good = [sample for sample in samples if sample["video"] is not None]
    views = torch.tensor([len(sample["video"]) for sample in good], dtype=torch.int64)

    def repeated(key: str) -> Tensor:
        values = torch.tensor([sample[key] for sample in good], dtype=torch.int64)
        return values.repeat_interleave(views)

    return {
        "video": torch.cat([sample["video"] for sample in good]) if good else torch.empty(0),
        "label": repeated("label"),
        "index": repeated("index"),
        "problems": [(s["path"], s["problem"]) for s in samples if s["video"] is None],
    }
