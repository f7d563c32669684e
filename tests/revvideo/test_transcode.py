"""Transcoded videos have the frames and times of their originals, and decode from anywhere."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import av
import pytest

from backbones.common.errors import UserError
from revvideo.data.decode import Video
from revvideo.data.layouts import find_videos
from revvideo.data.scan import scan
from revvideo.data.transcode import Encoding, transcode
from revvideo.transcode import main
from tests.revvideo.make_videos import BAD, IRREGULAR_TIMES, KINDS, encode, make_bad


def test_every_kind_of_file_keeps_its_frames_and_times(make, tmp_path):
    source = tmp_path / "set"
    (source / "train" / "a").mkdir(parents=True)
    for name in KINDS:
        place = source / "train" / "a" / name.replace(".", "_")
        place.mkdir()
        os.link(make(name), place / name)
    outcome = transcode(source, tmp_path / "new", "train", Encoding(short_side=24), workers=0)
    assert not outcome.problems
    assert len(outcome.psnr) == len(KINDS)
    for path in outcome.psnr:
        new = tmp_path / "new" / Path(path).with_suffix(".mp4")
        with Video(source / path) as before, Video(new) as after:
            assert after.timestamps == pytest.approx(before.timestamps, abs=1e-6)
            assert min(after.info.width, after.info.height) == 24
            chosen = [0, len(before) // 2, len(before) - 1]
            error = before.frames(chosen, 24).float() - after.frames(chosen).float()
            assert error.abs().mean() < 16, path  # the neighbours of a frame are 60 off
        with av.open(new) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
            assert keyframes[0] == 0
            # Frames that no other refers to, nal_ref_idc = 0, in all groups of four that are full.
            unneeded = sum(bytes(packet)[4] & 0x60 == 0 for packet in packets)
            assert unneeded >= len(packets) // 2
            assert all(b - a <= 16 for a, b in pairwise([*keyframes, len(packets)]))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A list, UCF101's way, of two files of odd and of even sides, and one that is missing."""
    root = tmp_path / "ucf"
    encode(root / "A" / "one.avi", 20, "mpeg4")
    encode(root / "B" / "two.mkv", 20, size=(66, 50), times=IRREGULAR_TIMES[:20])
    (root / "train.txt").write_text("A/one.avi 1\nB/two.mkv 2\nB/lost.avi 2\n")
    return root


def test_a_list_comes_along_and_what_is_whole_stays(source, tmp_path, capsys):
    new = tmp_path / "new"
    command = [str(source), str(new), "--workers", "0"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "2 of 3 videos written, 0 stood there already" in printed.out
    assert "dB of" in printed.out and f"data.root={new}" in printed.out
    assert "B/lost.avi: file is missing" in printed.err
    assert find_videos(new, "train") == (
        ["A", "B"],
        [("A/one.mp4", 0), ("B/two.mp4", 1), ("B/lost.avi", 1)],
    )
    manifest = scan(new, "train", manifest_path=tmp_path / "manifest.csv")
    assert [record.path for record in manifest.usable] == ["A/one.mp4", "B/two.mp4"]

    before = (new / "A" / "one.mp4").stat()
    assert main(command) == 0
    assert "0 of 3 videos written, 2 stood there already" in capsys.readouterr().out
    assert (new / "A" / "one.mp4").stat() == before
    # Not where the original has changed, or where something else is wanted.
    encode(source / "A" / "one.avi", 10, "mpeg4")
    assert main(command) == 0
    assert "1 of 3 videos written, 1 stood there already" in capsys.readouterr().out
    assert main([*command, "--crf", "30"]) == 0
    assert "2 of 3 videos written" in capsys.readouterr().out


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    bad, good, new = (tmp_path / name for name in ("bad", "good", "new"))
    (bad / "train" / "a").mkdir(parents=True)
    make_bad(bad / "train" / "a")
    encode(good / "train" / "a" / "v.mp4", 5)
    encode(good / "train" / "a" / "v.avi", 5, "mpeg4")
    with pytest.raises(UserError, match=f"none of the {len(BAD)} videos can be written"):
        transcode(bad, new, "train", Encoding(), workers=0)
    outcome = transcode(good, new, "train", Encoding(), workers=0)
    assert list(outcome.problems) == ["train/a/v.mp4"]
    assert "v.avi does: rename" in outcome.problems["train/a/v.mp4"]
    assert [path.name for path in new.rglob("*") if path.is_file()] == ["v.mp4"]

    # A frame less than there should be is found out before the file has its name.
    (new / "train" / "a" / "v.mp4").unlink()
    whole = Video.pictures
    monkeypatch.setattr(Video, "pictures", lambda *args: list(whole(*args))[:-1])
    with pytest.raises(UserError, match="4 of its 5 frames could be written"):
        transcode(good, new, "train", Encoding(), workers=0)
    assert not [path for path in new.rglob("*") if path.is_file()]


def test_refusals(source, tmp_path, capsys):
    for arguments, message in (
        ([source, source / "new"], "lies in"),
        ([source, tmp_path / "new", "--crf", "60"], "crf=60 is none of x264's: 0 to 51"),
        ([source, tmp_path / "new", "--annotations", "x.txt"], "goes with one --split"),
        ([tmp_path / "none", tmp_path / "new"], "does not exist"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(argument) for argument in arguments])
        assert message in capsys.readouterr().err
