"""From decoded frames to what the model sees, with ``torchvision.transforms.v2``.

A clip goes through as one tensor, so that what is drawn at random is the same for all its frames.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from backbones.common.errors import optional_import
from backbones.common.images import IMAGENET_MEAN, IMAGENET_STD, eval_transform
from revvideo.data.stills import IMAGES
from revvideo.settings import AugmentConfig, DataConfig, TestConfig

_logger = logging.getLogger("revvideo")


class _RandAugment:
    """timm's RandAugment (Cubuk et al., arXiv 1909.13719), the same for all frames of a clip."""

    def __init__(self, recipe: str, **more: Any) -> None:
        # Late, because it takes a second or two.
        timm = optional_import("timm.data.auto_augment", "timm", "augment.rand_augment")
        bicubic = {"interpolation": Image.Resampling.BICUBIC}
        self._augment = timm.rand_augment_transform(recipe, bicubic | more)

    def __call__(self, clip: Tensor) -> Tensor:
        seed = int(torch.randint(2**31, ()))
        frames = []
        for frame in clip:
            random.seed(seed)  # it draws from both of these
            np.random.seed(seed)
            frames.append(F.pil_to_tensor(self._augment(F.to_pil_image(frame))))
        return torch.stack(frames)


class Erased(NamedTuple):
    """A box of a clip that is filled with noise once its pixels are normalised."""

    top: int
    left: int
    noise: Tensor  # float32 (3, height, width), the same for all frames


class TrainTransform(v2.Compose):
    """RandAugment, a random crop of random size, flip, colour jitter and random erasing.

    RandAugment sees whole frames, as in SlowFast's ``slowfast/datasets/kinetics.py``; of images the
    crop, resized bicubically, and fills with ImageNet's mean, as in its ``imagenet.py`` and timm.
    In both it takes the place of colour jitter. Draws from torch's RNG; with RandAugment those of
    Python and NumPy are seeded anew.
    """

    def __init__(self, augment: AugmentConfig, data: DataConfig) -> None:
        images = data.layout == IMAGES
        by = v2.InterpolationMode.BICUBIC if images else v2.InterpolationMode.BILINEAR
        size, scale, ratio = data.crop_size, tuple(augment.scale), tuple(augment.ratio)
        steps: list[Any] = [
            v2.RandomResizedCrop(size, scale, ratio, interpolation=by),
            v2.RandomHorizontalFlip(augment.flip),
        ]
        if recipe := augment.rand_augment:
            fill = {"img_mean": tuple(round(255 * x) for x in IMAGENET_MEAN)} if images else {}
            steps.insert(len(steps) if images else 0, _RandAugment(recipe, **fill))
            if augment.color_jitter:
                _logger.info("augment.color_jitter gives way to augment.rand_augment")
        elif jitter := augment.color_jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
        super().__init__(steps)
        self._erase = v2.RandomErasing(augment.erase, value="random") if augment.erase else None

    def __call__(self, clip: Tensor) -> tuple[Tensor, Erased | None]:
        """uint8 (T, 3, H, W) -> uint8 (3, T, crop_size, crop_size), for :func:`normalised`."""
        video, erased = super().__call__(clip), None
        if self._erase and float(torch.rand(1)) < self._erase.p:
            box = self._erase.make_params([video])
            if box["v"] is not None:  # one of the proportions asked for was found
                erased = Erased(box["i"], box["j"], box["v"])
        return video.transpose(0, 1).contiguous(), erased


class TestTransform:
    """The shorter side resized, then one central crop, or three along the longer side.

    For published views, normalised pixels are resized, bilinearly and without smoothing, and an odd
    rest of the centre goes before the crop: ``random_short_side_scale_jitter`` and
    ``uniform_crop`` of SlowFast's ``slowfast/datasets/transform.py``.
    """

    __test__ = False

    def __init__(self, test: TestConfig, data: DataConfig) -> None:
        self._size = data.crop_size
        self._of_image = eval_transform(self._size, self._size) if data.layout == IMAGES else None
        # How far along the longer side.
        self._places = [0.5] if test.crops == 1 else np.linspace(0, 1, test.crops).tolist()
        published = test.views == "published"
        self._round = math.ceil if published else round
        self._data = data if published else None
        self._resize = v2.Resize(test.short_side, antialias=not published)

    def __call__(self, clip: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) -> (crops, 3, T, crop_size, crop_size), for :func:`normalised`; it is
        uint8, or of published views and of images float32, normalised already."""
        if self._of_image is not None:  # exactly as python -m backbones evaluate
            return cast(Tensor, self._of_image(F.to_pil_image(clip[0])))[None, :, None]
        if self._data is not None:
            clip = normalised(clip.transpose(0, 1), self._data).transpose(0, 1)
        video: Tensor = self._resize(clip)
        height, width = video.shape[-2:]
        crops = []
        for place in self._places:
            down, right = (0.5, place) if width >= height else (place, 0.5)
            top = self._round(down * (height - self._size))
            left = self._round(right * (width - self._size))
            crops.append(F.crop(video, top, left, self._size, self._size).transpose(0, 1))
        return torch.stack(crops).contiguous()


def normalised(video: Tensor, data: DataConfig, erased: Sequence[Erased | None] = ()) -> Tensor:
    """What the model sees of clips, made where they are: until then they are a quarter as large.

    Takes (…, 3, T, H, W), uint8 (float ones are left as they are), and of clips (N, 3, T, H, W)
    what is erased of each; gives float32, of the same shape.
    """
    if video.dtype == torch.uint8:
        images = data.layout == IMAGES
        rows = (IMAGENET_MEAN, IMAGENET_STD) if images else ([data.mean] * 3, [data.std] * 3)
        scale = torch.tensor(rows).to(video.device, non_blocking=True)[..., None, None, None]
        video = F.to_dtype(video, torch.float32, scale=True).sub_(scale[0]).div_(scale[1])
    for clip, box in zip(video, erased, strict=False):
        if box is not None:
            height, width = box.noise.shape[-2:]
            part = clip[..., box.top : box.top + height, box.left : box.left + width]
            part.copy_(box.noise[:, None])
    return video
