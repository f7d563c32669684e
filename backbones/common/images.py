"""Image files as batches of tensors, prepared as the released models expect them.

Needs Pillow, torchvision and tqdm, the extra ``images``; all are imported late.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbones.common.errors import error_line, first_line, optional_import
from backbones.common.files import walk

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_CLASSES = 1000

# Of the three released image models (DATA.MEAN and DATA.STD of their configurations), in RGB order.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def import_images(module: str) -> Any:
    """Import a module of the extra ``images``; an ImportError if it is not installed, or does not
    fit the installed torch."""
    try:
        return optional_import(module, "images", "working on images")
    except RuntimeError as error:  # torchvision, where its compiled operators were not made for it
        odd = f"{module} does not fit torch {torch.__version__}"
        raise ImportError(f"{odd}: {first_line(error)}") from error


def image_suffixes() -> tuple[str, ...]:
    """Suffixes of the files in a folder that are taken for images, in lower case.

    All that Pillow opens, apart from those of documents, videos and data.
    """
    image = import_images("PIL.Image")
    others = {"EPS", "FITS", "HDF5", "MPEG", "WMF", "GRIB", "BUFR", "PDF"}
    formats = image.registered_extensions()
    found = {s for s, kind in formats.items() if kind in image.OPEN and kind not in others}
    return tuple(sorted(found, key=lambda suffix: (suffix not in (".jpg", ".png"), suffix)))


def labelled_images(root: str | os.PathLike[str], labels: Mapping[str, int]) -> list[Any]:
    """Path and label of each image in some folders of ``root``, in the order of their names;
    ``labels`` are by the name of the folder."""
    suffixes = image_suffixes()
    return [
        (str(path), labels[name])
        for name in sorted(labels)
        for path in walk(Path(root, name))
        if path.name.lower().endswith(suffixes)
    ]


def eval_transform(height: int, width: int) -> Any:
    """What the original evaluates with, from an RGB ``PIL.Image`` to float32 (3, height, width):
    the short side to 256/224 of the longer side of the crop, in pixels, then its centre.

    Bicubic on the 8-bit image, then to [0, 1], then ImageNet's mean and deviation
    (``_prepare_im_tf`` in ``slowfast/datasets/imagenet.py``; mmpretrain does the same).
    """
    v2 = import_images("torchvision.transforms.v2")
    short_side = max(height, width) * 256 // 224
    return v2.Compose(
        [
            v2.Resize(short_side, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop((height, width)),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def read_image(path: str | os.PathLike[str], upright: bool = False) -> Image.Image:
    """Decode an image file completely, to 8-bit RGB; an error of any kind, if it is damaged.

    ``upright`` turns the image as its EXIF data say. ImageNet's published scores do not.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")


def checked_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height that the header of an image file names, in pixels; an error of any kind,
    where it says that :func:`read_image` will not read it."""
    with _opened(path) as image:
        return image.size


def header_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """As :func:`checked_size`; (0, 0) of what is not read: reading it will say why."""
    try:
        return checked_size(path)
    except Exception:
        return 0, 0


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file whose header has been looked at."""
    from PIL import Image

    with warnings.catch_warnings():
        # Damaged EXIF data and odd palettes, of which ImageNet has some; the pixels are fine.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error here
        with Image.open(path) as image:
            size, most = f"{image.width} x {image.height} px", Image.MAX_IMAGE_PIXELS
            if most and image.width * image.height > most:
                raise ValueError(f"its header says {size}, over {most:,} pixels: cut it into tiles")
            mode = f"Pillow's mode {image.mode}"
            if image.mode[0] in "IF":  # Pillow would clip these to white
                raise ValueError(f"more than 8 bits a channel ({mode}): save it with 8")
            yield image


def why_unreadable(error: Exception, path: str | os.PathLike[str]) -> str:
    """What an error of reading says, without the path, which every message about a file has."""
    return error_line(error).replace(f" {os.fspath(path)!r}", "")


class ImageFiles(Dataset[tuple[int, Tensor | str]]):
    """Pairs of an index and a prepared image, or the reason why that file cannot be read.

    See :func:`eval_transform` for ``height`` and ``width``, :func:`read_image` for ``upright``.
    """

    def __init__(self, paths: Sequence[str], height: int, width: int, upright: bool = False):
        self.paths, self.upright = paths, upright
        self.transform = eval_transform(height, width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            image = read_image(self.paths[index], self.upright)
        except Exception as error:  # a damaged file fails in any way
            return index, why_unreadable(error, self.paths[index])
        return index, self.transform(image)


def image_loader(
    files: ImageFiles, batch_size: int, workers: int, pin_memory: bool = False
) -> DataLoader[tuple[int, Tensor | str]]:
    """Batches in the order of the files: the indices of those that could be read, their images,
    (B, 3, H, W) in float32 or (0,) for none, and the reason by the index of each other file."""
    batches = -(-len(files) // batch_size)
    # To start processes for a single batch takes longer than to read it.
    workers = min(workers, batches) if batches > 1 else 0
    return DataLoader(
        files, batch_size, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory
    )


def _collate(items: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor, dict[int, str]]:
    read = {index: image for index, image in items if isinstance(image, Tensor)}
    images = torch.stack([*read.values()]) if read else torch.empty(0)
    return [*read], images, {i: reason for i, reason in items if isinstance(reason, str)}
