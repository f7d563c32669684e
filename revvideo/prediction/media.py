"""A copy of a video with a label drawn on every frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from backbones.common.files import replacing
from revvideo.data.decode import Video

# The unit of timestamps in the copy, in seconds: the usual frame rates are whole multiples of it.
TIME_BASE = Fraction(1, 90_000)
# Of the shorter side, in px: larger videos are shrunk, and on smaller ones nobody could read.
LARGEST_SIDE = 720
SMALLEST_SIDE = 240
FRAMES_AT_ONCE = 64
# What an mp4 file can hold as it is; other sound is left out.
MP4_SOUND = frozenset({"aac", "ac3", "alac", "eac3", "mp3", "opus"})


def write_labelled(source: Path, video: Video, labels: Sequence[str], output: Path) -> None:
    """Write an H.264 copy of a video, each frame with its label.

    Frames keep their times, and sound comes along where mp4 can hold it.

    Args:
        source: the file of ``video``.
        video: opened.
        labels: one for each frame.
        output: the mp4 to write, whole or not at all.

    Raises:
        VideoError: a frame does not decode.
    """
    with (
        replacing(output) as partial,
        av.open(partial, "w", format="mp4") as container,
        _Sound(source) as sound,
    ):
        size = _drawn_size(video.info.width, video.info.height)
        rate = Fraction(video.info.fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate, {"crf": "20", "preset": "veryfast"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = TIME_BASE
        sound.add_stream(container)
        frames = zip(_pictures(video), labels, video.timestamps, strict=True)
        shown = {"desc": output.name, "unit": "frame", "leave": False, "delay": 2, "disable": None}
        for picture, label, time in tqdm(frames, total=len(video), **shown):
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            tag = _tag(label, size)
            picture.paste(tag, (0, size[1] - tag.height), tag)
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = round(time / TIME_BASE), TIME_BASE
            container.mux(sound.until(time))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.mux(sound.until(math.inf))


def _drawn_size(width: int, height: int) -> tuple[int, int]:
    """Of the copy. Sides are even, as H.264 wants them."""
    side = min(width, height)
    scale = min(max(side, SMALLEST_SIDE), LARGEST_SIDE) / side
    return 2 * round(width * scale / 2), 2 * round(height * scale / 2)


def _pictures(video: Video) -> Iterator[Image.Image]:
    for first in range(0, len(video), FRAMES_AT_ONCE):
        numbers = range(first, min(first + FRAMES_AT_ONCE, len(video)))
        for picture in video.frames(numbers, short_side=LARGEST_SIDE):
            yield Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))


@lru_cache(maxsize=64)
def _tag(label: str, size: tuple[int, int]) -> Image.Image:
    """The label on a dark band, RGBA, as wide as the picture of ``size`` px."""
    width, height = size
    points = max(13, height // 16)
    font = _font(points)
    while font.getlength(label) > 0.96 * width and points > 8:
        points -= 1
        font = _font(points)
    tag = Image.new("RGBA", (width, round(1.7 * points)), (0, 0, 0, 150))
    place = (0.02 * width, tag.height / 2)
    ImageDraw.Draw(tag).text(place, label, fill="white", font=font, anchor="lm")
    return tag


@lru_cache
def _font(points: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has letters of many scripts."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), points)


def _fits_mp4(stream: Any) -> bool:
    codec = stream.codec_context  # None if FFmpeg does not know it
    return codec is not None and codec.codec.canonical_name in MP4_SOUND


class _Sound:
    """The packets of a file's sound, to be copied without decoding."""

    def __init__(self, source: Path) -> None:
        self._original = av.open(f"file:{source.absolute()}", metadata_errors="ignore")
        streams = self._original.streams.audio
        self._stream = next((stream for stream in streams if _fits_mp4(stream)), None)
        self._packets: Iterator[Any] = iter(())

    def __enter__(self) -> _Sound:
        return self

    def __exit__(self, *error: object) -> None:
        self._original.close()

    def add_stream(self, container: Any) -> None:
        """Make room for the sound in ``container``."""
        if self._stream is not None:
            copy = container.add_stream_from_template(self._stream)
            self._packets = self._shifted(copy)

    def until(self, time: float) -> list[Any]:
        """The packets that come next, up to ``time`` in seconds after the first picture."""
        taken = []
        for packet in self._packets:
            taken.append(packet)
            if packet.dts * packet.time_base >= time:
                break
        return taken

    def _shifted(self, copy: Any) -> Iterator[Any]:
        """The copy's pictures start at 0: so does the time of the sound."""
        video = self._original.streams.video[0]
        begin = (video.start_time or 0) * (video.time_base or 0)
        try:
            for packet in self._original.demux(self._stream):
                if packet.pts is not None and packet.dts is not None:
                    shift = round(begin / packet.time_base)
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    packet.stream = copy
                    yield packet
        except av.error.FFmpegError:
            return  # the file is damaged; sound ends where it does
