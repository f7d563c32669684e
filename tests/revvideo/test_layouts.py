"""Kinetics and the like, in the layouts that people have."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbones.common.errors import UserError
from revvideo.data.layouts import find_videos, splits_of


def touch(root: Path, *names: str) -> None:
    """Files that have the name of a video; layouts do not open these."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def refused(message: str, *arguments: object, **options: object) -> None:
    with pytest.raises(UserError, match=message):
        find_videos(*arguments, **options)


def test_folders(tmp_path):
    touch(tmp_path, "train/air_drumming/b.mkv", "train/air_drumming/a.mp4", "elsewhere/c.MP4")
    touch(tmp_path, "train/abseiling/z.mp4", "other/d.webm", "val/air-guitar/g.mp4")
    touch(tmp_path, "train/.cache/e.mp4", "train/abseiling/.f.mp4", "train/abseiling/.tmp/g.mp4")
    (tmp_path / "train" / "air-guitar").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "abseiling" / "part").symlink_to(tmp_path / "other")
    classes, entries = find_videos(tmp_path, "train")
    # By name, with a space for "_": as the released weights count.
    assert classes == ["abseiling", "air_drumming", "air-guitar"]
    assert entries == [
        ("train/abseiling/z.mp4", 0),
        ("train/abseiling/part/d.webm", 0),
        ("train/air_drumming/a.mp4", 1),
        ("train/air_drumming/b.mkv", 1),
        ("train/air-guitar/c.MP4", 2),
    ]
    expected = classes, [("val/air-guitar/g.mp4", 2)]
    assert find_videos(tmp_path, "val", classes=classes) == expected
    with_spaces = ["x", "air drumming", "air-guitar", "abseiling"]
    _, entries = find_videos(tmp_path, "train", classes=with_spaces)
    assert [label for _, label in entries] == [3, 3, 1, 1, 2]
    assert splits_of(tmp_path) == ["train", "val"]


def test_files_of_folders_that_are_no_videos_are_counted(tmp_path, caplog):
    touch(tmp_path, "train/a/a.mp4", "train/a/a.json", "train/b/b.json", "train/b/done")
    _, entries = find_videos(tmp_path, "train")
    assert entries == [("train/a/a.mp4", 0)]
    (message,) = caplog.messages
    assert "train: passed over" in message and "2 with '.json', 1 with ''" in message


def test_folders_with_a_list_of_files(tmp_path):
    """UCF101."""
    touch(tmp_path, "Archery/v_1.avi", "Archery/v_2.avi", "Bowling/v_1.avi", "Yo Yo/v_9.avi")
    (tmp_path / "trainlist01.txt").write_text("Archery/v_1.avi 1\nYo Yo/v_9.avi 3\n")
    (tmp_path / "testlist01.txt").write_text("\ufeffBowling/v_1.avi\n\n")
    classes, entries = find_videos(tmp_path, "train", "trainlist01.txt", "folders")
    assert classes == ["Archery", "Bowling", "Yo Yo"]
    assert entries == [("Archery/v_1.avi", 0), ("Yo Yo/v_9.avi", 2)]
    test = find_videos(tmp_path, "test", tmp_path / "testlist01.txt")
    assert test == (classes, [("Bowling/v_1.avi", 1)])
    (tmp_path / "bad.txt").write_text("Archery/v_1.avi\nRowing/v_1.avi\n")
    refused(r"bad\.txt, line 2: .* has no folder 'Rowing'", tmp_path, "train", "bad.txt", "folders")


@pytest.mark.parametrize("separator", [" ", ",", "\t", ", "])
def test_list(tmp_path, separator):
    """PySlowFast."""
    touch(tmp_path, "train/throwing axe/a b.mp4", "somewhere/c.mp4")
    lines = [("throwing axe/a b.mp4", 1), ("somewhere/c.mp4", 0), (f"{tmp_path}/d 2.mp4", 2)]
    text = "".join(f"{path}{separator}{label}\n" for path, label in lines)
    (tmp_path / "train.csv").write_text(text)
    classes, entries = find_videos(tmp_path, "train", layout="list")
    assert entries == [("train/throwing axe/a b.mp4", 1), *lines[1:]]
    assert classes == ["somewhere", "throwing axe", tmp_path.name]
    given = tmp_path, "train", "train.csv"
    assert find_videos(*given) == (classes, entries)
    refused(r"train\.csv, line 3: label 2 with the 2 classes", *given, classes=["a", "b"])


def test_names_of_a_list_whose_folders_are_not_classes(tmp_path):
    (tmp_path / "val.txt").write_text("a/1.mp4 0\na/2.mp4 2\nb/3.mp4 2\nb/4.mp4 -1\n")
    classes, entries = find_videos(tmp_path, "val")
    assert classes == ["0", "1", "2"] and [label for _, label in entries] == [0, 2, 2, -1]


def test_lists_with_quotes_names_and_a_line_of_columns(tmp_path):
    for text in (
        'path,label\n"a/1, 2.mp4","long jump"\nb/3.mp4,dive\n',
        "video label\na/1, 2.mp4 long jump\nb/3.mp4\tdive\n",
    ):
        (tmp_path / "train.csv").write_text(text)
        names, entries = find_videos(tmp_path, "train")
        assert names == ["dive", "long jump"] and entries == [("a/1, 2.mp4", 1), ("b/3.mp4", 0)]
    assert find_videos(tmp_path, "train", classes=["x", "dive", "long jump"])[1][0][1] == 2
    refused("class 'dive' in .* is none of the 1 classes", tmp_path, "train", classes=["long jump"])
    (tmp_path / "val.csv").write_text('video_id,label\n"c 1.mp4" 0\n')
    assert find_videos(tmp_path, "val")[1] == [("c 1.mp4", 0)]


def test_labels_that_no_video_has_are_said(tmp_path, caplog):
    (tmp_path / "train.csv").write_text("v/1.mp4 1\nv/2.mp4 4\n")
    assert len(find_videos(tmp_path, "train")[0]) == 5
    assert "no video has the label 0, 2, 3" in caplog.text


def test_the_lists_of_ucf101_name_folders(tmp_path):
    touch(tmp_path, "Archery/v_1.avi", "Bowling/v_2.avi", "Curling/v_3.avi")
    (tmp_path / "train.txt").write_text("Archery/v_1.avi 1\nBowling/v_2.avi 2\n")
    names, entries = find_videos(tmp_path, "train", "train.txt")
    assert names == ["Archery", "Bowling", "Curling"] and [label for _, label in entries] == [0, 1]


def test_links_that_lead_back_are_followed_once(tmp_path):
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4")
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/b/up").symlink_to(tmp_path / "train/b", target_is_directory=True)
    assert len(find_videos(tmp_path, "train")[1]) == 2


# The last would be names for a billion classes.
@pytest.mark.parametrize(
    "line", ["a/1.mp4 x", "a/1.mp4", "a/1.mp4 -2", "a/1.mp4 1.5", "a/1.mp4 1000000000"]
)
def test_bad_list(tmp_path, line):
    (tmp_path / "train.txt").write_text(f"a/0.mp4 0\n{line}\n")
    refused(r"train\.txt, line 2: .* is not `path label`", tmp_path, "train", "train.txt")


def test_lists_of_more_than_path_and_label(tmp_path, caplog):
    """A third column is no part of a class's name, and a second label none of the path's."""
    touch(tmp_path, "1.mp4")
    (tmp_path / "train.csv").write_text("1.mp4,dive,train\n")
    refused(
        r"line 1: '1\.mp4,dive,train' is not `path label`.*quotes", tmp_path, "train", layout="list"
    )
    (tmp_path / "train.csv").write_text('1.mp4,"dive, deep"\n')
    assert find_videos(tmp_path, "train")[0] == ["dive, deep"]
    (tmp_path / "train.csv").write_text("1.mp4,0 1\n")
    assert find_videos(tmp_path, "train", layout="list")[1] == [("1.mp4,0", 1)]  # which is missing
    (tmp_path / "train.csv").write_text("1.mp4,0.0\n1.mp4,1.\n" + "x" * 5000 + ".mp4,1\n")
    assert find_videos(tmp_path, "train")[0] == ["0", "1"]
    assert "of several labels each: 1.mp4" in caplog.text


HEADER = "label,youtube_id,time_start,time_end,split"


@pytest.mark.parametrize("annotations", [None, "somewhere/else.csv"])
def test_annotations_of_kinetics(tmp_path, annotations):
    file = tmp_path / (annotations or "annotations/val.csv")
    file.parent.mkdir(exist_ok=True)
    rows = [
        '"passing American football (in game)",--07WQ2iBlw,1,11,validate',
        "javelin throw,-Fl7M-V4EW8,16,26,validate",
        "air drumming,0a_x-k34FB4,2.0,12.0,validate",
        "air drumming,gone0000000,100,110,validate",
        "abseiling,another0000,5,15,train",
    ]
    file.write_text("\n".join([HEADER, *rows]) + "\n")
    touch(tmp_path, "val/--07WQ2iBlw_000001_000011.mp4", "train/--07WQ2iBlw_000001_000011.mp4")
    # Folders in the split's folder are taken for classes, unless annotations are given.
    one, two = ("javelin throw/", "x/") if annotations else ("", "")
    touch(tmp_path, f"val/{one}-Fl7M-V4EW8_000016_000026.mkv", f"val/{two}0a_x-k34FB4.webm")
    classes, entries = find_videos(tmp_path, "val", annotations)
    assert classes == ["air drumming", "javelin throw", "passing American football (in game)"]
    assert entries == [
        ("val/--07WQ2iBlw_000001_000011.mp4", 2),
        (f"val/{one}-Fl7M-V4EW8_000016_000026.mkv", 1),
        (f"val/{two}0a_x-k34FB4.webm", 0),
        ("val/gone0000000_000100_000110.mp4", 0),
    ]
    underscored = ["abseiling", "air_drumming", "javelin_throw", classes[2]]
    _, again = find_videos(tmp_path, "val", annotations, classes=underscored)
    assert [label for _, label in again] == [3, 2, 1, 1]
    refused(r"has no split 'test', only train, val$", tmp_path, "test", file)


def test_annotations_without_labels(tmp_path):
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\nabc,1,11,test\n")
    touch(tmp_path, "test/abc_000001_000011.mp4")
    _, entries = find_videos(tmp_path, "test", classes=["a"])
    assert entries == [("test/abc_000001_000011.mp4", -1)]


def test_bad_annotations(tmp_path):
    for line in ("a,abc,zero,10,train", "a,abc"):  # which is cut off
        (tmp_path / "train.csv").write_text(f"{HEADER}\n{line}\n")
        refused(r"train\.csv: the time of abc is no number", tmp_path, "train")
    for layout in ("auto", "csv", "list"):
        (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")  # a spreadsheet, say
        refused(r"train\.csv cannot be read as text", tmp_path, "train", layout=layout)
    (tmp_path / "train.csv").write_text("label,youtube_id,split\na,abc,train\n")
    refused(r"train\.csv has no column time_end, time_start", tmp_path, "train")


def test_nothing_there(tmp_path):
    refused(r"the folder .*none does not exist", tmp_path / "none", "train")
    refused(r"holds no folders of classes, and .* no annotations", tmp_path, "train")
    refused("no annotations for split 'train' .*: tried train.csv", tmp_path, "train", layout="csv")
    refused(r"the annotations none.txt do not exist", tmp_path, "train", "none.txt")
    with pytest.raises(UserError, match="none of the splits train, val, test"):
        splits_of(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    refused(r"split 'train' of .* holds no video", tmp_path, "train")


def test_a_class_that_the_model_does_not_have(tmp_path):
    touch(tmp_path, "val/archery2/a.mp4")
    two = ["archery", "bowling"]
    refused("'archery2' .* none of the 2 classes .*such as archery:", tmp_path, "val", classes=two)
