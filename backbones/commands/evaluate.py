"""Measure top-1 and top-5 accuracy on images in one folder per class, and print them beside the
published score. The folders' sorted names are the classes of the head, as in torchvision's
ImageFolder; for ImageNet they are the wnids (n01440764, …).

examples:
  python -m backbones evaluate --model rev_vit_base --pretrained --data imagenet
  python -m backbones evaluate --weights REV_VIT_B.pyth --data imagenet/val --amp bfloat16
  python -m backbones evaluate --weights mine.safetensors --data flowers --json out.json

Images are prepared as the original does: short side to 256 pixels, bicubic, centre of 224; in
proportion for other sizes. Unreadable images are left out, counted and named.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from backbones.commands.image_models import add_options, infer, prepare
from backbones.common.console import name_unreadable
from backbones.common.errors import UserError, some_of
from backbones.common.files import printable, write_json
from backbones.common.images import IMAGENET_CLASSES, image_suffixes, labelled_images
from backbones.registry import MODELS, input_shape, name_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FOLDER", help="of class folders, or of val/"
    )
    add_options(parser)


def run(options: argparse.Namespace) -> None:
    folders = find_classes(options.data.expanduser())
    model = prepare(options)
    classes = folders.classes
    if len(classes) == IMAGENET_CLASSES and not all(re.fullmatch(r"n\d{8}", c) for c in classes):
        print(
            f"note: the folders in {folders.root} are not named by wnid; their sorted order "
            f"({_some(classes)}) is taken for that of the head",
            file=sys.stderr,
        )
    name = name_of(model)
    record = MODELS.get(name or "") if model.num_classes == IMAGENET_CLASSES else None
    results: dict[str, Any] = {
        "model": name or type(model).__name__,
        "weights": options.weights or "released weights",
        "data": str(folders.root),
        "classes": len(classes),
        "img_size": options.img_size or input_shape(model)[-1],
        "precision": options.amp or "float32",
        "device": options.device,
        "torch": torch.__version__,
        **accuracy(model, folders, options),
        "published_top1": record and record.top1,
        "published_top5": record and record.top5,
    }
    print("{model}, {weights}, {img_size} px, {precision}, {device}".format(**results))
    print(
        f"{_score(results, 1)}, {_score(results, 5)} "
        f"on {results['evaluated']:,} of {results['images']:,} images in {folders.root}"
    )
    name_unreadable(results["unreadable"], options.json)
    if options.json:
        write_json(options.json, results)


def _score(results: dict[str, Any], k: int) -> str:
    published = results[f"published_top{k}"]
    beside = "" if published is None else f" (published {published})"
    return f"{results[f'top{k}']:.2f} top-{k}{beside}"


class ClassFolders(NamedTuple):
    """Images in one folder per class."""

    root: Path  # holds those folders
    classes: list[str]  # their names, sorted: classes 0, 1, …
    images: list[tuple[str, int]]  # the path and the class of each


def find_classes(data: Path) -> ClassFolders:
    """The images under ``data/val``, or under ``data`` if there is no such folder, as torchvision's
    ImageFolder lists them; but hidden folders are no classes, and images in none are refused."""
    if not data.is_dir():
        raise UserError(f"--data {data} is no folder: give the one of the images")
    root = data / "val" if (data / "val").is_dir() else data
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    classes = [entry.name for entry in entries if entry.is_dir()]
    suffixes = image_suffixes()
    if loose := [e.name for e in entries if e.suffix.lower() in suffixes and e.is_file()]:
        raise UserError(
            f"{root} has images directly in it ({_some(loose)}); put them into one folder per class"
        )
    if not classes:
        raise UserError(f"{root} has no folders; it should have one per class, with images in it")
    images = labelled_images(root, {name: label for label, name in enumerate(classes)})
    counts = Counter(label for _, label in images)
    if empty := [name for label, name in enumerate(classes) if not counts[label]]:
        raise UserError(
            f"{len(empty)} of {len(classes)} class folders in {root} have no image "
            f"({', '.join(suffixes)}): {_some(empty)}"
        )
    return ClassFolders(root, classes, images)


def _some(names: Sequence[str]) -> str:
    return some_of([printable(name) for name in names])


def accuracy(
    model: nn.Module, folders: ClassFolders, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure how often ``model`` is right on ``folders``, in percent of what could be read.

    ``evaluated`` and ``images`` are the numbers of those that could be read and of all;
    ``unreadable`` has the reason by the path of each of the others.
    """
    if len(folders.classes) != model.num_classes:
        raise UserError(
            f"the model's head has {model.num_classes} classes, {folders.root} has "
            f"{len(folders.classes)} of them ({_some(folders.classes)})"
        )
    paths = [path for path, _ in folders.images]
    labels = torch.tensor([label for _, label in folders.images])
    unreadable: dict[str, str] = {}
    hits: list[list[bool]] = []  # of each image, which of its five likeliest classes is its own
    for indices, logits in infer(model, paths, unreadable, options):
        ranked = logits.topk(min(5, logits.shape[1])).indices
        hits += (ranked == labels[indices].unsqueeze(1)).tolist()
    return {
        "top1": 100 * sum(first for first, *_ in hits) / len(hits),
        "top5": 100 * sum(map(any, hits)) / len(hits),
        "evaluated": len(hits),
        "images": len(paths),
        "unreadable": unreadable,
    }
