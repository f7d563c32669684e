"""The demo clips: their motion can be seen, nothing else tells it, and building them is careful."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from backbones.common.errors import UserError
from revvideo import demo_dataset, demo_motion

CLIPS = {"train": 2, "val": 1}
MOTIONS = list(demo_motion.MOTIONS)


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


def index_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "dataset.json").read_text())
    return {name: start for name, start in content["files"].items() if start}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def small(folder: Path, **changes: Any) -> Path:
    return demo_dataset.build(folder, **{"train_clips": 1, "val_clips": 1} | changes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "motion"
    return demo_dataset.build(folder, **{f"{split}_clips": n for split, n in CLIPS.items()})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of a few frames, for tests that look at files and not at what is in them."""
    monkeypatch.setattr(demo_dataset, "SECONDS", (0.2, 0.3))
    monkeypatch.setattr(demo_dataset, "TOUR_SECONDS", 0.1)

    def draw(folder: Path, _: object) -> None:  # the real one takes a second
        (folder / "preview.png").write_bytes(b"drawn")

    monkeypatch.setattr(demo_dataset, "_draw_preview", draw)


def test_a_folder_for_each_motion_with_playable_files(dataset: Path) -> None:
    starts = index_of(dataset)
    for split, count in CLIPS.items():
        assert sorted(path.name for path in (dataset / split).iterdir()) == MOTIONS
        for motion in MOTIONS:
            assert len(list((dataset / split / motion).glob("*.mp4"))) == count
    assert len(starts) == len(MOTIONS) * sum(CLIPS.values())
    for name, start in starts.items():
        with av.open(str(dataset / name)) as container:
            video = container.streams.video[0]
            assert video.codec_context.name == "h264"
            frames = list(container.decode(video))
            assert {(frame.width, frame.height) for frame in frames} == {tuple(start["size"])}
            assert len(frames) == start["frames"]
            assert video.average_rate == Fraction(start["rate"])
            assert bool(container.streams.audio) == (start["tone"] > 0)


def test_clips_differ_in_size_rate_and_sound() -> None:
    starts = [demo_dataset.draw_start(0, "train", number) for number in range(60)]
    assert {start.size for start in starts} == set(demo_dataset.SIZES)
    assert {start.rate for start in starts} == set(demo_dataset.FRAME_RATES)
    assert 6 < sum(start.tone > 0 for start in starts) < 30
    assert len({start.frames for start in starts}) > 10


def test_sound_lasts_as_long_as_the_pictures(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (64, 48), (9 * i, 0, 0)) for i in range(25)]
    demo_dataset.write_video(tmp_path / "a.mp4", pictures, (64, 48), Fraction(25), tone=440)
    with av.open(str(tmp_path / "a.mp4")) as container:
        sound = np.concatenate([f.to_ndarray().ravel() for f in container.decode(audio=0)])
    assert len(sound) / demo_dataset.SOUND_RATE == pytest.approx(1.0, abs=0.1)
    loudest = np.abs(np.fft.rfft(sound[: demo_dataset.SOUND_RATE // 2])).argmax() * 2
    assert loudest == pytest.approx(440, abs=4)


def test_the_motion_can_be_seen_after_encoding(dataset: Path) -> None:
    for name in index_of(dataset):
        assert seen_motion(eight(*decode(dataset / name))) == Path(name).parent.name, name


def test_clips_of_one_number_begin_with_the_same_picture(dataset: Path) -> None:
    for split, count in CLIPS.items():
        for number in range(count):
            paths = [dataset / split / motion / f"{number:04d}.mp4" for motion in MOTIONS]
            pictures = {decode(path)[0][0].tobytes() for path in paths}
            assert len(pictures) == 1, "not even the encoder gives the motion away"


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("time", [0.0, 1.1])
def test_at_any_time_every_place_and_angle_is_as_likely(motion: str, time: float) -> None:
    rng = np.random.default_rng(3)
    counts = np.zeros((4, 4, 4))
    views = 6400
    for _ in range(views):
        view = demo_motion.random_view(rng, "any")
        # In the unit of the photograph's shorter side, of a photograph of 3 : 2.
        x, y, angle = demo_motion.path(view, motion, view.window, (3.0, 2.0), np.array([time]))
        places = x / 3.0, y / 2.0, angle / (2 * np.pi)
        counts[tuple(int(4 * (place[0] % 1)) for place in places)] += 1
    expected = views / counts.size
    # Chi-square with 63 degrees of freedom: above 115 once in 10,000 draws.
    assert ((counts - expected) ** 2 / expected).sum() < 115


def test_mirrored_photographs_repeat() -> None:
    places = demo_motion._mirrored(np.arange(-4, 9), 3)
    assert places.tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1, 2]


def test_a_slide_moves_pictures_by_whole_pixels() -> None:
    view = demo_motion.View("coffee.png", 0.5, 0.3, 0.2, angle=0.0, speed=0.25)
    # A quarter of 96 px in a second; later pictures are earlier ones, shifted.
    first, second = demo_motion.render(view, "slide_left", (128, 96), np.array([0.0, 1.0]))
    before, after = np.asarray(first, float), np.asarray(second, float)
    assert np.abs(before[:, 24:] - after[:, :-24]).max() <= 1


def test_splits_share_no_photograph(dataset: Path) -> None:
    photographs = demo_motion.PHOTOGRAPHS
    assert set(photographs["train"]).isdisjoint(photographs["val"])
    for name, start in index_of(dataset).items():
        assert start["view"]["photograph"] in photographs[Path(name).parts[0]]


def test_the_tour_shows_all_motions_in_turn(dataset: Path) -> None:
    pictures, _ = decode(dataset / "tour.mp4")
    assert len(pictures) == len(MOTIONS) * demo_dataset.TOUR_SECONDS * demo_dataset.TOUR_RATE
    for number, motion in enumerate(MOTIONS):
        first = number * demo_dataset.TOUR_SECONDS * demo_dataset.TOUR_RATE
        assert seen_motion(pictures[first : first + 30 : 4]) == motion


def test_the_preview_is_a_picture(dataset: Path) -> None:
    with Image.open(dataset / "preview.png") as preview:
        assert preview.width > 800 and preview.height > 300
        assert len(preview.convert("RGB").getcolors(1 << 24)) > 1000


@pytest.mark.usefixtures("quick")
def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = small(tmp_path / "a"), small(tmp_path / "b", train_clips=2)
    before, after = contents(first), contents(second)
    clips = [name for name in before if name.endswith(".mp4")]
    assert len(clips) == 2 * len(MOTIONS) + 1
    assert [name for name in clips if before[name] != after[name]] == []
    other = contents(small(tmp_path / "c", seed=1))
    assert not any(before[name] == other[name] for name in clips)


@pytest.mark.usefixtures("quick")
def test_rebuilds_only_when_asked_or_different(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small(tmp_path / "nested" / "motion")
    file = folder / "train" / "slide_left" / "0000.mp4"

    def built_again(**changes: Any) -> bool:
        before = file.stat().st_ino if file.exists() else None
        (folder / "manifest_train.csv").write_text("what a scan leaves")
        assert small(folder, **changes) == folder
        return file.stat().st_ino != before

    capsys.readouterr()
    assert not built_again()
    assert "up to date" in capsys.readouterr().out
    assert (folder / "manifest_train.csv").exists()
    assert built_again(force=True)
    assert not (folder / "manifest_train.csv").exists(), "it lists the clips that were there before"
    assert built_again(val_clips=2)
    file.unlink()
    assert built_again(val_clips=2)
    monkeypatch.setattr(demo_dataset, "RECIPE", demo_dataset.RECIPE + 1)
    assert built_again(val_clips=2)
    assert [path.name for path in folder.parent.iterdir()] == ["motion"], (
        "no scratch folder is left"
    )


@pytest.mark.usefixtures("quick")
def test_never_touches_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"mine .*another output folder"):
        small(foreign, force=True)
    demo = small(tmp_path / "motion")
    (demo / "train" / "notes.txt").write_text("mine too")
    with pytest.raises(UserError, match=r"notes\.txt"):
        small(demo, force=True)
    assert (foreign / "thesis.txt").read_text() == "years of work"
    assert (demo / "train" / "notes.txt").read_text() == "mine too"
    capsys.readouterr()
    assert demo_dataset.main(["--output", str(foreign)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


@pytest.mark.usefixtures("quick")
def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_dataset, "_draw_preview", stop)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "motion")
    assert not any(tmp_path.iterdir())


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    for wrong in ({"seed": -1}, {"train_clips": 0}, {"val_clips": -3}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*or more"):
            small(tmp_path / "motion", **wrong)


def test_missing_photographs_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(package: str) -> Path:
        raise ModuleNotFoundError(f"No module named {package!r}")

    monkeypatch.setattr(demo_motion, "files", absent)
    demo_motion._photo.cache_clear()
    demo_motion._scaled.cache_clear()
    arguments = ["--train-clips", "1", "--val-clips", "1", "--output", str(tmp_path / "motion")]
    assert demo_dataset.main(arguments) == 2
    assert "pip install scikit-image" in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())
