"""Strips, curves and labelled copies show what they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from revvideo.data.decode import Video
from revvideo.errors import VideoError
from revvideo.prediction import media, pictures
from revvideo.prediction.media import write_labelled
from revvideo.prediction.pictures import draw_curve, draw_strip, some_frames
from revvideo.prediction.predictor import Windows

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)
ENCODING = {"qp": "10", "preset": "ultrafast"}


def plain(colour: Sequence[int], size: tuple[int, int] = (64, 48)) -> np.ndarray:
    return np.asarray(Image.new("RGB", size, tuple(colour)))


def write_video(
    path: Path,
    times: Sequence[float],
    size: tuple[int, int] = (64, 48),
    *,
    rate: Fraction = Fraction(25),
    first: float = 0.0,
) -> Path:
    """A video that gets brighter, with frames at ``times`` after ``first`` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate, ENCODING)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(plain([100 + number % 100] * 3, size))
            frame.pts, frame.time_base = round((first + time) * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode(path: Path) -> tuple[list[np.ndarray], list[float]]:
    with av.open(str(path)) as container:
        frames = [
            (frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)
        ]
    return [picture for picture, _ in frames], [time for _, time in frames]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Figure]:
    """``figure()``: the one that was drawn last."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures.plt, "close", drawn.append)
    return lambda: drawn[-1]


def test_a_strip_shows_frames_and_the_best_classes(tmp_path, figure):
    clip = [(0.0, plain(RED)), (0.5, plain(GREEN)), (1.0, plain(BLUE))]
    best = [("juggling fire", 0.75), ("yoga", 0.2), ("dancing", 0.05)]
    draw_strip(clip, best, tmp_path / "strip.png")
    shown = [axis for axis in figure().axes if axis.images]
    assert [axis.get_title() for axis in shown] == ["0.0 s", "0.5 s", "1.0 s"]
    assert all(
        np.array_equal(a.images[0].get_array(), p) for a, (_, p) in zip(shown, clip, strict=True)
    )
    bars = figure().axes[-1]
    assert [round(patch.get_width(), 2) for patch in bars.patches] == [0.75, 0.2, 0.05]
    assert [text.get_text() for text in bars.texts] == [
        "75%  juggling fire",
        "20%  yoga",
        "5%  dancing",
    ]
    assert figure().get_suptitle() == "juggling fire  75%"
    drawn = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB"))
    for colour in (RED, GREEN, BLUE):
        assert (np.abs(drawn.astype(int) - colour).sum(-1) < 6).sum() > 3000


def test_a_curve_draws_the_classes_that_matter(tmp_path, figure):
    times = [0.5, 1.5, 2.5, 3.5]
    scores = np.full((4, 10), 0.01)
    scores[:2, 3], scores[2:, 7], scores[1, 5] = 0.8, 0.6, 0.3
    classes = [f"class {i}" for i in range(10)]
    clip = [(time, plain(RED)) for time in (0.0, 2.0, 4.0)]
    starts, ends = [time - 0.5 for time in times], [time + 0.5 for time in times]
    windows = Windows(starts, ends, torch.from_numpy(scores))
    draw_curve(windows, classes, clip, tmp_path / "curve.png")
    axis = figure().axes[-1]
    lines = {line.get_label(): line for line in axis.lines}
    assert len(lines) == pictures.CURVES < len(classes)
    assert list(lines)[:3] == ["class 3", "class 7", "class 5"]
    for name, line in lines.items():
        assert np.array_equal(line.get_xdata(), times)
        assert np.array_equal(line.get_ydata(), scores[:, classes.index(name)])
    band = [patch.get_facecolor()[:3] for patch in axis.patches]
    assert band == [to_rgb(lines[f"class {i}"].get_color()) for i in (3, 3, 7, 7)]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_some_frames_reach_from_the_first_to_the_last(tmp_path):
    path = write_video(tmp_path / "a.mp4", [i / 25 for i in range(21)])
    with Video(path) as video:
        clip = some_frames(video, 5, short_side=24)
    assert [time for time, _ in clip] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert {picture.shape for _, picture in clip} == {(24, 32, 3)}
    assert [round(float(p.mean())) for _, p in clip] == pytest.approx(
        [100, 105, 110, 115, 120], abs=2
    )


@pytest.mark.parametrize(
    ("times", "rate"),
    [
        ([i * 1001 / 30_000 for i in range(70)], Fraction(30_000, 1001)),
        ([i / 24 for i in range(9)], Fraction(24)),
        ([0, 0.04, 0.1, 0.5, 0.53, 1.2], Fraction(5)),  # variable
        ([0.0], Fraction(25)),
    ],
    ids=["29.97", "24", "variable", "one frame"],
)
@pytest.mark.parametrize("first", [0.0, 1.4])
def test_a_labelled_copy_keeps_the_times_of_the_frames(tmp_path, times, rate, first):
    source = write_video(tmp_path / "a.mkv", times, rate=rate, first=first)
    with Video(source) as video:
        write_labelled(video, ["label"] * len(video), tmp_path / "b.mp4")
    copied, shown = decode(tmp_path / "b.mp4")
    assert shown == pytest.approx(times, abs=1.1e-3)  # Matroska counts milliseconds
    expected = [100 + i for i in range(len(times))]
    assert [round(float(p[10].mean())) for p in copied] == pytest.approx(expected, abs=2)


def test_a_label_is_drawn_on_its_frames(tmp_path):
    source = write_video(tmp_path / "a.mp4", [i / 25 for i in range(30)], (320, 240))
    with Video(source) as video:
        labels = ["one label"] * 20 + ["another, longer label"] * 10
        write_labelled(video, labels, tmp_path / "b.mp4")
    copied, _ = decode(tmp_path / "b.mp4")
    band = [frame[-20:].astype(int) for frame in copied]
    assert all((part.max(axis=2) > 200).sum() > 60 for part in band), "white letters"
    assert all(np.median(part) < 70 for part in band), "on a dark band"
    assert all(90 < np.median(frame[:200]) < 140 for frame in copied)
    width = [np.flatnonzero((part.max(axis=2) > 200).any(axis=0)).max() for part in band]
    assert max(np.ptp(width[:20]), np.ptp(width[20:])) < 10
    assert width[20] > 1.5 * width[0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 48), (320, 240)),  # small: enlarged, so that the label is legible
        ((427, 243), (428, 244)),  # odd: H.264 wants even
        ((1920, 1080), (1280, 720)),
        ((100, 720), (240, 1728)),
    ],
)
def test_the_size_of_a_copy(tmp_path, size, expected):
    source = write_video(tmp_path / "a.mkv", [0.0, 0.04], size)
    with Video(source) as video:
        write_labelled(video, ["label"] * 2, tmp_path / "b.mp4")
    assert decode(tmp_path / "b.mp4")[0][0].shape == (*expected[::-1], 3)


def test_a_long_label_stays_inside(tmp_path):
    for size in ((240, 426), (320, 240)):
        tag = np.asarray(media._tag("shredding paper, very slowly  100%", size))
        columns = np.flatnonzero(tag[..., :3].any(axis=(0, 2)))
        assert columns[0] > 0 and columns[-1] < size[0] - 1


def test_a_copy_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    source = write_video(tmp_path / "a.mp4", [i / 25 for i in range(40)])
    monkeypatch.setattr(media, "FRAMES_AT_ONCE", 16)
    with Video(source) as video:
        frames = video.frames

        def broken(indices, short_side=None):
            if 30 in indices:
                raise VideoError("decoding fails after 30 frames")
            return frames(indices, short_side)

        monkeypatch.setattr(video, "frames", broken)
        with pytest.raises(VideoError, match="30 frames"):
            write_labelled(video, ["label"] * 40, tmp_path / "b.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
