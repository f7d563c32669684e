"""The demo clips: their motion can be seen, and nothing else tells it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from demo import motion
from demo.motion import MOTIONS, Start

CLIPS = {"train": 2, "val": 1}


def start(split: str = "train", number: int = 0) -> Start:
    place = list(CLIPS).index(split)
    photographs = motion.PHOTOGRAPHS[split].split()
    return Start(np.random.default_rng([0, place, number]), photographs[number % len(photographs)])


def decode(path: Path) -> tuple[list[Image.Image], list[float]]:
    with av.open(str(path)) as container:
        frames = [(frame.to_image(), frame.time) for frame in container.decode(video=0)]
    return [picture for picture, _ in frames], [time for _, time in frames]


def seen_motion(pictures: Sequence[Image.Image]) -> str:
    """The motion that explains the changes best, by least squares (Lucas-Kanade, 1981).

    At a place (x, y) from the centre the flow is (u - w y, w x), for a slide u to the right and a
    clockwise turn w.
    """
    side = 64
    small = [
        picture.convert("L").resize((side, side)).filter(ImageFilter.GaussianBlur(2))
        for picture in pictures
    ]
    grey = np.stack([np.asarray(picture, float) for picture in small])
    down, right = np.gradient((grey[1:] + grey[:-1]) / 2, axis=(1, 2))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    design = np.stack([right, down, x * down - y * right], axis=-1).reshape(-1, 3)
    u, _, w = np.linalg.lstsq(design, -np.diff(grey, axis=0).ravel(), rcond=None)[0]
    if abs(u) > abs(w) * side / 3:
        return "slide_right" if u > 0 else "slide_left"
    return "rotate_clockwise" if w > 0 else "rotate_counterclockwise"


def eight(pictures: Sequence[Image.Image], times: Sequence[float]) -> list[Image.Image]:
    """As a recipe for 8 frames with stride 4 takes them."""
    return [pictures[int(np.searchsorted(times, 0.2 + i * 4 / 30))] for i in range(8)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "motion"
    return motion.build(folder, **{f"{split}_clips": count for split, count in CLIPS.items()})


def test_a_folder_for_each_motion_with_playable_files(dataset: Path) -> None:
    for split, count in CLIPS.items():
        assert sorted(path.name for path in (dataset / split).iterdir()) == list(MOTIONS)
        for path in (dataset / split).glob("*/*"):
            expected = start(split, int(path.stem))
            with av.open(str(path)) as container:
                video = container.streams.video[0]
                assert video.codec_context.name == "h264"
                frames = list(container.decode(video))
                assert {(frame.width, frame.height) for frame in frames} == {expected.size}
                assert len(frames) == expected.frames
                assert video.average_rate == expected.rate
        assert len(list((dataset / split).glob("*/*.mp4"))) == len(MOTIONS) * count


def test_splits_share_no_photograph_and_clips_differ() -> None:
    files = {split: set(names.split()) for split, names in motion.PHOTOGRAPHS.items()}
    assert files["train"].isdisjoint(files["val"])
    starts = [start(number=number) for number in range(60)]
    assert {start.size for start in starts} == set(motion.SIZES)
    assert {start.rate for start in starts} == set(motion.FRAME_RATES)
    assert len({start.frames for start in starts}) > 10


def test_the_motion_can_be_seen_after_encoding(dataset: Path) -> None:
    for path in dataset.glob("*/*/*.mp4"):
        assert seen_motion(eight(*decode(path))) == path.parent.name, path


def test_clips_of_one_number_begin_with_the_same_picture(dataset: Path) -> None:
    for name in ("train/*/0000.mp4", "train/*/0001.mp4", "val/*/0000.mp4"):
        pictures = [decode(path)[0][0].tobytes() for path in dataset.glob(name)]
        assert len(pictures) == len(MOTIONS)
        assert len(set(pictures)) == 1, "not even the encoder gives the motion away"


@pytest.mark.parametrize("name", MOTIONS)
@pytest.mark.parametrize("time", [0.0, 1.1])
def test_at_any_time_every_place_and_angle_is_as_likely(name: str, time: float) -> None:
    rng = np.random.default_rng(3)
    counts = np.zeros((4, 4, 4))
    views = 6400
    for _ in range(views):
        drawn = Start(rng, "any")
        # In the unit of the photograph's shorter side, of a photograph of 3 : 2.
        x, y, angle = motion.path(drawn, name, drawn.window, (3.0, 2.0), np.array([time]))
        places = x / 3.0, y / 2.0, angle / (2 * np.pi)
        counts[tuple(int(4 * (place[0] % 1)) for place in places)] += 1
    expected = views / counts.size
    # Chi-square with 63 degrees of freedom: above 115 once in 10,000 draws.
    assert ((counts - expected) ** 2 / expected).sum() < 115


def test_slides_move_by_whole_pixels_over_a_mirrored_photograph() -> None:
    def render(x: float, name: str) -> list[np.ndarray]:
        view = start()
        view.photograph, view.window, view.x, view.y, view.angle = "coffee.png", 0.5, x, 0.2, 0.0
        view.size, view.speed, view.rate, view.frames = (128, 96), 0.25, Fraction(1), 2
        return [np.asarray(picture, float) for picture in motion.render(view, name)]

    # A quarter of 96 px in a second; later pictures are earlier ones, shifted.
    before, after = render(0.49, "slide_left")  # at the border, a repetition being two photographs
    assert np.abs(before[:, 24:] - after[:, :-24]).max() <= 1
    for picture, mirrored in zip(render(0.51, "slide_right"), (before, after), strict=True):
        assert np.abs(picture - mirrored[:, ::-1]).max() <= 1


def test_a_clip_depends_on_its_number_only(dataset: Path, tmp_path: Path) -> None:
    few = motion.build(tmp_path / "few", train_clips=1, val_clips=1)
    clips = list(few.glob("*/*/*.mp4"))
    assert len({path.read_bytes() for path in clips}) == len(clips) == 2 * len(MOTIONS)
    for path in clips:
        assert path.read_bytes() == (dataset / path.relative_to(few)).read_bytes()
