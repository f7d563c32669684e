"""Which frames a clip has, what a sample depends on, and what happens to files that break."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorchvideo.data.clip_sampling import ClipSampler, ConstantClipsPerVideoSampler
from torch.utils.data import DataLoader

from revvideo.data.clips import (
    ClipDataset,
    Clips,
    PublishedClips,
    collate,
    train_clips,
    uniform_clips,
)
from revvideo.data.clips import test_clips as clips_to_test
from revvideo.data.decode import Video
from revvideo.data.manifest import VideoRecord
from revvideo.data.transforms import Erased
from revvideo.settings import AugmentConfig, DataConfig, TestConfig
from tests.revvideo.make_videos import INDEX_FIRST, cut, damage, encode
from tests.revvideo.test_decode import full_decode


def at_rate(fps: float, frames: int, digits: int = 12) -> list[float]:
    return [round(i / fps, digits) for i in range(frames)]


@pytest.mark.parametrize("digits", [12, 3])  # Matroska rounds to milliseconds
def test_uniform_clips_at_30_fps(digits):
    clips = uniform_clips(16, 4, clips=5)(at_rate(30, 300, digits))
    assert len(clips) == 5 and clips[0][0] == 0 and clips[-1][-1] == 299
    for clip in clips:
        assert [b - a for a, b in pairwise(clip)] == [4] * 15
    assert [clip[0] for clip in clips] == pytest.approx([239 / 4 * i for i in range(5)], abs=1)
    (middle,) = uniform_clips(16, 4, clips=1)(at_rate(30, 300, digits))
    assert abs(middle[0] - 239 / 2) <= 1


@pytest.mark.parametrize("fps, step", [(60, 8), (15, 2), (120, 16), (7.5, 1)])
def test_stride_is_a_time(fps, step):
    for clip in uniform_clips(8, 4, clips=3)(at_rate(fps, 200)):
        assert [b - a for a, b in pairwise(clip)] == [step] * 7


@pytest.mark.parametrize("sampler", [Clips(8, 4), uniform_clips(8, 4, clips=20)])
def test_frames_nearest_in_time_under_a_variable_rate(sampler):
    gaps = np.random.default_rng(0).choice([0.01, 0.03, 0.2], 80)
    timestamps = [0.0, *np.cumsum(gaps).tolist()]
    for clip in chain.from_iterable(sampler(timestamps) for _ in range(20)):
        for i, frame in enumerate(clip):
            due = timestamps[clip[0]] + i * 4 / 30
            assert abs(timestamps[frame] - due) == min(abs(t - due) for t in timestamps)


@pytest.mark.parametrize("sampler", [Clips(16, 4), uniform_clips(16, 4, clips=3)])
def test_a_video_shorter_than_a_clip_repeats_its_last_frame(sampler):
    for clip in sampler(at_rate(30, 10)):
        assert clip == [0, 4, 8] + [9] * 13
    for clip in sampler([0.0]):
        assert clip == [0] * 16


def test_random_clips_reach_all_of_the_video():
    clips = [Clips(8, 4)(at_rate(30, 100))[0] for _ in range(2000)]
    starts = [clip[0] for clip in clips]
    assert min(starts) == 0 and max(starts) == 100 - 29
    assert max(clip[-1] for clip in clips) == 99
    counts = np.bincount(starts)[1:-1]
    assert counts.min() > 10 and counts.max() < 60  # about 28 each


def test_views_of_the_same_clip():
    (first, again), (other, _) = (Clips(4, 2, views=2)(at_rate(30, 300)) for _ in range(2))
    assert first == again != other


def test_published_views_take_the_frames_of_the_original():
    cases = json.loads(Path(__file__).with_name("published_view_frames.json").read_text())["cases"]
    for case in cases:
        clips = PublishedClips(case["num_frames"], case["stride"], clips=case["views"])
        timestamps = at_rate(case["fps"], case["frames"])
        assert clips(timestamps, case["fps"]) == case["indices"], case
    assert len(cases) == 78
    data, test = DataConfig(num_frames=16, stride=4), TestConfig(views="published")
    assert isinstance(clips_to_test(data, test), PublishedClips)


def test_samplers_of_pytorchvideo_choose_clips_and_ours_are_such():
    timestamps, data = at_rate(30, 300), DataConfig(num_frames=16, stride=4)
    by_name = TestConfig(views="constant_clips_per_video", clips=3)
    starts = [clip[0] for clip in clips_to_test(data, by_name)(timestamps)]
    theirs = ConstantClipsPerVideoSampler(2, 3)
    assert starts == [round(30 * theirs(0, Fraction(299, 30), {}).clip_start_sec) for _ in range(3)]
    for clips in (Clips(16, 4), uniform_clips(16, 4)):
        sampler = clips.sampler(clips.duration, *clips.arguments)
        assert isinstance(sampler, ClipSampler)
        info = sampler(0, Fraction(299, 30), {})
        assert info.clip_end_sec - info.clip_start_sec == 2 and info.is_last_clip
    drawn = []
    for name in ("random", "random_multi"):
        augment = AugmentConfig(clip_sampler=name, repeats=2)
        random.seed(0)
        drawn.append(train_clips(data, augment)(timestamps))
        random.seed(0)
        assert drawn[-1] == train_clips(data, augment)(timestamps)
    (first, again), (one, other) = drawn
    assert first == again == one != other


def frames_as_they_are(clip: torch.Tensor) -> torch.Tensor:
    return clip.float().transpose(0, 1)


@pytest.mark.parametrize("name", ["constant.mp4", "variable_rate.mkv", "mpeg4.avi"])
def test_a_sample_holds_the_frames_of_its_clips_decoded_at_once(make, monkeypatch, name):
    chosen, calls, decode = [], [], Video.frames
    monkeypatch.setattr(Video, "frames", lambda *args: calls.append(args) or decode(*args))

    def remember(timestamps: list[float], rate: float) -> list[list[int]]:
        for _ in range(3):
            chosen.extend(Clips(4, 6, views=2)(timestamps))
        return chosen

    path = make(name)
    record = VideoRecord(name, 3, frames=len(shown := full_decode(path)))
    sample = ClipDataset([record], path.parent, remember, frames_as_they_are)[0, 17]
    assert len(calls) == 1
    video = sample.pop("video")
    assert video.shape == (6, 3, 4, 48, 64)
    assert sample == {"erased": [None] * 6, "label": 3, "index": 0, "path": name, "problem": ""}
    for view, clip in zip(video, chosen, strict=True):
        expected = np.stack([shown[i] for i in clip]).transpose(3, 0, 1, 2)
        np.testing.assert_array_equal(view.numpy(), expected)


def noisy(clip: torch.Tensor) -> torch.Tensor:
    noise = torch.rand(3, 1, 1, 1) + random.random() + np.random.rand()
    return clip[:, :, :4, :4].float().transpose(0, 1) + noise


def test_a_sample_depends_on_seed_and_position_alone(make):
    path = make("constant.mp4")
    records = [VideoRecord(path.name, 0)] * 4

    def dataset(seed: int) -> ClipDataset:
        return ClipDataset(records, path.parent, Clips(4, 2, views=2), noisy, seed=seed)

    keys = [(0, 5), (1, 9), (2, 5), (3, 1 << 40)]
    first = [dataset(1)[key]["video"] for key in keys]
    torch.manual_seed(123), random.seed(4), np.random.seed(5)
    state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    again = [dataset(1)[key]["video"] for key in reversed(keys)][::-1]
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(state[0], after[0]) and state[1:] == after[1:]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first[0], first[2])  # another index, the same position, the same file
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0][0], first[0][1])  # augmented anew for each view
    assert not torch.equal(first[0], dataset(2)[keys[0]]["video"])
    (batch,) = DataLoader(dataset(1), 4, sampler=keys, collate_fn=collate, num_workers=2)
    assert torch.equal(batch["video"], torch.cat(first))
    assert batch["index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_several_crops(make):
    def crops(clip: torch.Tensor) -> torch.Tensor:
        return torch.stack([frames_as_they_are(clip[..., x : x + 32]) for x in (0, 16, 32)])

    path = make("constant.mp4")
    record = VideoRecord(path.name, 1)
    sample = ClipDataset([record], path.parent, uniform_clips(4, 2, clips=2), crops)[0, 0]
    assert sample["video"].shape == (6, 3, 4, 48, 32)
    assert collate([sample])["label"].tolist() == [1] * 6


def test_files_that_break_after_the_scan(tmp_path):
    names = ["good", "gone", "cut", "damaged", "good2"]
    for name in names:
        encode(tmp_path / f"{name}.mp4", 30, container_options=INDEX_FIRST)
    records = [VideoRecord(f"{name}.mp4", label, frames=30) for label, name in enumerate(names)]
    (tmp_path / "gone.mp4").unlink()
    cut(tmp_path / "cut.mp4")
    damage(tmp_path / "damaged.mp4", 1)

    def erasing(clip: torch.Tensor) -> tuple[torch.Tensor, Erased]:
        return frames_as_they_are(clip), Erased(0, 0, clip[0].float())

    dataset = ClipDataset(records, tmp_path, uniform_clips(4, 8, clips=2), erasing)
    batch = collate([dataset[i, i] for i in range(5)])
    assert batch["label"].tolist() == [0, 0, 4, 4] and batch["index"].tolist() == [0, 0, 4, 4]
    assert batch["video"].shape == (4, 3, 4, 48, 64)
    for view, box in zip(batch["video"], batch["erased"], strict=True):  # each box with its clip
        assert torch.equal(box.noise, view[:, 0].float())
    problems = dict(batch["problems"])
    assert list(problems) == ["gone.mp4", "cut.mp4", "damaged.mp4"]
    assert problems["gone.mp4"] == "file is missing"
    assert problems["cut.mp4"].startswith("is cut off after")
    assert problems["damaged.mp4"].startswith("decoding fails after")
    nothing = collate([dataset[i, i] for i in (1, 2)])
    assert nothing["video"].shape == nothing["label"].shape == (0,)
    assert len(nothing["problems"]) == 2
