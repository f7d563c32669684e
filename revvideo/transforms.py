"""From decoded frames to what the model sees, with ``torchvision.transforms.v2``.

A clip goes through as one ``tv_tensors.Video``, so that whatever is drawn at random is the same for
all its frames.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from revvideo.config import AugmentConfig, DataConfig, TestConfig

# RandAugment's strength counts from 0 to 10 in the recipes of the field.
_MAGNITUDES = 11


class TrainTransform:
    """A random crop of random size, flip, RandAugment, colour jitter and random erasing.

    RandAugment is the one of timm's ``rand-m7-n4-inc1``: of ``rand_augment_ops`` drawn operations
    each is applied with probability ``rand_augment_prob``. It differs from that one in that the
    strength does not vary, and in two rare operations. It comes after the crop, when there are
    fewer pixels.

    Args:
        augment, data: the sections of the config.
    """

    def __init__(self, augment: AugmentConfig, data: DataConfig) -> None:
        mean = 255 * data.mean
        steps: list[Any] = [
            v2.RandomResizedCrop(data.crop_size, tuple(augment.scale), tuple(augment.ratio)),
            v2.RandomHorizontalFlip(augment.flip),
        ]
        for _ in range(augment.rand_augment_ops):
            operation = v2.RandAugment(
                num_ops=1,
                magnitude=augment.rand_augment_magnitude,
                num_magnitude_bins=_MAGNITUDES,
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=[mean, mean, mean],
            )
            steps.append(v2.RandomApply([operation], augment.rand_augment_prob))
        if jitter := augment.color_jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
        steps += _to_float(data)
        if augment.erase:
            steps.append(v2.RandomErasing(augment.erase, value="random"))
        self._steps = v2.Compose(steps)

    def __call__(self, clip: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) -> float32 (3, T, crop_size, crop_size). Draws from torch's RNG."""
        return _channels_first(self._steps(tv_tensors.Video(clip)))


class TestTransform:
    """The shorter side resized, then one central crop, or three along the longer side.

    Args:
        test, data: the sections of the config.
        crops: how many, 1 or 3; None for ``test.crops``.
    """

    __test__ = False

    def __init__(self, test: TestConfig, data: DataConfig, crops: int | None = None) -> None:
        self._size = data.crop_size
        self._crops = crops or test.crops
        self._resize = v2.Resize(test.short_side)
        self._to_float = v2.Compose(_to_float(data))

    def __call__(self, clip: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) -> float32 (crops, 3, T, crop_size, crop_size)."""
        video = self._resize(tv_tensors.Video(clip))
        height, width = video.shape[-2:]
        crops = []
        for part in self._parts():
            # Half way along the shorter side, `part` of the way along the longer one.
            along = [part if side == max(height, width) else 0.5 for side in (height, width)]
            top = round(along[0] * (height - self._size))
            left = round(along[1] * (width - self._size))
            crop = F.crop(video, top, left, self._size, self._size)
            crops.append(_channels_first(self._to_float(crop)))
        return torch.stack(crops)

    def _parts(self) -> list[float]:
        if self._crops == 1:
            return [0.5]
        return [index / (self._crops - 1) for index in range(self._crops)]


def _to_float(data: DataConfig) -> list[Any]:
    return [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([data.mean] * 3, [data.std] * 3),
    ]


def _channels_first(video: tv_tensors.Video) -> Tensor:
    return cast(Tensor, video.as_subclass(Tensor).transpose(0, 1).contiguous())
