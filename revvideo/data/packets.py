"""The video stream of a file, and where its frames are, found out without decoding."""

from __future__ import annotations

import base64
import csv
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from backbones.common.errors import error_line
from backbones.common.videos import open_container
from revvideo.errors import VideoError

AnyPath = str | os.PathLike[str]

# Of these one packet is one frame, and every frame carries the timestamp of its packet; but for
# frames of VP8 that are never shown, and those of MPEG-4 that stand for the one before.
_ONE_FRAME_PER_PACKET = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "prores", "ffv1"}
_DIVX_PACKED = re.compile(rb"DivX\d+(b|Build)\d+p")  # a packet may then hold two frames
_NOT_CODED = 16  # bytes; such a small packet of MPEG-4 is no picture
_KEEP_BYTES = 32 * 2**20
_LONG = 5000  # packets; an index of so many is worth writing down


@dataclass(frozen=True)
class PacketIndex:
    """The packets of a video stream, by their presentation timestamps (pts)."""

    packets: Sequence[int]  # the pts of each, in the order in which they are stored
    keyframes: Sequence[int]  # the places of packets from which decoding can start, ascending
    shown: Sequence[int]  # the pts of the frames that a player shows, ascending
    numbers: dict[int | None, int]  # of each pts in `shown`: its place there
    reliable: bool = True  # whether a frame can be found by its pts; if not, the above mean nothing
    times: Sequence[int] = ()  # the pts of all packets, ascending, where they can be told apart
    data: Sequence[Packet[VideoStream]] = ()  # the packets of a small file, which is read once
    truncated: str = ""  # why the file is taken to be cut off

    @cached_property
    def places(self) -> dict[int | None, int]:
        """Of each pts in ``packets``."""
        return {pts: place for place, pts in enumerate(self.packets)}

    def keyframe_before(self, place: int) -> int:
        """The place of the keyframe from which to decode the frame at ``place``.

        A frame stored after a keyframe but shown before it may refer to frames before the keyframe.
        """
        for keyframe in reversed(self.keyframes[: bisect_right(self.keyframes, place)]):
            if self.packets[keyframe] <= self.packets[place]:
                return keyframe
        raise AssertionError("a reliable index starts with a keyframe that is shown first")

    def to_text(self) -> str:
        """For :func:`index_from_text`; "" of a short file, which is quickly read, and where it is
        not reliable or does not fit a field of a csv file."""
        if not self.reliable or self.truncated or len(self.packets) < _LONG:
            return ""
        hidden = [place for place, pts in enumerate(self.packets) if pts not in self.numbers]
        parts = [np.diff(self.packets, prepend=0), np.diff(self.keyframes, prepend=0), hidden]
        sizes = [len(self.packets), len(self.keyframes)]
        numbers = np.concatenate([sizes, *parts]).astype("<i8")
        text = base64.b64encode(zlib.compress(numbers.tobytes())).decode()
        return text if len(text) < csv.field_size_limit() else ""


def index_from_text(text: str) -> PacketIndex | None:
    """What a scan has written down about a file that has not changed since; None if damaged."""
    try:
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8")
    except (ValueError, zlib.error):
        return None
    packets, keyframes, hidden = np.split(numbers[2:], np.cumsum(numbers[:2]))
    packets, keyframes = packets.cumsum(), keyframes.cumsum()
    shown = np.sort(np.delete(packets, hidden)).tolist()
    by_pts: dict[int | None, int] = {pts: number for number, pts in enumerate(shown)}
    return PacketIndex(packets.tolist(), keyframes.tolist(), shown, by_pts)


def open_video(path: AnyPath, threads: int) -> tuple[InputContainer, VideoStream]:
    """A file and its video stream, or a VideoError; 0 threads: one per core."""
    path = Path(path)
    try:
        if not path.stat().st_size:
            raise VideoError("file is empty")
        # "file:" keeps a colon in a name from being taken for a protocol.
        container = open_container(f"file:{path.absolute()}")
    except FileNotFoundError as error:
        raise VideoError("file is missing") from error
    except av.error.InvalidDataError as error:
        with path.open("rb") as file:
            cut = file.read(12)[4:8] == b"ftyp"
        lost = "is cut off: the index that mp4 and mov files end with is missing"
        raise VideoError(lost if cut else f"is not a video ({error_line(error)})") from error
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"does not open ({error_line(error)})") from error
    try:
        stream = _choose_stream(container)
    except VideoError:
        container.close()
        raise
    for other in set(container.streams) - {stream}:  # which need not be read
        other.discard = av.stream.Discard.all
    stream.codec_context.thread_count = threads
    stream.codec_context.thread_type = "NONE" if threads == 1 else "AUTO"
    return container, stream


def _choose_stream(container: InputContainer) -> VideoStream:
    # FFmpeg takes images and texts for videos, too: image2, png_pipe, jpeg_pipe, tty.
    if container.format.name in ("image2", "tty") or container.format.name.endswith("_pipe"):
        raise VideoError(f"is not a video (opens as {container.format.name})")
    for stream in container.streams.video:
        # The cover picture of a song is a video stream, too.
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                raise VideoError("has a video stream of an unknown codec")
            return stream
    only = ", only sound" if container.streams.audio else ""
    raise VideoError(f"has no video stream{only}")


def read_index(container: InputContainer, stream: VideoStream) -> PacketIndex:
    """Read all packets of ``stream``, which has to be at its start."""
    packets, dts, keyframes, shown = (list[int]() for _ in range(4))
    data: list[Packet[VideoStream]] = []
    size = latest = end = 0
    codec = stream.codec_context
    name = codec.codec.canonical_name
    reliable = name in _ONE_FRAME_PER_PACKET
    if name == "mpeg4":
        reliable = not _DIVX_PACKED.search(codec.extradata or b"")
    timed, broken = True, False
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            # Usually the last one of a file that was cut off. In the middle, bytes were lost.
            broken = packet.is_corrupt
            if broken:
                continue
            timed = timed and packet.pts is not None
            pts = packet.pts or 0
            start = memoryview(packet)[:1].tolist()[0]
            if name == "mpeg4" and reliable:
                first = b"" if packets else bytes(packet)[:4096]
                reliable = packet.size >= _NOT_CODED and not _DIVX_PACKED.search(first)
            if packet.is_keyframe and not (name == "vp8" and start & 1):
                keyframes.append(len(packets))
            if packet.dts is not None:
                dts.append(packet.dts)
            hidden = name == "vp8" and not start & 16  # RFC 6386, 9.1: show_frame
            # What an edit list hides is decoded, but not shown.
            if not (packet.is_discard or hidden):
                shown.append(pts)
            packets.append(pts)
            size += packet.size
            if size <= _KEEP_BYTES:
                data.append(packet)
            latest = max(latest, pts, packet.dts or 0)
            end = max(end, pts + (packet.duration or 0))
    except av.error.FFmpegError:
        broken = True
    timed = timed and len(set(packets)) == len(packets) > 0
    timed = timed and all(earlier < later for earlier, later in pairwise(dts))
    times = sorted(packets) if timed else []
    # Frames are reordered, but their times are not: these are made up, as in avi.
    made_up = codec.has_b_frames and len(packets) > 1 and packets == times
    reliable = reliable and timed and not made_up
    reliable = reliable and keyframes[:1] == [0] and packets[0] == times[0]
    if reliable:
        shown.sort()
    numbers: dict[int | None, int] = {pts: number for number, pts in enumerate(shown)}
    data = data if size <= _KEEP_BYTES else []
    missing = _what_is_missing(container, stream, len(packets), broken, latest, end)
    return PacketIndex(packets, keyframes, shown, numbers, reliable, times, data, missing)


def _what_is_missing(
    container: InputContainer, stream: VideoStream, count: int, broken: bool, latest: int, end: int
) -> str:
    entries = stream.index_entries  # in mp4, mov and avi one for each packet
    if len(entries) and entries[-1].timestamp > latest:
        return f"is cut off after {count} of {len(entries)} frames"
    if broken:
        return f"is cut off or damaged after {count} frames"
    seconds = float(end * (stream.time_base or 0))
    duration = _promised_duration(container, stream)
    if duration - seconds > max(0.5, 0.1 * duration):
        return f"is cut off after {seconds:.1f} of {duration:.1f} seconds"
    return ""


def _promised_duration(container: InputContainer, stream: VideoStream) -> float:
    """Seconds that a Matroska file says its video has; 0 if it does not."""
    if "matroska" not in container.format.name:
        return 0.0
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "").strip())
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    if len(container.streams) == 1 and container.duration:
        return container.duration / 1_000_000
    return 0.0
