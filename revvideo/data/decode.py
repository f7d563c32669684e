"""Chosen frames of a video file, decoded with PyAV.

PyTorchVideo's ``EncodedVideo`` seeks by a margin that is too small for some files, drops frames
whose timestamps repeat, converts every frame of a clip, ignores rotation, and hides errors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice
from typing import Literal, cast

import av
import numpy as np
import torch
from av.buffer import Buffer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor
from torch.utils.data import get_worker_info

from revvideo.data.packets import AnyPath, index_from_text, open_video, read_index
from revvideo.errors import VideoError


@dataclass(frozen=True)
class VideoInfo:
    """What a player would say about a video."""

    frames: int  # how many
    duration: float  # in seconds
    fps: float  # frames per second, the mean
    width: int  # of a frame in pixels, rotated as the file asks for
    height: int  # likewise
    index: str = ""  # of the packets of a long file, for `Video`


def probe(path: AnyPath, *, deep: bool = False) -> VideoInfo:
    """Open a video, read through it without decoding, and decode its first frame; ``deep``: all.

    A VideoError says why it cannot be used: it is missing, no video, cut off, or does not decode.
    """
    with Video(path, whole=True) as video:
        if deep and (count := video.decode_all()) < len(video):
            raise VideoError(f"only {count} of {len(video)} frames come out of the decoder")
        return video.info


class Video(AbstractContextManager["Video"]):
    """A video file, as a sequence of frames in the order in which a player shows them.

    Opening it reads all packets of the video stream, which costs far less than decoding them.
    Frames are found by their timestamps and decoded from the keyframe before them. A file whose
    timestamps cannot be relied upon (they are missing or repeated, or its codec does not hand them
    on) is decoded from its start, so that the number of a frame is always its place in a full
    decode.

    Inside of a ``DataLoader``'s worker the decoder uses one thread, elsewhere all cores. Pixels are
    taken for square. Use it as a context manager, or call :meth:`close`. A file that is missing,
    empty, no video or without frames is a VideoError; if it shall be ``whole``, one that is cut
    off too. What a scan has found saves work: ``known_frames``, decoding a file whose timestamps
    cannot be relied upon to count them; ``known_index``, of this very file, reading through it.
    """

    timestamps: list[float]  # when each frame is shown, in seconds after the first one, ascending
    unit: Fraction  # of which they are whole multiples, in seconds
    rate: float  # frames per second as the file states them, or else the mean

    def __init__(
        self, path: AnyPath, *, whole: bool = False, known_frames: int = 0, known_index: str = ""
    ) -> None:
        self._path = path
        self._threads = 1 if get_worker_info() is not None else 0
        self._converter = VideoReformatter()
        self._container, self._stream = open_video(path, self._threads)
        self._codec = self._stream.codec_context
        try:
            self._index = index_from_text(known_index) or read_index(self._container, self._stream)
            rate = self._stream.average_rate or self._stream.guessed_rate
            times, unit = self._index.shown, self._stream.time_base
            if not self._index.reliable or unit is None:
                if not rate:
                    raise VideoError("has neither timestamps nor a frame rate")
                count, times = known_frames or self._count_frames(), self._index.times
                if len(times) != count or unit is None:
                    times, unit = range(count), 1 / rate
            over, under = unit.numerator, unit.denominator
            self.timestamps, self.unit = [(t - times[0]) * over / under for t in times], unit
            if not self.timestamps or (whole and self._index.truncated):
                raise VideoError(self._index.truncated or "has no frame that decodes")
        except BaseException:
            self.close()
            raise
        last = self.timestamps[-1]
        self._fps = (len(self) - 1) / last if last > 0 else float(rate or 1)
        self.rate = float(rate or self._fps)

    def __len__(self) -> int:
        return len(self.timestamps)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    @cached_property
    def info(self) -> VideoInfo:
        """Length, rate and, of the first frame decoded, which may raise a VideoError, the size."""
        height, width = self.frames([0]).shape[-2:]
        duration = round(len(self) / self._fps, 3)
        fps, index = round(self._fps, 3), self._index.to_text()
        return VideoInfo(len(self), duration, fps, width, height, index)

    def frames(self, indices: Sequence[int], short_side: int | None = None) -> Tensor:
        """Frames as uint8 (T, 3, H, W), RGB, upright, in ``channels_last`` memory format.

        Which ones say ``indices``, counted from 0 in presentation order, in any order, also
        repeated; one that the video does not have is an IndexError. Frames are shrunk to
        ``short_side`` pixels on their shorter side, which is cheapest here; smaller ones stay as
        they are. A VideoError says that a frame does not decode, because the file is damaged there
        or in a frame that it refers to. Damage elsewhere does not matter.
        """
        wanted = set(indices)
        if beyond := [number for number in wanted if not 0 <= number < len(self)]:
            raise IndexError(f"frame {beyond[0]} of a video of {len(self)} frames")
        pictures: dict[int, np.ndarray] = {}
        if self._index.reliable:
            # After an error, and where frames stay away, what follows finds out and says why.
            with suppress(av.error.FFmpegError):
                for number, frame in self._frames_near(wanted):
                    pictures[number] = self._picture(frame, short_side)
        if pictures.keys() != wanted:  # all of them anew, from the start
            pictures = dict(islice(self.pictures(short_side, wanted), len(wanted)))
        if lost := wanted - pictures.keys():
            raise VideoError(f"frame {min(lost)} of {len(self)} does not come out of the decoder")
        if len({picture.shape for picture in pictures.values()}) > 1:
            raise VideoError("has frames of several sizes")
        return torch.from_numpy(np.stack([pictures[i] for i in indices])).permute(0, 3, 1, 2)

    def _frames_near(self, wanted: set[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Decode from the keyframe before each frame. Yields what comes out, perhaps not all."""
        index, codec = self._index, self._codec
        groups: dict[int, set[int]] = {}
        for number in wanted:
            place = index.places[index.shown[number]]
            groups.setdefault(index.keyframe_before(place), set()).add(place)
        # An H.264 frame says whether others refer to it. If not, it need not be decoded.
        unneeded: Literal["NONREF", "DEFAULT"] = "NONREF" if codec.name == "h264" else "DEFAULT"
        for keyframe, places in sorted(groups.items()):
            codec.flush_buffers()
            last = max(places)
            for place, packet in self._packets_from(keyframe):
                codec.skip_frame = "DEFAULT" if place in places else unneeded
                frames = codec.decode(packet)
                if place == last:
                    frames += codec.decode(None)  # those that it holds back for reordering
                for frame in frames:
                    if (shown := index.numbers.get(frame.pts)) in wanted:
                        yield shown, frame
                if place == last:
                    break

    def _packets_from(self, keyframe: int) -> Iterable[tuple[int, Packet[VideoStream]]]:
        """Places and packets, from the keyframe at place ``keyframe`` on."""
        index = self._index
        if index.data:
            return enumerate(index.data[keyframe:], keyframe)
        self._container.seek(index.packets[keyframe], stream=self._stream)
        landed = index.places.get(next(self._container.demux(self._stream)).pts, keyframe + 1)
        # Some formats are off: then read on from the start, without decoding.
        target = index.packets[keyframe if landed <= keyframe else 0]
        self._container.seek(target, stream=self._stream)
        return (
            (index.places[packet.pts], packet)
            for packet in self._container.demux(self._stream)
            if index.places.get(packet.pts, -1) >= keyframe
        )

    def pictures(
        self, short_side: int | None = None, wanted: Collection[int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Number and picture, uint8 (H, W, 3), of each frame that comes out of the decoder.

        Of those in ``wanted``, if it is not None; shrunk as by :meth:`frames`. A VideoError comes
        at the first damage.
        """
        for count, frame in enumerate(self._all_frames()):
            number = self._index.numbers.get(frame.pts) if self._index.reliable else count
            if number is not None and (wanted is None or number in wanted):
                yield number, self._picture(frame, short_side)

    def decode_all(self) -> int:
        """The number of frames that come out of the decoder; a VideoError at the first damage."""
        return sum(1 for _ in self._all_frames())

    def _count_frames(self) -> int:
        count = 0
        with suppress(VideoError):
            for _ in self._all_frames():
                count += 1
        return count

    def _all_frames(self) -> Iterator[VideoFrame]:
        """Decode from the start on. Raises VideoError after the last frame before damage."""
        # Opened anew, which is a sure way to the start. One thread: with several, errors come late.
        container, stream = open_video(self._path, threads=1)
        count = 0
        try:
            packets = (packet for packet in container.demux(stream) if packet.size)
            for packet in chain(packets, [None]):  # None: no more comes, give what is held back
                for frame in stream.codec_context.decode(packet):
                    yield frame
                    count += 1
        except av.error.FFmpegError as error:
            raise VideoError(f"decoding fails after {count} frames ({error.strerror})") from error
        finally:
            container.close()

    def _picture(self, frame: VideoFrame, short_side: int | None) -> np.ndarray:
        """uint8 (H, W, 3)."""
        width, height = frame.width, frame.height
        if short_side is not None and short_side < min(width, height):
            scale = short_side / min(width, height)
            width, height = round(width * scale), round(height * scale)
        rgb = self._converter.reformat(frame, width, height, "rgb24", threads=self._threads)
        matrix = cast(Buffer | None, frame.side_data.get("DISPLAYMATRIX"))
        picture = rgb.to_ndarray()
        return picture if matrix is None else _upright(picture, bytes(matrix))


def _upright(picture: np.ndarray, display_matrix: bytes) -> np.ndarray:
    """Turn and mirror ``picture`` as the file asks for, by multiples of 90 degrees."""
    # Of nine int32 by rows the upper left 2 x 2 take (x, y), a row vector with y downwards, to
    # where it is shown: ISO 14496-12, 6.2.2.
    (a, b), (c, d) = np.frombuffer(display_matrix, np.int32).reshape(3, 3)[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, right, down = picture.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return picture[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
