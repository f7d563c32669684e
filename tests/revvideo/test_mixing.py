"""Mixup and cutmix of clips: how much label there is, and where clips are cut."""

from __future__ import annotations

import pytest
import torch

from revvideo.data.mixing import Mixing
from revvideo.settings import AugmentConfig

CLASSES = 6


def batch(size: int, frames: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip i is i + 1 everywhere, of class i."""
    values = torch.arange(1.0, size + 1).view(-1, 1, 1, 1, 1)
    return values.expand(size, 3, frames, height, width).clone(), torch.arange(size) % CLASSES


SETTINGS = {
    "none": AugmentConfig(),
    "mixup": AugmentConfig(mixup=0.8),
    "cutmix": AugmentConfig(cutmix=1.0),
    "both": AugmentConfig(mixup=0.8, cutmix=1.0),
}


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("setting", SETTINGS)
def test_labels_sum_to_one_and_say_what_is_in_the_clip(setting, seed):
    torch.manual_seed(seed)
    size, frames = 2 + seed % 4, 1 + seed % 3
    video, label = batch(size, frames, 10 + seed, 14)
    before = video.clone()
    mixed, target = Mixing(SETTINGS[setting], CLASSES)(video, label)
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
    if setting == "none":
        assert torch.equal(mixed, video)


@pytest.mark.parametrize("seed", range(25))
def test_cutmix_cuts_one_box_out_of_every_frame(seed):
    torch.manual_seed(seed)
    video, label = batch(3, 4, 20, 16)
    mixed, target = Mixing(SETTINGS["cutmix"], CLASSES)(video, label)
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
    mixing = Mixing(SETTINGS["both"], CLASSES)
    kinds = set()
    for _ in range(20):
        mixed, _ = mixing(*batch(2, 2, 12, 12))
        kinds.add(bool((mixed == mixed.round()).all()))  # cutmix makes no new values
    assert kinds == {True, False}
