"""Mixup (Zhang et al., arXiv 1710.09412) and cutmix (Yun et al., arXiv 1905.04899) for clips."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from revvideo.settings import AugmentConfig


class Mixing:
    """torchvision's ``MixUp`` and ``CutMix`` on batches of clips; with both, each batch draws one.

    Told that its input is a video, torchvision takes five dimensions; the box of cutmix lies in the
    last two, so it is the same in every frame. Each clip is mixed with its neighbour in the batch,
    so clips of one video must not be neighbours.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int) -> None:
        self.num_classes = num_classes
        both = ((v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix))
        ways = [way(alpha=alpha, num_classes=num_classes) for way, alpha in both if alpha]
        self._mix = v2.RandomChoice(ways) if ways else None

    def __call__(self, video: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, T, H, W), int (N,) -> mixed by torch's CPU RNG, (N, num_classes) that sum to 1."""
        if self._mix is None:
            return video, F.one_hot(label, self.num_classes).to(video.dtype)
        mixed, target = self._mix(tv_tensors.Video(video), label)
        return cast(Tensor, mixed.as_subclass(torch.Tensor)), target
