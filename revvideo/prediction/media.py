"""A copy of a video with a label drawn on every frame."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from backbones.common.files import replacing
from backbones.common.videos import h264_writer
from revvideo.data.decode import Video

# The unit of timestamps in the copy, in seconds: the usual frame rates are whole multiples of it.
TIME_BASE = Fraction(1, 90_000)
# Of the shorter side, in px: larger videos are shrunk, and on smaller ones nobody could read.
LARGEST_SIDE = 720
SMALLEST_SIDE = 240
FRAMES_AT_ONCE = 64


def frame_labels(times: Sequence[float], prediction: dict[str, Any]) -> list[str]:
    """For each time the best class of the nearest window of an entry of ``predictions.json``."""
    windows = prediction.get("windows") or [{"start": 0, "end": 0, "top": prediction["top"]}]
    middles = [(window["start"] + window["end"]) / 2 for window in windows]
    borders = [(a + b) / 2 for a, b in pairwise(middles)]
    best = [windows[bisect_right(borders, time)]["top"][0] for time in times]
    return [f"{top['class']}  {100 * top['score']:.0f}%" for top in best]


def write_labelled(video: Video, labels: Sequence[str], output: Path) -> None:
    """Write a soundless H.264 copy of labelled frames at their times; a VideoError for damage."""
    width, height = video.info.width, video.info.height
    side = min(width, height)
    scale = min(max(side, SMALLEST_SIDE), LARGEST_SIDE) / side
    size = 2 * round(width * scale / 2), 2 * round(height * scale / 2)  # even, for H.264
    frames = zip(_pictures(video), labels, video.timestamps, strict=True)
    shown = {"desc": output.name, "unit": "frame", "leave": False, "delay": 2, "disable": None}
    fast = {"crf": "20", "preset": "veryfast"}
    with (
        replacing(output) as partial,
        h264_writer(partial, TIME_BASE, fast, rate=video.info.fps) as write,
    ):
        for picture, label, time in tqdm(frames, total=len(video), **shown):
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            tag = _tag(label, size)
            picture.paste(tag, (0, size[1] - tag.height), tag)
            write(np.asarray(picture), round(time / TIME_BASE))


def _pictures(video: Video) -> Iterator[Image.Image]:
    for first in range(0, len(video), FRAMES_AT_ONCE):
        numbers = range(first, min(first + FRAMES_AT_ONCE, len(video)))
        yield from map(to_pil_image, video.frames(numbers, short_side=LARGEST_SIDE))


@lru_cache(maxsize=64)
def _tag(label: str, size: tuple[int, int]) -> Image.Image:
    """The label on a dark band, RGBA, as wide as the picture of ``size`` px."""
    width, height = size
    points = max(13, height // 16)
    while _font(points).getlength(label) > 0.96 * width and points > 8:
        points -= 1
    tag = Image.new("RGBA", (width, round(1.7 * points)), (0, 0, 0, 150))
    place = (0.02 * width, tag.height / 2)
    ImageDraw.Draw(tag).text(place, label, fill="white", font=_font(points), anchor="lm")
    return tag


@lru_cache
def _font(points: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has letters of many scripts."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), points)
