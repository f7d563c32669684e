"""The frames of a clip are those of a full decode, byte by byte, whatever is odd about the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from revvideo.data import decode, packets
from revvideo.data.clips import Clips, uniform_clips
from revvideo.data.decode import Video, probe
from revvideo.errors import VideoError
from tests.revvideo.make_videos import BAD, IRREGULAR_TIMES, KINDS, damage, encode, make_bad

DECODED_FROM_START = {
    "no_times.avi",
    "start_over.ts",
    "step_back.ts",
    "without_its_keyframe.mp4",
    "leading_frames.mkv",
    "intra_refresh.mp4",
    "mpeg4.avi",
    "times_of_decoding.mp4",
    "wmv2.wmv",
    # The encoder announces frames out of order, but there are too few for that.
    "three_frames.mov",
    "rotated_90.mov",
}


def full_decode(path: Path) -> list[np.ndarray]:
    """All frames, upright, by the plainest means; up to where the decoder fails."""
    shown = []
    with av.open(path) as container:
        container.streams.video[0].thread_type = "NONE"
        try:
            for frame in container.decode(video=0):
                picture = frame.to_ndarray(format="rgb24")
                shown.append(np.rot90(picture, frame.rotation // 90 % 4))
        except av.error.InvalidDataError:
            pass
    return shown


def assert_frames(video: Video, indices: list[int], shown: list[np.ndarray]) -> None:
    found = video.frames(indices)
    assert found.dtype == torch.uint8 and found.shape[:2] == (len(indices), 3)
    np.testing.assert_array_equal(
        found.permute(0, 2, 3, 1).numpy(), np.stack([shown[i] for i in indices])
    )


@pytest.mark.parametrize("how", ["kept", "sought", "known"])
@pytest.mark.parametrize("name", KINDS)
def test_frames_of_a_full_decode(make, monkeypatch, name, how):
    monkeypatch.setattr(packets, "_LONG", 0)
    index = ""
    if how == "known":
        with Video(make(name)) as video:
            index, timestamps = video.info.index, video.timestamps
        assert index or name in DECODED_FROM_START
    elif how == "sought":
        monkeypatch.setattr(packets, "_KEEP_BYTES", 0)
    shown = full_decode(make(name))
    if index:
        monkeypatch.setattr(decode, "read_index", None)
    with Video(make(name), whole=True, known_index=index) as video:
        assert not index or video.timestamps == timestamps
        assert len(video) == len(video.timestamps) == len(shown)
        assert video.timestamps[0] == 0 and video.timestamps == sorted(video.timestamps)
        everything = list(range(len(shown)))
        clips = [everything, everything[::-3], everything[:1], everything[-1:]]
        for _ in range(3):
            clips += Clips(16, 4)(video.timestamps)
        clips += uniform_clips(8, 2, clips=4)(video.timestamps)
        clips += uniform_clips(64, 4, clips=1)(video.timestamps)  # longer than any of the videos
        clips += [[i] for i in everything[::5]]
        for clip in clips:
            assert_frames(video, clip, shown)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in DECODED_FROM_START])
def test_seeks(make, monkeypatch, name):
    with Video(make(name)) as video:
        monkeypatch.setattr(Video, "_all_frames", None)  # which decodes from the start
        for clip in uniform_clips(4, 2, clips=5)(video.timestamps):
            video.frames(clip)


@pytest.mark.parametrize(
    ("name", "wanted", "most"),
    [
        ("constant.mp4", [69], 20),  # the last group of pictures starts with frame 50
        ("deep_b_pyramid.mp4", [0, 28], 19),
    ],
)
def test_frames_that_no_other_needs_are_not_decoded(make, name, wanted, most):
    with Video(make(name)) as video:
        numbers = Mock(wraps=video._index.numbers)  # where every frame that comes out is looked up
        video._index = replace(video._index, numbers=numbers)
        video.frames(wanted)
        assert len(wanted) <= numbers.get.call_count <= most


@pytest.mark.parametrize("name", ["constant.mp4", "intra_refresh.mp4", "mpeg4.avi"])
def test_one_thread_inside_a_worker(make, name):
    def read(_: int) -> tuple[int, torch.Tensor]:
        with Video(make(name)) as video:
            return video._codec.thread_count, video.frames([0, 20, 39])

    ((threads, frames),) = DataLoader([0], batch_size=None, num_workers=1, collate_fn=read)
    assert threads == 1
    torch.testing.assert_close(frames, read(0)[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["variable_rate.mp4", "variable_rate.mkv", "wmv2.wmv"])
def test_times_of_a_variable_rate(make, name):
    expected = [(t - IRREGULAR_TIMES[0]) / 1000 for t in IRREGULAR_TIMES]
    with Video(make(name)) as video:
        assert video.timestamps == pytest.approx(expected, abs=1e-3)


def test_info(make):
    info = probe(make("constant.mp4"))
    assert (info.frames, info.width, info.height) == (70, 64, 48)
    assert info.fps == pytest.approx(30, abs=0.01)
    assert info.duration == pytest.approx(70 / 30, abs=0.01)
    upright = probe(make("rotated_90.mov"))
    assert (upright.width, upright.height) == (48, 64)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_upright(make, tmp_path, rotation, mirrored):
    path = encode(tmp_path / "turned.mov", 3, rotation=rotation, mirrored=mirrored)
    with Video(make("three_frames.mov")) as plain, Video(path) as turned:
        expected = torch.rot90(plain.frames([1]), rotation // 90, (2, 3))  # counterclockwise
        expected = expected.flip(3) if mirrored else expected
        torch.testing.assert_close(turned.frames([1]), expected, rtol=0, atol=0)


def test_resized_while_decoding(make):
    with Video(make("constant.mp4")) as video:
        small, others = (video.frames(clip, short_side=24) for clip in ([3, 9], [4, 10]))
        assert small.shape == (2, 3, 24, 32)
        expected = interpolate(video.frames([3, 9]).float(), (24, 32), mode="area")
        # The pictures are noise, so that any other frame is far off.
        assert (small - expected).abs().mean() < 0.7 * (others - expected).abs().mean()
        assert video.frames([3], short_side=480).shape == (1, 3, 48, 64)  # never enlarged
    with Video(make("rotated_90.mov")) as video:
        assert video.frames([0], short_side=24).shape == (1, 3, 32, 24)


def test_break_in_the_middle(tmp_path):
    options = {"x264-params": "keyint=20:min-keyint=20:scenecut=0"}
    whole = full_decode(encode(tmp_path / "whole.mp4", 60, options=options))
    # The packet after the second keyframe is a P frame, which the rest of its group needs.
    path = damage(encode(tmp_path / "broken.mp4", 60, options=options), packet=21)
    shown = full_decode(path)
    assert 15 <= len(shown) <= 21
    assert probe(path).frames == 60
    with Video(path) as video:
        assert_frames(video, list(range(len(shown))), shown)
        for clip in ([2, 39], [30], list(range(10, 50, 4))):
            with pytest.raises(VideoError, match=rf"^decoding fails after {len(shown)} frames \("):
                video.frames(clip)
        assert_frames(video, [0, 5, len(shown) - 1], shown)  # as good as before
        # Sound again from the next keyframe on; a full decode does not get there.
        assert_frames(video, [40, 45, 59], whole)


@pytest.mark.parametrize("name", ["no_times.avi", "mpeg4.avi", "one_keyframe.mp4"])
def test_damage_never_gives_another_frame(make, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(make(name).read_bytes())
    shown = full_decode(damage(path, 20))
    with Video(path) as video:
        assert_frames(video, list(range(min(15, len(shown)))), shown)


def test_part_of_a_transport_stream_is_lost(tmp_path):
    whole = encode(tmp_path / "whole.ts", size=(320, 240)).read_bytes()
    path = tmp_path / "lost.ts"
    middle = len(whole) // 188 // 2 * 188  # these streams are made of pieces of 188 bytes
    path.write_bytes(whole[:middle] + whole[middle + 188 :])
    assert probe(path).frames == 39  # the other one is damaged
    with Video(path) as video:
        assert_frames(video, [*range(10)], full_decode(tmp_path / "whole.ts"))


def test_bad_index(make):
    with Video(make("three_frames.mov")) as video:
        for index in (-1, 3):
            with pytest.raises(IndexError, match=f"frame {index} of a video of 3 frames"):
                video.frames([index])


def test_a_colon_in_the_name(tmp_path):
    assert probe(encode(tmp_path / "a:b%03d.mp4", 3)).frames == 3


def test_metadata_that_are_no_text(tmp_path):
    path = encode(tmp_path / "video.mp4", 3)
    content = path.read_bytes()
    assert content.count(b"Lavf") == 1  # the program that wrote it
    path.write_bytes(content.replace(b"Lavf", b"\xff\xe9vf"))
    assert probe(path).frames == 3


def test_not_a_video(tmp_path):
    make_bad(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in {**BAD, "folder.mp4": "does not open"}.items():
        with pytest.raises(VideoError, match=f"^{reason}") as caught:
            probe(tmp_path / name)
        assert "\n" not in str(caught.value)
