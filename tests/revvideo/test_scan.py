"""The scan names what cannot be used, with a reason, and opens nothing twice."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from backbones.common.errors import UserError
from revvideo.data import scan as scan_module
from revvideo.data.manifest import Manifest, VideoRecord, describe, load_manifest
from revvideo.data.scan import scan
from revvideo.scan import main
from tests.revvideo.make_videos import cut, encode, encode_sound

# What the scan must find in the set below, and why.
PROBLEMS = {
    "train/a/empty.mp4": "file is empty",
    "train/a/link.mp4": "file is missing",
    "train/a/one.mp4": "has a single frame",
    "train/a/sound.mp4": "has no video stream, only sound",
    "train/b/cut.mp4": "is cut off after ",
    "train/b/cut_index.mp4": "is cut off: the index",
    "train/b/text.mp4": "is not a video",
}
GOOD = ["train/a/good.mp4", "train/a/short.mkv", "train/b/good.avi"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three good videos, and one of each kind of bad one."""
    root = tmp_path_factory.mktemp("set")
    a, b = root / "train" / "a", root / "train" / "b"
    encode(a / "good.mp4", 30, size=(64, 48), sound=True)
    encode(a / "short.mkv", 3, rotation=90)
    encode(b / "good.avi", 20, codec="mpeg4")
    (a / "empty.mp4").touch()
    (a / "link.mp4").symlink_to(root / "nothing.mp4")
    encode(a / "one.mp4", 1)
    encode_sound(a / "sound.mp4")
    whole = encode(root / "whole.mp4", container_options={"movflags": "faststart"})
    cut(whole, b / "cut.mp4", 0.7)
    cut(encode(root / "index_last.mp4"), b / "cut_index.mp4", 0.7)
    (b / "text.mp4").write_text("hello\n" * 100)
    encode(root / "val" / "b" / "v.mp4", 5)
    return root


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files that a scan in this process has opened."""
    names: list[str] = []
    probe = scan_module.probe
    monkeypatch.setattr(
        scan_module, "probe", lambda path: names.append(Path(path).name) or probe(path)
    )
    return names


def problems_of(manifest: Manifest) -> dict[str, str]:
    return {record.path: record.problem for record in manifest.unreadable}


def assert_complete(manifest: Manifest) -> None:
    assert manifest.classes == ["a", "b"]
    assert [record.path for record in manifest.readable] == GOOD
    problems = problems_of(manifest)
    assert problems.keys() == PROBLEMS.keys()
    for path, reason in PROBLEMS.items():
        assert problems[path].startswith(reason) and "\n" not in problems[path]
    good, short, avi = manifest.readable
    assert (good.label, good.frames, good.width, good.height) == (0, 30, 64, 48)
    assert (good.fps, good.duration) == (30, 1)
    assert (short.frames, short.width, short.height) == (3, 48, 64)  # upright
    assert (avi.label, avi.frames) == (1, 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_names_what_cannot_be_used(root, monkeypatch, workers):
    monkeypatch.setattr(scan_module, "_FILES_PER_WORKER", 1)
    assert_complete(scan(root, "train", workers=workers))


def test_manifest_is_read_as_it_was_written(root, tmp_path):
    path = tmp_path / "new" / "manifest.csv"
    manifest = scan(root, "train", workers=0, manifest_path=path)
    assert load_manifest(path) == manifest
    lines = path.read_text().splitlines()
    assert lines[0].startswith('# {"format"')
    assert len(list(csv.DictReader(lines[1:]))) == len(GOOD) + len(PROBLEMS)
    assert list(path.parent.iterdir()) == [path]  # nothing unfinished is left
    odd = replace(manifest.records[0], path='a,"b"\n ü.mp4', problem="x, y")
    replace(manifest, records=[odd], classes=["ü", 'q"']).save(path)
    assert load_manifest(path).records == [odd] and load_manifest(path).classes == ["ü", 'q"']


def test_opens_only_what_has_changed(root, tmp_path, opened):
    path = tmp_path / "manifest.csv"
    first = scan(root, "train", workers=0, manifest_path=path)
    assert len(opened) == len(GOOD) + len(PROBLEMS)
    opened.clear()
    assert scan(root, "train", workers=0, manifest_path=path) == first
    assert not {Path(good).name for good in GOOD} & set(opened)
    assert set(opened) == {Path(name).name for name in PROBLEMS}
    video = root / "train" / "a" / "good.mp4"
    content = video.read_bytes()
    try:
        video.write_bytes(b"broken")
        again = scan(root, "train", workers=0, manifest_path=path)
        assert problems_of(again)["train/a/good.mp4"].startswith("is not a video")
    finally:
        video.write_bytes(content)
    assert_complete(scan(root, "train", workers=0, manifest_path=path))


def test_labels_follow_the_classes_also_of_known_files(root, tmp_path):
    path = tmp_path / "manifest.csv"
    assert scan(root, "val", workers=0, manifest_path=path).records[0].label == 0
    classes = ["a", "b"]
    again = scan(root, "val", workers=0, manifest_path=path, classes=classes)
    assert again.records[0].label == 1 and again.classes == classes


def test_command(root, capsys):
    assert main([str(root), "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "train: 3 of 10 videos can be used: 2 classes" in shown
    assert "val: 1 of 1 videos can be used: 2 classes" in shown  # those of train
    for path, reason in PROBLEMS.items():
        assert f"{path}: {reason}" in shown
    assert_complete(load_manifest(root / "manifest_train.csv"))
    assert load_manifest(root / "manifest_val.csv").records[0].label == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none"], "error: the folder .*none does not exist"),
        ([".", "--split", "other"], "error: .*other holds no folders of classes"),
        ([".", "--split", "val", "--output", "train/a"], "error: .*train/a.* cannot be"),
        ([".", "--split", "val", "--output", "val/b/v.mp4"], "error: .* is no manifest"),
    ],
)
def test_bad_arguments(
    root,
    monkeypatch,
    capfd,
    arguments,
    message,
):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--workers", "0"])
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.match(message, lines[0]), lines


@pytest.mark.parametrize("options", [("--output", "x.csv"), ("--workers", "-1")])
def test_bad_options(root, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main([str(root), *options])
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "path,label\n",
        '# {"format": "other"}\n',
        '# {"format": "revvideo manifest 1"}\n',
        "# 3\n",
    ],
)
def test_not_a_manifest(tmp_path, content):
    path = tmp_path / "manifest.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.csv is no manifest \(.*\): delete it"):
        load_manifest(path)
    with pytest.raises(UserError, match=r"none\.csv cannot be read \(No such file.*\): write it"):
        load_manifest(tmp_path / "none.csv")


def test_describe():
    records = [
        VideoRecord("a.mp4", 0, frames=9, duration=5400.0),
        VideoRecord("b.mp4", 1, problem="file is empty"),
    ]
    more = [VideoRecord(f"{number}.mp4", 1, problem="file is missing") for number in range(1500)]
    manifest = Manifest(Path("."), ["x", "y"], [*records, *more])
    assert describe(manifest, most=1).splitlines()[1:] == [
        "  b.mp4: file is empty",
        "  and 1,500 more",
    ]
    assert describe(Manifest(Path("."), ["x", "y"], records), most=1).splitlines() == [
        "1 of 2 videos can be used: 2 classes, 1.50 hours",
        "  b.mp4: file is empty",
    ]
