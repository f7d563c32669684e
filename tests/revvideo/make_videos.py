"""Small video files with what makes real ones difficult, encoded with PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 30
MILLISECOND = Fraction(1, 1000)
OPEN_GOP = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0"}
HEVC = {"x265-params": "keyint=10:min-keyint=10:log-level=none"}  # groups are open, too
ALTREF = {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "24", "cpu-used": "8", "b": "200k"}
INDEX_FIRST = {"movflags": "faststart"}


def noise(count: int, width: int, height: int) -> Iterator[np.ndarray]:
    """A window that moves over noise, so that no two pictures are alike: uint8 (H, W, 3)."""
    shape = (height + count, width + 2 * count, 3)
    field = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for i in range(count):
        yield np.ascontiguousarray(field[i : i + height, 2 * i : 2 * i + width])


def encode(
    path: Path,
    frames: int | Sequence[np.ndarray] = 40,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    *,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    shift: Fraction = Fraction(0),
    only_dts: bool = False,
    rotation: int = 0,
    mirrored: bool = False,
    sound: bool = False,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Write a video and return its path.

    Args:
        frames: pictures, uint8 (H, W, 3), or how many of noise, of ``size`` (width, height).
        options: of the encoder.
        times: when each frame is shown, in milliseconds; None: at 30 frames per second.
        shift: seconds at the start that an edit list hides.
        only_dts: write when packets are decoded in the place of when they are shown.
        rotation: counterclockwise, in degrees, in the metadata.
        mirrored: after the rotation, left to right, in the metadata.
        sound: add a stream of sound.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [*noise(frames, *size)] if isinstance(frames, int) else frames
    with av.open(path, "w", options=container_options or {}) as container:
        # With mbtree bytes now and then differ on a busy machine; noise looks like changing scenes.
        same = {"mbtree": "0", "sc_threshold": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=RATE, options={**same, **(options or {})})
        stream.height, stream.width = shown[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        if times is not None:
            stream.codec_context.time_base = MILLISECOND
        if sound:
            _add_sound(container, Fraction(len(shown), RATE))
        for number, picture in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(picture)
            if times is not None:
                frame.pts, frame.time_base = times[number], MILLISECOND
            _mux(container, stream.encode(frame), shift, only_dts)
        _mux(container, stream.encode(None), shift, only_dts)
    return path


def _mux(container, packets, shift: Fraction, only_dts: bool) -> None:
    for packet in packets:
        packet.pts = packet.dts if only_dts else packet.pts
        packet.pts -= int(shift / packet.time_base)
        packet.dts -= int(shift / packet.time_base)
        container.mux(packet)


def _add_sound(container, seconds: Fraction) -> None:
    stream = container.add_stream("aac", rate=22050)
    for number in range(int(seconds * 22050 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 22050, 1024 * number
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def damage(path: Path, packet: int) -> Path:
    """Overwrite the inside of a packet, counted in the order of the file."""
    with av.open(path) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        start, size = packets[packet].pos, packets[packet].size
    content = bytearray(path.read_bytes())
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    return path


def cut(path: Path) -> Path:
    """Take the last third off a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


# Files that cannot be used, and what is to be said of each, as a pattern.
BAD = {
    "cut.mp4": "is cut off after [0-9]+ of 40 frames",
    "no_index.mp4": "is cut off: the index",
    "cut.mkv": r"is cut off after 0\.[0-9] of 1\.3 seconds",
    "cut.avi": "is cut off after [0-9]+ of [0-9]+ frames",
    "missing.mp4": "file is missing",
    "empty.mp4": "file is empty",
    "text.mp4": "is not a video",
    "sound.mp4": "has no video stream, only sound",
}


def make_bad(folder: Path) -> None:
    """Put those files into a folder."""
    cut(encode(folder / "cut.mp4", container_options=INDEX_FIRST))
    cut(encode(folder / "no_index.mp4"))
    cut(encode(folder / "cut.mkv"))
    cut(encode(folder / "cut.avi", codec="mpeg4"))
    (folder / "missing.mp4").symlink_to(folder / "nothing.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video at all\n" * 100)
    with av.open(folder / "sound.mp4", "w") as container:
        _add_sound(container, Fraction(1))


def _start_over(path: Path, interval: int) -> Path:
    """Two transport streams in one: in the middle the timestamps start over, and none repeats."""
    first = encode(path, 20).read_bytes()
    times = range(0, 20 * interval, interval)
    path.write_bytes(first + encode(path, 20, times=times).read_bytes())
    return path


def _later_half(whole: Path, path: Path, after_keyframe: int) -> Path:
    """``whole`` from so many packets after its second keyframe on."""
    with av.open(whole) as source, av.open(path, "w") as rest:
        stream = rest.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        second = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second + after_keyframe :]:
            packet.stream = stream
            rest.mux(packet)
    return path


_rng = np.random.default_rng(1)
IRREGULAR_TIMES = [int(t) for t in np.cumsum(_rng.integers(10, 120, 40))]  # ms

# Name, and how to make it. What is special is in the name.
KINDS: dict[str, Callable[[Path], Path]] = {
    "constant.mp4": lambda path: encode(path, 70, options={"g": "25"}, sound=True),
    "one_keyframe.mp4": encode,
    "no_duration.mkv": lambda path: encode(path, sound=True),
    "variable_rate.mp4": lambda path: encode(path, times=IRREGULAR_TIMES),
    "variable_rate.mkv": lambda path: encode(path, times=IRREGULAR_TIMES, options={"g": "12"}),
    "no_times.avi": encode,  # of H.264: avi does not say when a packet is shown
    "times_of_decoding.mp4": lambda path: encode(path, only_dts=True),
    "start_over.ts": lambda path: _start_over(path, 33),
    "step_back.ts": lambda path: _start_over(path, 41),
    "without_its_keyframe.mp4": lambda path: _later_half(
        encode(path.with_name("whole.mp4"), options={"bf": "0", "g": "10"}), path, 1
    ),
    # What is stored after the first keyframe but shown before it cannot be decoded.
    "leading_frames.mkv": lambda path: _later_half(
        encode(path.with_name("whole_hevc.mp4"), codec="libx265", options=HEVC), path, 0
    ),
    "unordered.mov": lambda path: encode(path, 4, size=(50, 50), options={"bf": "2"}),
    "three_frames.mov": lambda path: encode(path, 3),
    "rotated_90.mov": lambda path: encode(path, 3, rotation=90),
    "rotated_minus_90.mp4": lambda path: encode(path, rotation=-90),
    "edit_list.mp4": lambda path: encode(path, shift=Fraction(1, 2)),
    "fragments.mp4": lambda path: encode(
        path, options={"g": "7"}, container_options={"movflags": "frag_keyframe+empty_moov"}
    ),
    "open_gop.mkv": lambda path: encode(path, options=OPEN_GOP),
    "intra_refresh.mp4": lambda path: encode(
        path, options={"x264-params": "intra-refresh=1:keyint=10"}
    ),
    "deep_b_pyramid.mp4": lambda path: encode(
        path, options={"x264-params": "bframes=8:ref=8:b-adapt=0:keyint=30"}
    ),
    "mpeg4.avi": lambda path: encode(path, codec="mpeg4", options={"bf": "2"}),
    "hevc.mp4": lambda path: encode(path, codec="libx265", options=HEVC),
    "vp9.webm": lambda path: encode(path, codec="libvpx-vp9", options={"g": "15", "cpu-used": "8"}),
    "vp8.webm": lambda path: encode(path, codec="libvpx", options={"cpu-used": "8"}),
    "hidden_frames.webm": lambda path: encode(
        path, 60, "libvpx", times=[40 * i + i * i for i in range(60)], options=ALTREF
    ),
    "mpeg4.mp4": lambda path: encode(path, codec="mpeg4", options={"bf": "2", "g": "9"}),
    "mjpeg.mov": lambda path: encode(path, 12, "mjpeg", pix_fmt="yuvj420p"),
    "prores.mov": lambda path: encode(path, 8, "prores_ks", pix_fmt="yuv422p10le"),
    "ffv1.mkv": lambda path: encode(path, 12, "ffv1", times=IRREGULAR_TIMES[:12]),
    "wmv2.wmv": lambda path: encode(path, codec="wmv2", times=IRREGULAR_TIMES),
}
