"""Clips of labelled videos as a map-style dataset.

PyTorchVideo's ``LabeledVideoDataset`` is an iterable: its length is wrong with several workers, it
repeats or loses videos under DDP, and it puts another video in the place of one that does not
decode. Its clip samplers, and those here, say when a clip starts; which frames it has is said here.
"""

from __future__ import annotations

import os
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from pytorchvideo.data import clip_sampling
from pytorchvideo.data.clip_sampling import ClipInfo, ClipSampler
from torch import Tensor
from torch.utils.data import Dataset

from backbones.common.seeds import seed_of
from revvideo.data.decode import Video
from revvideo.data.manifest import VideoRecord
from revvideo.data.stills import IMAGES, Still
from revvideo.data.transforms import Erased, TestTransform
from revvideo.errors import VideoError
from revvideo.settings import AugmentConfig, DataConfig, TestConfig

KINETICS_FPS = 30.0


class RandomStart(ClipSampler):
    """A clip that starts anywhere, drawn from torch's global generator."""

    def __call__(self, last_clip_time: Any, video_duration: Any, annotation: Any) -> ClipInfo:
        length = float(self._clip_duration)
        part = float(torch.rand((), dtype=torch.float64))
        start = max(float(video_duration) - length, 0.0) * part
        return ClipInfo(start, start + length, 0, 0, is_last_clip=True)


class EvenStarts(clip_sampling.ConstantClipsPerVideoSampler):
    """Clips at equal distances, the first at the start of a video and the last at its end.

    A single clip lies in the middle. That is SlowFast's ``DATA.USE_OFFSET_SAMPLING``; without it,
    and from PyTorchVideo, the last of ``n`` starts at ``(n - 1) / n`` of the latest start.
    """

    def __call__(self, last_clip_time: Any, video_duration: Any, annotation: Any) -> ClipInfo:
        info = super().__call__(last_clip_time, video_duration, annotation)
        length, last = float(self._clip_duration), self._clips_per_video - 1
        part, whole = (info.clip_index, last) if last else (1, 2)
        start = max(float(video_duration) - length, 0.0) * part / whole
        return info._replace(clip_start_sec=start, clip_end_sec=start + length)


@dataclass(frozen=True)
class Clips:
    """The frames of clips that start where a sampler of PyTorchVideo says.

    A video and a clip last from their first frame to their last one. Strides are counted in frames
    of a video at ``KINETICS_FPS``: clips of all videos are equally long in seconds, whatever their
    frame rate. Where a video ends before the clip does, its last frame is repeated.
    """

    frames: int  # of a clip
    stride: int  # from one of them to the next
    sampler: Callable[..., ClipSampler] = RandomStart  # which remembers where it is in a video …
    arguments: tuple[int, ...] = ()  # … and what it is made of besides the duration
    views: int = 1  # how often to give each clip, for repeated augmentation

    @property
    def duration(self) -> Fraction:
        """Of a clip, in seconds."""
        return Fraction((self.frames - 1) * self.stride / KINETICS_FPS)

    def __call__(self, timestamps: Sequence[float], rate: float = 0.0) -> list[list[int]]:
        clips = []
        for start in _starts(self.sampler(self.duration, *self.arguments), timestamps[-1]):
            # From the time of a frame on: rounded timestamps (Matroska: milliseconds) do no harm.
            first = timestamps[_nearest(timestamps, start)]
            times = [first + i * self.stride / KINETICS_FPS for i in range(self.frames)]
            clips += [[_nearest(timestamps, time) for time in times]] * self.views
        return clips


@dataclass(frozen=True)
class PublishedClips(Clips):
    """The frames that the published scores were tested on, by their numbers.

    As SlowFast's ``slowfast/datasets/decoder.py`` takes them from a whole video: ``clips`` spans
    of ``frames * stride`` frames at ``KINETICS_FPS``, the last of which starts at
    ``(clips - 1) / clips`` of the latest start (``get_start_end_idx``), and frames at equal
    distances from the first to the last of a span, rounded down (``temporal_sampling``): those of a
    16x4 clip are 63 / 15 = 4.2 apart.
    """

    clips: int = 5

    def __call__(self, timestamps: Sequence[float], rate: float = KINETICS_FPS) -> list[list[int]]:
        count, size = len(timestamps), self.stride * self.frames / KINETICS_FPS * rate
        delta = max(count - size, 0)
        starts = [delta * clip / self.clips for clip in range(self.clips)]
        spans = [torch.linspace(start, start + size - 1, self.frames) for start in starts]
        return [span.clamp(0, count - 1).long().tolist() for span in spans]


def train_clips(data: DataConfig, augment: AugmentConfig) -> Clips:
    """The clips of a training video, ``augment.repeats`` of them."""
    frames, stride, repeats = data.num_frames, data.stride, augment.repeats
    if augment.clip_sampler == "exact":
        return Clips(frames, stride, views=repeats)
    sampler = partial(clip_sampling.make_clip_sampler, augment.clip_sampler)
    if augment.clip_sampler == "random_multi":
        return Clips(frames, stride, sampler, (repeats,))
    return Clips(frames, stride, sampler, views=repeats)


def test_clips(data: DataConfig, test: TestConfig) -> Clips:
    """The ``test.clips`` clips of a test video."""
    frames, stride, clips = data.num_frames, data.stride, test.clips
    if test.views == "published":
        return PublishedClips(frames, stride, clips=clips)
    if test.views == "even":
        return uniform_clips(frames, stride, clips)
    return Clips(frames, stride, partial(clip_sampling.make_clip_sampler, test.views), (clips,))


def uniform_clips(frames: int, stride: int, clips: int = 1) -> Clips:
    """So many ``clips`` by :class:`EvenStarts`."""
    return Clips(frames, stride, EvenStarts, (clips,))


def _starts(sampler: ClipSampler, duration: float) -> Iterator[float]:
    end: Any = 0
    while True:
        info = sampler(end, Fraction(duration), {})
        if isinstance(info.clip_start_sec, list):  # of random_multi: all at once
            yield from map(float, info.clip_start_sec)
            return
        yield float(info.clip_start_sec)
        if info.is_last_clip:
            return
        end = info.clip_end_sec


def _nearest(timestamps: Sequence[float], time: float) -> int:
    after = min(bisect_left(timestamps, time), len(timestamps) - 1)
    return min(after, max(after - 1, 0), key=lambda place: abs(timestamps[place] - time))


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips of videos, each under a seed of its own.

    A key is ``(index, position)``, as the samplers of :mod:`revvideo.data.loader` give them. Which
    clips are taken and what ``transform`` draws at random, from the global generators of torch,
    Python and NumPy, depends on ``seed`` and ``position`` alone, not on the process, the worker or
    what was read before. The generators are left as they were.

    ``clips`` takes when each frame of a video is shown, in seconds, and its frames per second, to
    the numbers of the frames of each clip; ``transform`` a clip, uint8 (T, 3, H, W), to
    (3, T, H, W), or (V, 3, T, H, W) for several crops; or to a clip and which box of it is to be
    erased, or None. ``short_side`` is as of :meth:`revvideo.data.decode.Video.frames`.

    A sample is a dict: ``video``, (V, 3, T, H, W), V being all clips times all crops, or None if
    the file broke after the scan; ``erased``, of each clip; ``label`` and ``index`` (of the
    record), int; ``path``; and ``problem``: "", or why there is no video.
    """

    def __init__(
        self,
        records: Sequence[VideoRecord],
        root: str | os.PathLike[str],
        clips: Callable[[Sequence[float], float], list[list[int]]],
        transform: Callable[[Tensor], Tensor | tuple[Tensor, Erased | None]],
        *,
        short_side: int | None = None,
        seed: int = 0,
        opened: type[Video | Still] = Video,
    ) -> None:
        # Arrays, not objects: touching an object in a worker copies its page of memory.
        self._paths = np.array([os.fsencode(record.path) for record in records])
        self._labels = np.array([record.label for record in records], dtype=np.int64)
        self._frames = np.array([record.frames for record in records], dtype=np.int64)
        self._indices = {
            number: (record.index, (record.size, record.mtime_ns))
            for number, record in enumerate(records)
            if record.index
        }
        self.root = os.fspath(root)
        self.clips, self.transform = clips, transform
        self.short_side, self.seed, self.opened = short_side, seed, opened

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, position = key
        path, seed = os.fsdecode(self._paths[index]), seed_of(self.seed, position)
        video, problem = None, ""
        erased: list[Erased | None] = []
        with isolate_rng(include_cuda=False):
            # Not torch.manual_seed, which would seed the generators of the GPUs as well.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            try:  # in here: an error that leaves isolate_rng would pass its end by
                video, erased = self._views(os.path.join(self.root, path), index)
            except VideoError as error:
                problem = str(error)
        sample = {"video": video, "erased": erased, "label": int(self._labels[index])}
        return {**sample, "index": index, "path": path, "problem": problem}

    def _views(self, path: str, index: int) -> tuple[Tensor, list[Erased | None]]:
        text, scanned = self._indices.get(index, ("", ()))
        with suppress(OSError):  # opening it says so
            status = os.stat(path) if text else None
            if status and (status.st_size, status.st_mtime_ns) != scanned:
                text = ""
        frames = int(self._frames[index])
        with self.opened(path, whole=True, known_frames=frames, known_index=text) as video:
            clips = self.clips(video.timestamps, video.rate)
            numbers = [number for clip in clips for number in clip]
            decoded = video.frames(numbers, self.short_side)
        views, erased = [], []
        for clip in decoded.split([len(clip) for clip in clips]):
            made = self.transform(clip)
            view, box = made if isinstance(made, tuple) else (made, None)
            views.append(view if view.dim() == 5 else view[None])
            erased.append(box)
        return torch.cat(views) if len(views) > 1 else views[0], erased


def opened_as(data: DataConfig) -> type[Video | Still]:
    """What the files of a layout are."""
    return Still if data.layout == IMAGES else Video


def test_dataset(
    records: Sequence[VideoRecord], root: str | Path, data: DataConfig, test: TestConfig
) -> ClipDataset:
    """The clips and crops by which videos are tested, in which nothing is random."""
    short_side = None if test.views == "published" else data.decode_short_side or None
    return ClipDataset(
        records,
        root,
        test_clips(data, test),
        TestTransform(test, data),
        short_side=short_side,
        opened=opened_as(data),
    )


test_clips.__test__ = test_dataset.__test__ = False  # type: ignore[attr-defined]  # pytest


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join samples of a ``ClipDataset`` to a batch; of those that broke only the problem is kept.

    ``video``: (N, 3, T, H, W), N being the views of all videos, or (0,) if none is left;
    ``erased``: a list, of each clip; ``label``, ``index``: int64 (N,); ``problems``: a list of
    (path, reason).
    """
    good = [sample for sample in samples if sample["video"] is not None]
    batch: dict[str, Any] = {
        "video": torch.cat([sample["video"] for sample in good]) if good else torch.empty(0),
        "erased": [box for sample in good for box in sample["erased"]],
        "problems": [(s["path"], s["problem"]) for s in samples if s["video"] is None],
    }
    views = torch.tensor([len(sample["video"]) for sample in good], dtype=torch.int64)
    for key in ("label", "index"):
        values = torch.tensor([sample[key] for sample in good], dtype=torch.int64)
        batch[key] = values.repeat_interleave(views)
    return batch
