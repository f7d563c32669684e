"""``python -m backbones predict``: the likeliest classes of images, or their features."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from backbones.commands.image_models import (
    add_options,
    infer,
    prepare,
    prepare_file,
    print_unreadable,
    shown,
    write_json,
)
from backbones.common.console import make_parser, run_command
from backbones.common.errors import optional_import
from backbones.common.files import replacing
from backbones.common.images import IMAGENET_CLASSES, image_suffixes, import_images, read_image

__all__ = ["class_names", "find_images", "main"]

_TOP = 5

_Batches = Iterator[tuple[list[int], Tensor]]


def find_images(arguments: Sequence[str]) -> list[str]:
    """The image files that are meant, in the order of the arguments and each once.

    Args:
        arguments: files, which may have any suffix; folders, which are searched in depth for the
            suffixes of images; and patterns (``*``, ``?``, ``[…]``, ``**``) of such.

    Raises:
        ValueError: an argument that gives no image.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        matches = (
            [argument] if Path(argument).exists() else sorted(glob.glob(argument, recursive=True))
        )
        images = [path for match in matches for path in _images_at(Path(match))]
        if not matches:
            raise ValueError(f"there is no file {shown(argument)}")
        if not images:
            suffixes = ", ".join(image_suffixes())
            raise ValueError(f"there is no image ({suffixes}) in {shown(argument)}")
        found |= dict.fromkeys(images)
    return list(found)


def _images_at(path: Path) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    suffixes = image_suffixes()
    return [str(p) for p in sorted(path.rglob("*")) if p.suffix.lower() in suffixes and p.is_file()]


def class_names(classes: int, file: Path | None = None) -> list[str]:
    """The names of the classes of a head.

    Args:
        classes: their number.
        file: a text file with one name per line. Without it, 1000 classes are taken for those of
            ImageNet-1k, and all others are named by their numbers.

    Raises:
        ValueError: the file has another number of names, or is no text.
        OSError: it cannot be read.
    """
    if file is None:
        if classes != IMAGENET_CLASSES:
            return [str(index) for index in range(classes)]
        weights = import_images("torchvision.models").ResNet18_Weights.IMAGENET1K_V1
        names: list[str] = weights.meta["categories"]
        return names
    try:
        names = file.read_text(encoding="utf-8").strip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8") from error
    if len(names) != classes:
        raise ValueError(f"{file} names {len(names)} classes, the model's head has {classes}")
    return [name.strip() for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the predictions, or save the features; return the exit status."""
    parser = make_parser(
        "backbones.commands.predict",
        "Print the five likeliest classes of images with their probabilities, or save pooled "
        "features.",
        """\
examples:
  python -m backbones predict cat.jpg --model rev_vit_small --pretrained
  python -m backbones predict photos 'more/*.png' --weights mine.safetensors --classes names.txt
  python -m backbones predict photos --weights REV_VIT_B.pyth --features photos.npz

The features are read with numpy.load('photos.npz'): 'features' is (N, C) in float32, 'files' has
the N file names. Unreadable images are left out, counted and named.""",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a file, a folder or a pattern")
    add_options(parser)
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="names of the classes, one per line (default: ImageNet's for a head of 1000 classes, "
        "else numbers)",
    )
    parser.add_argument(
        "--pictures", metavar="DIR", type=Path, help="draw each image beside its classes"
    )
    parser.add_argument(
        "--features", metavar="FILE.npz", type=Path, help="save pooled features instead"
    )
    return run_command(parser, _predict, arguments)


def _predict(options: argparse.Namespace) -> None:
    if options.features:
        if options.classes or options.pictures or options.json:
            raise ValueError("--features goes without --classes, --pictures and --json")
        if options.features.suffix != ".npz":
            raise ValueError(f"--features {options.features} should end in .npz")
        prepare_file(options.features)
    paths = find_images(options.images)
    if options.pictures:
        if options.pictures.exists() and not options.pictures.is_dir():
            raise ValueError(f"--pictures {options.pictures} is a file; give a folder")
        optional_import("matplotlib", "matplotlib", "--pictures")
        options.pictures.mkdir(parents=True, exist_ok=True)
    model, how = prepare(options, head=not options.features)
    unreadable: dict[str, str] = {}
    # Upright, because photographs often lie on their side in the file.
    batches = infer(model, paths, unreadable, upright=True, **how)
    if options.features:
        _save_features(paths, batches, options.features)
    else:
        names = class_names(cast(int, model.num_classes), options.classes)
        predictions = _rank(paths, batches, names, options.pictures)
        if options.json:
            write_json(options.json, {"predictions": predictions, "unreadable": unreadable})
    print_unreadable(unreadable, options.json)


def _rank(
    paths: list[str], batches: _Batches, names: list[str], pictures: Path | None
) -> list[dict[str, Any]]:
    """Print and draw the likeliest classes; return them as they go into a JSON file."""
    write = import_images("tqdm").tqdm.write  # beside the progress bar, not into it
    predictions: list[dict[str, Any]] = []
    for indices, logits in batches:
        top = logits.softmax(1).topk(min(_TOP, len(names)))
        for index, probabilities, classes in zip(
            indices, top.values.tolist(), top.indices.tolist(), strict=True
        ):
            ranking = [(names[c], p) for c, p in zip(classes, probabilities, strict=True)]
            lines = [f"{100 * p:7.2f} %  {name}" for name, p in ranking]
            write("\n".join([shown(paths[index]), *lines]), file=sys.stdout)
            if pictures:
                picture = pictures / f"{index:05d}_{Path(paths[index]).stem}.png"
                _draw(paths[index], ranking, picture)
            entries = [
                {"index": c, "name": name, "probability": p}
                for c, (name, p) in zip(classes, ranking, strict=True)
            ]
            predictions.append({"file": paths[index], "classes": entries})
    return predictions


def _draw(path: str, ranking: list[tuple[str, float]], picture: Path) -> None:
    """The image, and under it a bar for each class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    image, bars = figure.subplots(2, 1, height_ratios=(3, 1))
    image.imshow(read_image(path, upright=True))
    image.set_axis_off()
    ranking = ranking[::-1]  # from the bottom up
    places = range(len(ranking))  # names may repeat
    bars.barh(places, [100 * p for _, p in ranking])
    bars.set_yticks(places, [f"{name}  {100 * p:.1f} %" for name, p in ranking])
    bars.set(xlim=(0, 100), xlabel="probability (%)")
    figure.savefig(picture)


def _save_features(paths: list[str], batches: _Batches, file: Path) -> None:
    """Write the features of the images that can be read."""
    numpy = import_images("numpy")
    rows: list[Tensor] = []
    files: list[str] = []
    for indices, features in batches:
        rows.append(features)
        files += [paths[index] for index in indices]
    matrix = torch.cat(rows)
    with replacing(file) as partial, partial.open("wb") as stream:  # a name would get a suffix
        numpy.savez(stream, features=matrix.numpy(), files=numpy.array(files))
    count, width = matrix.shape
    print(f"{file}: features {count} x {width}, of {count:,} of {len(paths):,} images")


if __name__ == "__main__":
    sys.exit(main())
