"""Transforms: alike for all frames of a clip, drawn from one generator, of the right part."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision import tv_tensors

from revvideo.data.transforms import TestTransform, TrainTransform, _RandAugment
from revvideo.settings import AugmentConfig, DataConfig, TestConfig

DATA = DataConfig(crop_size=24)
RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
EVERYTHING = AugmentConfig(
    scale=[0.2, 0.6],
    flip=0.5,
    rand_augment=RAND_AUGMENT,
    color_jitter=0.4,
    erase=0.7,
)


def clip(frames: int = 5, height: int = 40, width: int = 56) -> torch.Tensor:
    """The same noise in every frame."""
    generator = torch.Generator().manual_seed(3)
    frame = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return frame.expand(frames, -1, -1, -1).contiguous()


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(),
        AugmentConfig(rand_augment=f"{RAND_AUGMENT}-p1"),
        AugmentConfig(color_jitter=0.4),
        AugmentConfig(erase=1.0),
        EVERYTHING,
    ],
    ids=["crop and flip", "randaugment", "jitter", "erasing", "all"],
)
def test_all_frames_of_a_clip_are_treated_alike(augment):
    transform = TrainTransform(augment, DATA)
    different = set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = transform(clip())
        assert out.shape == (3, 5, 24, 24) and out.dtype == torch.float32 and out.is_contiguous()
        assert type(out) is torch.Tensor
        assert torch.equal(out, out[:, :1].expand_as(out))
        different.add(out.sum().item())
    assert len(different) == 12
    torch.manual_seed(11)
    assert torch.equal(transform(clip()), out)  # the generator decides


def test_nothing_is_random_where_nothing_is_asked_for():
    plain = AugmentConfig(scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=0.0)
    square = clip(height=24, width=24)
    out = TrainTransform(plain, DATA)(square)
    expected = (square.float() / 255 - DATA.mean) / DATA.std
    torch.testing.assert_close(out, expected.transpose(0, 1))


def test_a_flip_mirrors_and_is_off_at_zero():
    square = clip(height=24, width=24)
    always, never = (
        TrainTransform(AugmentConfig(scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=flip), DATA)(square)
        for flip in (1.0, 0.0)
    )
    assert torch.equal(always, never.flip(-1)) and not torch.equal(always, never)


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
        out = augment(tv_tensors.Video(square))
        assert type(out) is tv_tensors.Video
        np.testing.assert_array_equal(out[0].permute(1, 2, 0).numpy(), expected)
        assert not torch.equal(out, square)


@pytest.mark.parametrize(("height", "width"), [(24, 48), (48, 24)])
def test_crops_lie_along_the_longer_side(height, width):
    ramp = torch.arange(48, dtype=torch.uint8).expand(height, 48) if width == 48 else None
    if ramp is None:
        ramp = torch.arange(48, dtype=torch.uint8)[:, None].expand(48, width)
    video = ramp.expand(2, 3, -1, -1).contiguous()
    test = TestConfig(short_side=24)
    data = DataConfig(crop_size=24, mean=0.0, std=1 / 255)
    three = TestTransform(test, data, crops=3)(video)
    assert three.shape == (3, 3, 2, 24, 24)
    ends = [(round(float(crop.min())), round(float(crop.max()))) for crop in three]
    assert ends == [(0, 23), (12, 35), (24, 47)]
    one = TestTransform(test, data)(video)
    assert torch.equal(one[0], three[1])


def test_crops_of_a_square_lie_side_by_side():
    ramp = torch.arange(48, dtype=torch.uint8).expand(2, 3, 48, 48).contiguous()
    data = DataConfig(crop_size=24, mean=0.0, std=1 / 255)
    crops = TestTransform(TestConfig(short_side=48), data, crops=3)(ramp.transpose(2, 3))
    assert torch.equal(crops[0], crops[2])  # the columns are alike: only the rows could differ
    crops = TestTransform(TestConfig(short_side=48), data, crops=3)(ramp)
    assert [round(float(crop.min())) for crop in crops] == [0, 12, 24]


def test_the_short_side_is_resized_before_the_crop():
    video = clip(height=80, width=112)
    transform = TestTransform(TestConfig(short_side=40), DATA)
    # Half the size, then the middle: noise averages out, and the mean stays.
    out = transform(video)
    assert out.shape == (1, 3, 5, 24, 24)
    assert out.std() < 0.75 * TestTransform(TestConfig(short_side=80), DATA)(video).std()
