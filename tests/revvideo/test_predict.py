"""The predict command: the scores that testing gives, and what becomes of every input."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from revvideo.config import load_config
from revvideo.data.decode import Video
from revvideo.predict import main
from revvideo.prediction.media import frame_labels
from revvideo.prediction.predictor import MOST_WINDOWS, Predictor
from revvideo.prediction.results import drawing_names
from revvideo.run import main as train
from tests.revvideo import tiny_set
from tests.revvideo.make_videos import BAD, encode, make_bad
from tests.revvideo.tiny_set import CLASSES, Film, arguments


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps."""
    output = tmp_path_factory.mktemp("run") / "tiny"
    assert train(arguments(videos, output, "optim.lr=0.02", "test.clips=2", "test.crops=3")) == 0
    return output


@pytest.fixture
def predict(trained: Path, tmp_path: Path) -> Callable[..., int]:
    """``predict(input, *options)``: the command with the output ``tmp_path/out``; its status."""

    def call(path: Path, *options: str, drawings: bool = False) -> int:
        weights = trained / "checkpoints" / "last.ckpt"
        given = ["--config", str(trained / "config.yaml"), "--weights", str(weights)]
        given += ["--workers", "0", "--output", str(tmp_path / "out"), "--input", str(path)]
        return main([*given, *options, *([] if drawings else ["--no-drawings"])])

    return call


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of predictions.json by their paths, and results.json."""
    predictions = json.loads((folder / "out" / "predictions.json").read_text())
    return {entry["path"]: entry for entry in predictions}, tiny_set.results(folder / "out")


def test_scores_are_those_of_testing(predict, trained, videos, tmp_path, capsys):
    assert predict(videos / "val", "--batch-size", "13") == 0
    predictions, results = read(tmp_path)
    tested = tiny_set.predictions(trained)
    assert len(tested) == len(predictions) == results["videos"] == results["inputs"] == 7
    for row in tested:
        best = predictions[str(videos / row["path"])]["top"]
        assert [b["class"] for b in best] == [row["top1"], row["top2"], row["top3"]]
        expected = [float(row[f"score{k}"]) for k in (1, 2, 3)]
        assert [b["score"] for b in best] == pytest.approx(expected, abs=1e-5)
    assert results["unreadable"] == {}
    assert results["classes"] == list(CLASSES)
    printed = capsys.readouterr().out
    for path, entry in predictions.items():
        best = entry["top"][0]
        assert f"{path}: {best['class']} {100 * best['score']:.1f}%, " in printed


def test_overrides_may_follow_the_input(predict, videos, tmp_path):
    assert predict(videos / "val/dark/01.mp4", "test.clips=1", "test.crops=1") == 0
    predictions, results = read(tmp_path)
    assert len(predictions) == results["inputs"] == 1


def test_how_clips_are_grouped_does_not_matter(predict, videos, tmp_path):
    found = []
    for options in (("--batch-size", "1"), ("--batch-size", "64"), ("--workers", "2")):
        assert predict(videos / "val", *options) == 0
        found.append({path: entry["top"][0]["score"] for path, entry in read(tmp_path)[0].items()})
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] == pytest.approx(found[2], abs=1e-5)


def test_unreadable_inputs_are_named_and_counted(predict, videos, tmp_path, capsys):
    good, mess = videos / "val" / "dark" / "01.mp4", tmp_path / "mess"
    mess.mkdir()
    make_bad(mess)
    odd = mess / os.fsdecode(b"\xff.mp4")  # no UTF-8
    odd.touch()
    shutil.copy(good, mess / "good.mp4")
    assert predict(mess, str(mess / "miss*"), str(good)) == 0
    predictions, results = read(tmp_path)
    assert set(predictions) == {str(mess / "good.mp4"), str(good)}
    bad = {str(mess / name): reason for name, reason in BAD.items()}
    assert set(results["unreadable"]) == {*bad, str(odd)}
    assert (results["inputs"], results["videos"]) == (3 + len(bad), 2)
    captured = capsys.readouterr()
    assert f"2 of {3 + len(bad)} videos" in captured.out
    assert f"{1 + len(bad)} unreadable:" in captured.err
    for path, reason in bad.items():
        assert re.match(reason, results["unreadable"][path])
        assert f"{path}: {results['unreadable'][path]}" in captured.err


def test_nothing_but_unreadable_inputs_is_an_error(predict, tmp_path, capsys):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "out" / "videos").mkdir(parents=True)
    (tmp_path / "out" / "videos" / "copy.mp4").touch()  # of an earlier call, and no input
    assert predict(tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: not one of the 1 inputs")
    assert read(tmp_path)[1]["unreadable"]


def test_a_long_video_is_followed_over_time(predict, tmp_path):
    levels = [210] * 60 + [30] * 60  # bright, then dark
    pictures = [np.full((36, 40, 3), level, np.uint8) for level in levels]
    source = encode(tmp_path / "long.mp4", pictures)
    assert predict(source, drawings=True) == 0
    entry = read(tmp_path)[0][str(source)]
    assert (entry["frames"], entry["fps"], entry["width"], entry["height"]) == (120, 30, 40, 36)
    windows = entry["windows"]
    assert windows[0]["start"] == 0
    assert windows[-1]["end"] == pytest.approx(119 / 30, abs=1e-3)
    for before, after in pairwise(windows):
        assert before["start"] < after["start"] <= before["end"], "no gaps"
    best = [window["top"][0]["class"] for window in windows]
    assert best[0] != best[-1]
    assert {"strip", "curve", "video"} == set(entry["drawings"])
    for kind, suffix in (("strip", "png"), ("curve", "png"), ("video", "mp4")):
        assert Path(entry["drawings"][kind]) == tmp_path / "out" / f"{kind}s" / f"long.{suffix}"
        assert Path(entry["drawings"][kind]).stat().st_size > 1000
    with Video(entry["drawings"]["video"]) as copy, Video(source) as original:
        assert copy.timestamps == pytest.approx(original.timestamps, abs=1e-4)
        letters = copy.frames([5, 8, 112])[..., -20:, :].min(dim=1).values > 160
    widths = [int(part.any(dim=0).nonzero().max()) for part in letters]
    # As long as the names: the label changes where the best class does.
    assert abs(widths[0] - widths[1]) < 4 < 8 < abs(widths[0] - widths[2])


@pytest.fixture
def predictor(trained: Path) -> Predictor:
    config, weights = load_config(trained / "config.yaml"), trained / "checkpoints" / "last.ckpt"
    return Predictor(config, str(weights), device=torch.device("cpu"), batch_size=3)


def test_a_window_has_the_scores_of_its_clip(opened, predictor):
    assert opened.call_count == 1
    film = Film([i / 30 for i in range(120)], (40, 36))
    windows, short = predictor.windows(film), predictor.windows(film, step=0.05)
    assert len(windows.scores) == len(windows.starts) == len(windows.ends) == 39
    assert len(short.scores) == 77
    for number in (0, 17, 38):
        first = round(windows.starts[number] * 30)
        assert windows.ends[number] == pytest.approx((first + 6) / 30)
        # The pictures are plain: resizing changes nothing.
        clip = film.frames(range(first, first + 7, 2), short_side=32)[..., :32]
        data = predictor.config.data
        normed = (clip.float() / 255 - data.mean) / data.std
        expected = predictor.score(normed.permute(1, 0, 2, 3)[None])[0]
        assert torch.allclose(windows.scores[number], expected, atol=1e-4)


def test_windows_are_not_too_many_and_a_short_video_has_none(predictor):
    hour, short, still = ([i / 30 for i in range(count)] for count in (108_000, 18, 1))
    assert len(predictor.windows(Film(hour)).scores) == MOST_WINDOWS
    assert predictor.windows(Film(short)) is None
    predictor.config.data.stride = 0  # stills
    assert predictor.windows(Film(still)) is None


def test_labels_follow_the_nearest_window():
    def entry(start: float, end: float, name: str) -> dict[str, Any]:
        return {"start": start, "end": end, "top": [{"class": name, "score": 0.5}]}

    prediction = {"top": [{"class": "all", "score": 0.256}]}
    assert frame_labels([0.0, 9.0], prediction) == ["all  26%"] * 2
    prediction["windows"] = [entry(0, 2, "a"), entry(1, 3, "b"), entry(2, 4, "c")]
    labels = frame_labels([0.0, 1.4, 1.6, 2.4, 2.6, 9.0], prediction)
    assert [label[0] for label in labels] == ["a", "a", "b", "b", "c", "c"]


def test_each_input_has_drawings_of_its_own():
    files = ("left/0.mp4", "right/0.mp4", "right/0.avi", "right/1.mp4")
    paths = [Path("x", file) for file in files]
    names = ["left/0", "right/0.mp4", "right/0.avi", "right/1"]
    assert drawing_names(paths) == dict(zip(paths, names, strict=True))
    assert drawing_names(paths[:1]) == {paths[0]: "0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "0"), "--batch-size 0: use"),
        (("--step", "0"), "--step 0.0: use"),
        (("--step", "nan"), "--step nan: use"),
        (("--device", "gpu7"), "gpu7"),
        (("--weights", "nothing.ckpt"), "nothing.ckpt"),
        (("--weights", __file__), "test_predict.py is no checkpoint"),
        (("--config", "nothing.yaml"), "nothing.yaml"),
        (("--classes", "nothing.txt"), "nothing.txt"),
        (("--output", __file__), "is a file"),
        (("test.clip=3",), "test.clips"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_before_work(predict, videos, tmp_path, capsys, options, message):
    assert predict(videos / "val", "--no-drawings", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_names_of_classes_and_keys_of_the_config_can_be_given(predict, videos, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("snow ball\nnight\nzèbre\n", encoding="utf-8")
    more = ("--classes", str(names), "--no-drawings", "test.clips=1", "test.crops=1")
    assert predict(videos / "val", *more) == 0
    predictions, results = read(tmp_path)
    assert (results["run"]["clips"], results["run"]["crops"]) == (1, 1)
    assert results["classes"] == ["snow ball", "night", "zèbre"]
    best = {top["class"] for entry in predictions.values() for top in entry["top"]}
    assert best == {"snow ball", "night", "zèbre"}
    names.write_text("night\n")
    capsys.readouterr()
    assert predict(videos / "val", *more) == 2
    assert "names 1 classes, the model's head has 3" in capsys.readouterr().err


def test_what_was_found_is_kept_when_it_is_stopped(predict, videos, tmp_path, monkeypatch):
    calls: list[Path] = []

    def stop(_: Predictor, path: Path, *__: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("revvideo.prediction.run.look_closer", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(videos / "val")
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["path"] for entry in content] == [str(path) for path in calls]
