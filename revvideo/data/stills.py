"""Images as videos of one frame, in folders as torchvision's ``ImageFolder`` reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from backbones.common.errors import UserError, some_of
from backbones.common.images import checked_size, labelled_images, read_image, why_unreadable
from revvideo.data.decode import VideoInfo
from revvideo.errors import VideoError

IMAGES = "images"  # the layout


class Still(AbstractContextManager["Still"]):
    """An image file in the place of a :class:`revvideo.data.decode.Video`.

    It is not turned by its EXIF data, as the published scores of ImageNet were not.
    """

    timestamps, rate = (0.0,), 1.0

    def __init__(self, path: str | os.PathLike[str], **known: object) -> None:
        self._path = os.fspath(path)

    def __exit__(self, *_: object) -> None:
        pass

    def frames(self, indices: Sequence[int], short_side: int | None = None) -> Tensor:
        """The image for each index: uint8 (T, 3, H, W); a VideoError if it does not decode."""
        try:
            picture: Tensor = pil_to_tensor(read_image(self._path))
        except Exception as error:  # a damaged file fails in any way
            raise VideoError(why_unreadable(error, self._path)) from error
        return picture.expand(len(indices), -1, -1, -1)


def probe_still(path: str | os.PathLike[str], *, deep: bool = False) -> VideoInfo:
    """The size by the header, or a VideoError; with ``deep``, all of the image is decoded."""
    if not Path(path).is_file():
        raise VideoError("file is missing")
    try:
        width, height = checked_size(path)
    except Exception as error:  # a damaged file fails in any way
        raise VideoError(f"cannot be read ({why_unreadable(error, path)})") from error
    if deep:
        Still(path).frames([0])
    return VideoInfo(1, 0.0, 0.0, width, height)


def find_stills(
    root: Path, split: str, classes: Sequence[str] | None
) -> tuple[list[str], list[tuple[str, int]]]:
    """As :func:`revvideo.data.layouts.find_videos`, for ``root/split/class/…/image``.

    The classes are the sorted names of the folders, as ``python -m backbones evaluate`` has them.
    One without an image is refused.
    """
    base = root / split
    folders = sorted(p.name for p in base.glob("*/") if p.name[0] != ".") if base.is_dir() else []
    if not folders:
        raise UserError(f"{base} holds no folders of classes with images: check the folder")
    names = list(classes or folders)
    if strange := sorted(set(folders) - set(names)):
        raise UserError(f"class {strange[0]!r} in {base} is none of the {len(names)} of the model")
    index = {name: names.index(name) for name in folders}
    samples = labelled_images(base, index)
    if empty := sorted(set(index.values()) - {label for _, label in samples}):
        raise UserError(f"no image in {base} is of {some_of([names[i] for i in empty])}")
    return names, [(os.path.relpath(path, root), label) for path, label in samples]


def squeeze_frame(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook before an image model: clips (N, 3, 1, H, W) as images (N, 3, H, W)."""
    clip, *others = arguments
    return (clip.squeeze(2) if clip.dim() == 5 else clip, *others)
