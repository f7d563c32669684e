"""The decoder behind PyTorchVideo's interfaces, for those who use its datasets."""

from __future__ import annotations

import logging
from bisect import bisect_left
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from iopath.common.file_io import g_pathmgr
from pytorchvideo.data import video as interfaces
from torch import Tensor

from revvideo.data.decode import Video
from revvideo.errors import VideoError

logger = logging.getLogger("revvideo")

# Seconds by which a time may be off through rounding; far less than a frame takes.
_ROUNDING = 1e-6


class ExactVideo(interfaces.Video):
    """A :class:`revvideo.data.decode.Video` as one of PyTorchVideo."""

    def __init__(self, file: str, name: str, frames: int | None, short_side: int | None) -> None:
        self.name, self._video = name, Video(file)
        self._frames, self._short_side = frames, short_side

    @property
    def duration(self) -> Fraction:
        """In seconds, of the last frame too; as their samplers need it."""
        return Fraction(self._video.timestamps[-1]) + 1 / Fraction(self._video.rate)

    def get_clip(self, start_sec: Any, end_sec: Any) -> dict[str, Tensor | None]:
        """The frames that are shown from ``start_sec`` on and before ``end_sec``, in seconds.

        ``video`` is float32 (3, T, H, W) in [0, 255], or None where there is no such frame or it
        does not decode, which their datasets then pass over, and the log says; ``audio`` is None.
        """
        times = (float(time) - _ROUNDING for time in (start_sec, end_sec))
        start, end = (bisect_left(self._video.timestamps, time) for time in times)
        numbers, video = torch.arange(start, end), None
        if self._frames and len(numbers):
            numbers = torch.linspace(start, end - 1, self._frames).long()
        try:
            if len(numbers):
                clip = self._video.frames(numbers.tolist(), self._short_side)
                video = clip.transpose(0, 1).float().contiguous()
        except VideoError as error:
            logger.warning("%s: the clip from %s s on is left out: %s", self.name, start_sec, error)
        return {"video": video, "audio": None}

    def close(self) -> None:
        self._video.close()


class VideoPathHandler(interfaces.VideoPathHandler):
    """Gives a dataset of PyTorchVideo the decoder of revvideo, in its worker processes too::

        dataset.video_path_handler = revvideo.VideoPathHandler(frames=16)

    Paths may be any that iopath's ``g_pathmgr`` knows. Folders of frames are read as before. There
    is no sound. ``frames`` are those of a clip, evenly spread as by ``UniformTemporalSubsample``,
    which alone are then converted, None for all; ``short_side`` are the pixels of the shorter side
    to which frames are shrunk while decoding.
    """

    def __init__(self, frames: int | None = None, short_side: int | None = None) -> None:
        super().__init__()
        self._frames, self._short_side = frames, short_side
        self._silent = False

    def video_from_path(
        self, filepath: str, decode_audio: bool = False, decoder: str = "pyav", fps: int = 30
    ) -> interfaces.Video:
        """A video, or a folder of frames at ``fps`` per second; a VideoError if it is not read."""
        if g_pathmgr.isdir(filepath):
            return super().video_from_path(filepath, decode_audio, decoder, fps)
        if decode_audio and not self._silent:
            self._silent = True
            logger.warning("revvideo decodes no sound: set decode_audio=False")
        local = g_pathmgr.get_local_path(filepath)
        return ExactVideo(local, Path(filepath).name, self._frames, self._short_side)
