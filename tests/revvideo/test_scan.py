"""The scan names what cannot be used, with a reason, and opens nothing twice."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from backbones.common.errors import UserError
from revvideo.data import decode, packets
from revvideo.data import scan as scan_module
from revvideo.data.clips import ClipDataset, uniform_clips
from revvideo.data.manifest import Manifest, VideoRecord, describe, load_manifest
from revvideo.data.scan import scan
from revvideo.scan import main
from tests.revvideo.make_videos import BAD, damage, encode, make_bad

GOOD = ["train/a/good.mp4", "train/a/short.mkv", "train/b/good.avi"]
PROBLEMS = {f"train/b/{name}": reason for name, reason in BAD.items()}
PROBLEMS["train/a/one.mp4"] = "has a single frame"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three good videos, and one of each kind of bad one."""
    root = tmp_path_factory.mktemp("set")
    a, b = root / "train" / "a", root / "train" / "b"
    encode(a / "good.mp4", 30, sound=True)
    encode(a / "short.mkv", 3, rotation=90)
    encode(a / "one.mp4", 1)
    encode(b / "good.avi", 20, codec="mpeg4")
    make_bad(b)
    encode(root / "val" / "b" / "v.mp4", 5)
    return root


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files that a scan in this process has opened."""
    names: list[str] = []
    probe = scan_module.probe
    monkeypatch.setattr(
        scan_module, "probe", lambda path, **how: names.append(path.name) or probe(path, **how)
    )
    return names


def assert_complete(manifest: Manifest) -> None:
    assert manifest.classes == ["a", "b"]
    assert [record.path for record in manifest.readable] == GOOD
    problems = {record.path: record.problem for record in manifest.unreadable}
    assert problems.keys() == PROBLEMS.keys()
    for path, reason in PROBLEMS.items():
        assert re.match(reason, problems[path]) and "\n" not in problems[path]
    good, short, avi = manifest.readable
    assert (good.label, good.frames, good.width, good.height) == (0, 30, 64, 48)
    assert (good.fps, good.duration) == (30, 1)
    assert (short.frames, short.width, short.height) == (3, 48, 64)  # upright
    assert (avi.label, avi.frames) == (1, 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_names_what_cannot_be_used(root, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(scan_module, "_FILES_PER_WORKER", 1)
    assert_complete(scan(root, "train", workers=workers, manifest_path=tmp_path / "m.csv"))


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


def test_where_the_frames_of_long_files_lie_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(packets, "_LONG", 30)
    encode(tmp_path / "train" / "a" / "long.mp4", 40)
    encode(tmp_path / "train" / "a" / "short.mp4", 20)
    path = tmp_path / "manifest.csv"
    scan(tmp_path, "train", workers=0, manifest_path=path)
    records = load_manifest(path).records
    assert [bool(record.index) for record in records] == [True, False]

    def same(clip: torch.Tensor) -> torch.Tensor:
        return clip

    dataset = ClipDataset(records, tmp_path, uniform_clips(4, 2), same)
    before = dataset[0, 0]["video"]
    read = Mock(wraps=decode.read_index)
    monkeypatch.setattr(decode, "read_index", read)
    assert torch.equal(dataset[0, 0]["video"], before) and not read.called
    spoilt = ClipDataset([replace(records[0], index="eJw=")], tmp_path, uniform_clips(4, 2), same)
    assert torch.equal(spoilt[0, 0]["video"], before) and read.called
    read.reset_mock()
    # A manifest from before there was one, and a file that is another than was scanned.
    path.write_text(path.read_text().replace(",index", "").replace(f",{records[0].index}\n", "\n"))
    assert [record.index for record in load_manifest(path).records] == ["", ""]
    encode(tmp_path / "train" / "a" / "long.mp4", 20)
    assert len(dataset[0, 0]["video"]) == 1 and read.called


def test_opens_only_what_has_changed(root, tmp_path, opened):
    path = tmp_path / "manifest.csv"
    first = scan(root, "train", workers=0, manifest_path=path)
    assert len(opened) == len(GOOD) + len(PROBLEMS)
    opened.clear()
    assert scan(root, "train", workers=0, manifest_path=path) == first
    assert set(opened) == {Path(name).name for name in PROBLEMS}
    video = root / "train" / "a" / "good.mp4"
    content = video.read_bytes()
    try:
        video.write_bytes(b"broken")
        again = scan(root, "train", workers=0, manifest_path=path)
        (broken,) = (record for record in again.unreadable if record.path == GOOD[0])
        assert broken.problem.startswith("is not a video")
    finally:
        video.write_bytes(content)
    assert_complete(scan(root, "train", workers=0, manifest_path=path))


def test_an_interrupted_scan_goes_on_and_moved_videos_stay_known(tmp_path, opened, monkeypatch):
    for number in range(6):
        encode(tmp_path / f"set/train/a/{number}.mp4", 3)
    path, probe = tmp_path / "manifest.csv", scan_module.probe

    def interrupted(file: Path, **how):
        if len(opened) == 4:
            raise KeyboardInterrupt
        return probe(file, **how)

    monkeypatch.setattr(scan_module, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path / "set", "train", workers=0, manifest_path=path)
    assert not path.exists()
    monkeypatch.setattr(scan_module, "probe", probe)
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = scan(tmp_path / "moved", "train", workers=0, manifest_path=path)
    assert opened == [f"{number}.mp4" for number in range(6)] and len(moved.readable) == 6
    assert moved.root == tmp_path / "moved" and [*tmp_path.glob("*.unfinished")] == []


def test_a_deep_scan_finds_damage_behind_the_first_frame(root, tmp_path):
    path = encode(tmp_path / "train/a/v.mp4", 40, options={"g": "10"})
    damage(path, 20)
    manifest = tmp_path / "m.csv"
    assert len(scan(tmp_path, "train", workers=0, manifest_path=manifest).readable) == 1
    (record,) = scan(tmp_path, "train", workers=0, manifest_path=manifest, deep=True).records
    assert re.match("decoding fails after|only [0-9]+ of 40 frames", record.problem)


def test_labels_follow_the_classes_also_of_known_files(root, tmp_path):
    path = tmp_path / "manifest.csv"
    assert scan(root, "val", workers=0, manifest_path=path).records[0].label == 0
    classes = ["a", "b"]
    again = scan(root, "val", workers=0, manifest_path=path, classes=classes)
    assert again.records[0].label == 1 and again.classes == classes


def test_command(root, capsys):
    assert main([str(root), "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert f"train: 3 of {3 + len(PROBLEMS)} videos can be used: 2 classes" in shown
    assert "val: 1 of 1 videos can be used: 2 classes" in shown  # those of train
    for path, reason in PROBLEMS.items():
        assert re.search(f"{path}: {reason}", shown)
    assert_complete(load_manifest(root / "manifest_train.csv"))
    assert load_manifest(root / "manifest_val.csv").records[0].label == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none"], "error: the folder .*none does not exist"),
        ([".", "--split", "other"], "error: .*other holds no folders of classes"),
        ([".", "--split", "val", "--output", "train/a"], "error: .*train/a.* cannot be"),
        ([".", "--split", "val", "--output", "val/b/v.mp4"], "error: .* is no manifest"),
        ([".", "--output", "x.csv"], "error: .*--output"),
    ],
)
def test_bad_arguments(root, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--workers", "0"])
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.match(message, lines[0]), lines


def test_bad_number_of_workers(root, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(root), "--workers", "-1"])
    assert "--workers" in capsys.readouterr().err


FIRST_LINES = ["# 3", "path,label", '# {"format": "other"}', '# {"format": "revvideo manifest 1"}']


@pytest.mark.parametrize("content", ["", *FIRST_LINES])
def test_not_a_manifest(tmp_path, content):
    path = tmp_path / "manifest.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.csv is no manifest \(.*\): delete it"):
        load_manifest(path)
    with pytest.raises(UserError, match=r"none\.csv cannot be read \(No such file.*\): write it"):
        load_manifest(tmp_path / "none.csv")


def test_describe():
    good = VideoRecord("a.mp4", 0, frames=9, duration=5400.0)
    bad = [VideoRecord(f"{number}.mp4", 1, problem="file is empty") for number in range(1501)]
    lines = ["1 of 2 videos can be used: 2 classes, 1.50 hours", "  0.mp4: file is empty"]
    few, many = (Manifest(Path("."), ["x", "y"], [good, *bad[:count]]) for count in (1, 1501))
    assert describe(few, most=1).splitlines() == lines
    assert describe(many, most=1).splitlines()[1:] == [lines[1], "  and 1,500 more"]
