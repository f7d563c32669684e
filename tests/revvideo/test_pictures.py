"""Strips, curves and labelled copies show what they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from revvideo.errors import VideoError
from revvideo.prediction import media, pictures
from revvideo.prediction.media import write_labelled
from revvideo.prediction.pictures import draw_curve, draw_strip, some_frames
from revvideo.prediction.predictor import Windows
from tests.revvideo.tiny_set import Film

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)


def plain(colour: Sequence[int]) -> np.ndarray:
    return np.asarray(Image.new("RGB", (64, 48), tuple(colour)))


def decode(path: Path) -> tuple[list[np.ndarray], list[float]]:
    with av.open(str(path)) as container:
        frames = [(f.to_ndarray(format="rgb24"), f.time) for f in container.decode(video=0)]
    return [picture for picture, _ in frames], [time for _, time in frames]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Figure]:
    """``figure()``: the one that was drawn last."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **how: drawn.append(self) or save(self, *args, **how)
    )
    return lambda: drawn[-1]


def test_a_strip_shows_frames_and_the_best_classes(tmp_path, figure):
    clip = [(0.0, plain(RED)), (0.5, plain(GREEN)), (1.0, plain(BLUE))]
    best = [("juggling fire", 0.75), ("yoga", 0.2), ("dancing", 0.05)]
    draw_strip(clip, best, tmp_path / "strip.png")
    shown = [axis for axis in figure().axes if axis.images]
    assert [axis.get_title() for axis in shown] == ["0.0 s", "0.5 s", "1.0 s"]
    for axis, (_, picture) in zip(shown, clip, strict=True):
        assert np.array_equal(axis.images[0].get_array(), picture)
    bars = figure().axes[-1]
    assert [round(patch.get_width(), 2) for patch in bars.patches] == [0.75, 0.2, 0.05]
    texts = [text.get_text() for text in bars.texts]
    assert texts == ["75%  juggling fire", "20%  yoga", "5%  dancing"]
    assert figure().get_suptitle() == "juggling fire  75%"
    drawn = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB"))
    for colour in (RED, GREEN, BLUE):
        assert (np.abs(drawn.astype(int) - colour).sum(-1) < 6).sum() > 3000


@pytest.mark.parametrize("height, width", [(1200, 16), (16, 1200), (1, 1)])
def test_no_size_and_no_name_is_too_odd_for_a_strip(tmp_path, height, width):
    clip = [(t, np.zeros((height, width, 3), np.uint8)) for t in (0.0, 1.0)]
    draw_strip(clip, [("pay $x^{2$", 0.6), ("$\\frac$", 0.4)], tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as picture:
        assert max(picture.size) < 3000 and min(picture.size) > 50


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


def test_some_frames_reach_from_the_first_to_the_last():
    clip = some_frames(Film([i / 25 for i in range(21)]), 5, short_side=24)
    assert [time for time, _ in clip] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert {picture.shape for _, picture in clip} == {(24, 32, 3)}
    assert [float(picture.mean()) for _, picture in clip] == [100, 105, 110, 115, 120]


@pytest.mark.parametrize(
    "times",
    [
        [i * 1001 / 30_000 for i in range(70)],
        [0, 0.04, 0.1, 0.5, 0.53, 1.2],  # variable
        [0.0],
    ],
    ids=["29.97", "variable", "one frame"],
)
def test_a_labelled_copy_keeps_the_times_of_the_frames(tmp_path, times):
    write_labelled(Film(times), ["label"] * len(times), tmp_path / "b.mp4")
    copied, shown = decode(tmp_path / "b.mp4")
    assert shown == pytest.approx(times, abs=1e-4)
    expected = [100 + i for i in range(len(times))]
    assert [round(float(p[10].mean())) for p in copied] == pytest.approx(expected, abs=2)


def test_a_label_is_drawn_on_its_frames(tmp_path):
    labels = ["one label"] * 20 + ["another, longer label"] * 10
    write_labelled(Film([i / 25 for i in range(30)], (320, 240)), labels, tmp_path / "b.mp4")
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
    write_labelled(Film([0.0, 0.04], size), ["label"] * 2, tmp_path / "b.mp4")
    assert decode(tmp_path / "b.mp4")[0][0].shape == (*expected[::-1], 3)


def test_a_long_label_stays_inside():
    for size in ((240, 426), (320, 240)):
        tag = np.asarray(media._tag("shredding paper, very slowly  100%", size))
        columns = np.flatnonzero(tag[..., :3].any(axis=(0, 2)))
        assert columns[0] > 0 and columns[-1] < size[0] - 1


def test_a_copy_that_breaks_off_leaves_nothing(tmp_path):
    film = Film([i / 25 for i in range(80)], broken=media.FRAMES_AT_ONCE + 6)
    with pytest.raises(VideoError, match="does not decode"):
        write_labelled(film, ["label"] * 80, tmp_path / "b.mp4")
    assert not list(tmp_path.iterdir())
