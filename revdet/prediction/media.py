"""Which files are looked at, and the frames of videos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from backbones.common.errors import UserError, error_line, optional_import
from backbones.common.images import image_suffixes
from backbones.common.videos import open_container

# By these, a file is taken for a video.
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
SUFFIXES = {*image_suffixes(), *VIDEO_SUFFIXES}  # of what is looked for in folders


def import_av() -> Any:
    """PyAV, which only videos need; a UserError if it is not installed."""
    try:
        return optional_import("av", "detection", "reading videos")
    except ImportError as error:  # there, but broken
        raise UserError(str(error)) from error


class UnreadableError(UserError):
    """A file that is no video, or pictures that cannot be used; the message has no path."""


class VideoReader(AbstractContextManager["VideoReader"]):
    """The frames of a video, upright, for use in a ``with`` statement.

    An UnreadableError says that the file is no video, a UserError that PyAV is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._av = import_av()
        try:
            self._container = open_container(str(path))
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise UnreadableError(error_line(error)) from error
        if not self._container.streams.video:
            self._container.close()
            raise UnreadableError("holds no video")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.time_base: Fraction = self._stream.time_base  # of the frames' times, in seconds
        rate = self._stream.average_rate or Fraction(25)
        self._step = max(1, round(1 / rate / self.time_base))
        seconds = Fraction(self._container.duration or 0, 1_000_000)
        if self._stream.duration is not None:
            seconds = self._stream.duration * self.time_base
        self.num_frames = self._stream.frames or round(seconds * rate)  # 0 if no header says it
        self.error = ""  # why decoding has stopped before the end

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield each frame as (H, W, 3) uint8 RGB, and its time in ``time_base``, which grows."""
        last = -1
        try:
            for frame in self._container.decode(self._stream):
                # Some files have no times, or such as go back; they shall still play in order.
                later = frame.pts is not None and frame.pts > last
                last = frame.pts if later else last + (self._step if last >= 0 else 1)
                pixels = frame.to_ndarray(format="rgb24")
                turns = round(frame.rotation / 90) % 4  # counterclockwise, as np.rot90 turns
                yield np.ascontiguousarray(np.rot90(pixels, turns)), last
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            self.error = error_line(error)

    def __exit__(self, *_: Any) -> None:
        self._container.close()
