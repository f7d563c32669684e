"""Transforms are alike for all frames of a clip, and mixed clips have the labels of their parts."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision import tv_tensors
from torchvision.transforms import v2

from revvideo.data.mixing import Mixing
from revvideo.data.transforms import TestTransform, TrainTransform, _RandAugment, normalised
from revvideo.settings import AugmentConfig, DataConfig, TestConfig

DATA = DataConfig(crop_size=24)
RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
# Columns of the values 0 to 47, which come out unchanged.
RAMP = torch.arange(48, dtype=torch.uint8).expand(2, 3, 48, 48).contiguous()
AS_IT_IS = DataConfig(crop_size=24, mean=0.0, std=1 / 255)


def clip(frames: int = 5, height: int = 40, width: int = 56) -> torch.Tensor:
    """The same noise in every frame."""
    generator = torch.Generator().manual_seed(3)
    frame = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return frame.expand(frames, -1, -1, -1).contiguous()


def seen(transform: TrainTransform | TestTransform, clip: torch.Tensor, data=DATA) -> torch.Tensor:
    """What the model gets to see."""
    made = transform(clip)
    video, erased = made if isinstance(made, tuple) else (made, None)
    return normalised(video[None], data, [erased])[0]


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(),
        AugmentConfig(rand_augment=f"{RAND_AUGMENT}-p1"),
        AugmentConfig(color_jitter=0.4),
        AugmentConfig(erase=1.0),
        AugmentConfig(flip=0.5, rand_augment=RAND_AUGMENT, color_jitter=0.4, erase=0.7),
    ],
    ids=["crop and flip", "randaugment", "jitter", "erasing", "all"],
)
def test_all_frames_of_a_clip_are_treated_alike(augment):
    transform = TrainTransform(augment, DATA)
    different = set()
    for seed in range(12):
        torch.manual_seed(seed)
        assert transform(clip())[0].dtype == torch.uint8
        torch.manual_seed(seed)
        out = seen(transform, clip())
        assert out.shape == (3, 5, 24, 24) and out.dtype == torch.float32 and out.is_contiguous()
        assert type(out) is torch.Tensor
        assert torch.equal(out, out[:, :1].expand_as(out))
        different.add(out.sum().item())
    assert len(different) == 12
    torch.manual_seed(11)
    assert torch.equal(seen(transform, clip()), out)  # the generator decides


def test_erasing_is_that_of_torchvision_on_normalised_pixels():
    """Although the pixels are normalised elsewhere, and later."""
    plain = AugmentConfig(scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=0.0)
    square, erased = clip(height=24, width=24), 0
    for seed in range(8):
        torch.manual_seed(seed)
        whole = seen(TrainTransform(plain, DATA), square)
        own = v2.RandomErasing(0.6, value="random")
        expected = own(tv_tensors.Video(whole.transpose(0, 1))).transpose(0, 1)
        torch.manual_seed(seed)
        found = seen(TrainTransform(replace(plain, erase=0.6), DATA), square)
        assert torch.equal(found, expected.as_subclass(torch.Tensor))
        erased += not torch.equal(found, whole)
    assert 0 < erased < 8


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_nothing_is_random_where_nothing_is_asked_for(flip):
    plain = AugmentConfig(scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=flip)
    square = clip(height=24, width=24)
    expected = ((square.float() / 255 - DATA.mean) / DATA.std).transpose(0, 1)
    out = seen(TrainTransform(plain, DATA), square)
    torch.testing.assert_close(out, expected.flip(-1) if flip else expected)


def test_rand_augment_is_that_of_timm():
    augment = _RandAugment(f"{RAND_AUGMENT}-p1")
    own = rand_augment_transform(f"{RAND_AUGMENT}-p1", {"interpolation": Image.Resampling.BICUBIC})
    square = clip(height=24, width=24)
    for number in range(5):
        torch.manual_seed(number)
        seed = int(torch.randint(2**31, ()))
        random.seed(seed), np.random.seed(seed)
        expected = np.array(own(Image.fromarray(square[0].permute(1, 2, 0).numpy())))
        torch.manual_seed(number)
        out = augment(square)
        np.testing.assert_array_equal(out[0].permute(1, 2, 0).numpy(), expected)
        assert not torch.equal(out, square)


@pytest.mark.parametrize("upright", [False, True])
def test_crops_lie_along_the_longer_side(upright):
    ramp = RAMP[..., :24, :].transpose(2, 3) if upright else RAMP[..., :24, :]
    three = seen(TestTransform(TestConfig(short_side=24, crops=3), AS_IT_IS), ramp, AS_IT_IS)
    assert three.shape == (3, 3, 2, 24, 24)
    ends = [(round(float(crop.min())), round(float(crop.max()))) for crop in three]
    assert ends == [(0, 23), (12, 35), (24, 47)]
    one = seen(TestTransform(TestConfig(short_side=24), AS_IT_IS), ramp, AS_IT_IS)
    assert torch.equal(one[0], three[1])


def test_crops_of_a_square_lie_side_by_side():
    transform = TestTransform(TestConfig(short_side=48, crops=3), AS_IT_IS)
    crops = seen(transform, RAMP.transpose(2, 3), AS_IT_IS)
    assert torch.equal(crops[0], crops[2])  # the columns are alike: only the rows could differ
    assert [round(float(crop.min())) for crop in seen(transform, RAMP, AS_IT_IS)] == [0, 12, 24]


def test_the_short_side_is_resized_before_the_crop():
    video = clip(height=80, width=112)
    half = TestTransform(TestConfig(short_side=40), DATA)
    out = seen(half, video)  # half the size: noise averages out
    assert out.shape == (1, 3, 5, 24, 24)
    assert out.std() < 0.75 * seen(TestTransform(TestConfig(short_side=80), DATA), video).std()


def test_published_pixels_are_normalised_then_resized_then_cropped():
    video = clip(height=70, width=123)
    test = TestConfig(short_side=41, views="published")
    x = (video / 255 - DATA.mean) / DATA.std
    x = torch.nn.functional.interpolate(x, (41, 123 * 41 // 70), mode="bilinear")
    top, left = 9, 24  # of 17 and 48, what is odd goes before the crop
    expected = x[..., top : top + 24, left : left + 24].transpose(0, 1)
    torch.testing.assert_close(seen(TestTransform(test, DATA), video)[0], expected)


CLASSES = 6


def batch(size: int, frames: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip i is i + 1 everywhere, of class i."""
    values = torch.arange(1.0, size + 1).view(-1, 1, 1, 1, 1)
    return values.expand(size, 3, frames, height, width).clone(), torch.arange(size) % CLASSES


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), (0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_sum_to_one_and_say_what_is_in_the_clip(mixup, cutmix, seed):
    torch.manual_seed(seed)
    size, frames = 2 + seed % 4, 1 + seed % 3
    video, label = batch(size, frames, 10 + seed, 14)
    before = video.clone()
    mixed, target = Mixing(AugmentConfig(mixup=mixup, cutmix=cutmix), CLASSES)(video, label)
    assert mixed.shape == video.shape and type(mixed) is torch.Tensor
    assert target.shape == (size, CLASSES)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(size))
    assert (target >= 0).all()
    assert torch.equal(video, before)
    # The mean of a clip is that of its parts, in the shares that its label names.
    own = target[torch.arange(size), label]
    neighbour = (torch.arange(size) - 1) % size
    expected = own * (torch.arange(size) + 1) + (1 - own) * (neighbour + 1)
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3, 4)), expected, rtol=1e-4, atol=1e-4)
    assert mixup or cutmix or torch.equal(mixed, video)


@pytest.mark.parametrize("seed", range(25))
def test_cutmix_cuts_one_box_out_of_every_frame(seed):
    torch.manual_seed(seed)
    video, label = batch(3, 4, 20, 16)
    mixed, target = Mixing(AugmentConfig(cutmix=1.0), CLASSES)(video, label)
    cut = mixed != video
    assert torch.equal(cut, cut[:, :1, :1].expand_as(cut))  # in all channels and frames
    assert torch.equal(cut[:, 0, 0], cut[:1, 0, 0].expand(3, -1, -1))  # and clips
    plane = cut[0, 0, 0]
    rows, columns = plane.any(dim=1), plane.any(dim=0)
    assert torch.equal(plane, rows[:, None] & columns[None])  # a rectangle
    share = plane.float().mean()
    torch.testing.assert_close(target[0, 0], 1 - share)


def test_with_both_each_is_drawn():
    torch.manual_seed(0)
    mixing = Mixing(AugmentConfig(mixup=0.8, cutmix=1.0), CLASSES)
    videos = [mixing(*batch(2, 2, 12, 12))[0] for _ in range(20)]
    # Cutmix makes no new values.
    assert {bool((video == video.round()).all()) for video in videos} == {True, False}
