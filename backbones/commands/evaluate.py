"""``python -m backbones evaluate``: the accuracy of a model on folders of images, one per class."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones.commands.image_models import (
    add_options,
    infer,
    prepare,
    print_unreadable,
    shown,
    write_json,
)
from backbones.common.console import make_parser, run_command
from backbones.common.errors import some_of
from backbones.common.images import IMAGENET_CLASSES, image_suffixes, import_images
from backbones.registry import MODELS, input_shape, name_of

__all__ = ["Accuracy", "ClassFolders", "accuracy", "find_classes", "main"]


@dataclass(frozen=True)
class ClassFolders:
    """Images in one folder per class; the sorted names of the folders are classes 0, 1, ….

    Attributes:
        root: the folder that holds those of the classes.
        classes: the names of the folders.
        paths: the image files.
        labels: the class of each.
    """

    root: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]


def find_classes(data: Path) -> ClassFolders:
    """List the images under ``data/val``, or under ``data`` if there is no such folder.

    As torchvision's ImageFolder does it, but hidden folders are no classes.

    Raises:
        ValueError: no folder; an empty one; images that lie in none of a class; classes without
            images.
    """
    if not data.is_dir():
        raise ValueError(f"--data {data} is {'no folder' if data.exists() else 'not there'}")
    root = data / "val" if (data / "val").is_dir() else data
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    classes = [entry.name for entry in entries if entry.is_dir()]
    loose = [
        entry.name
        for entry in entries
        if entry.suffix.lower() in image_suffixes() and entry.is_file()
    ]
    if loose:
        raise ValueError(
            f"{root} has images directly in it ({_some(loose)}); put them into one folder per class"
        )
    if not classes:
        raise ValueError(f"{root} has no folders; it should have one per class, with images in it")
    make_dataset = import_images("torchvision.datasets.folder").make_dataset
    index = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(str(root), index, image_suffixes(), allow_empty=True)
    counts = Counter(label for _, label in samples)
    if empty := [name for label, name in enumerate(classes) if not counts[label]]:
        raise ValueError(
            f"{len(empty)} of {len(classes)} class folders in {root} have no image "
            f"({', '.join(image_suffixes())}): {_some(empty)}"
        )
    return ClassFolders(root, classes, [path for path, _ in samples], [c for _, c in samples])


def _some(names: Sequence[str]) -> str:
    return some_of([shown(name) for name in names])


@dataclass(frozen=True)
class Accuracy:
    """How often a model is right.

    Attributes:
        top1: percent of the evaluated images whose class has the largest logit.
        top5: percent of those whose class is among the five largest.
        evaluated: number of images that could be read.
        images: number of images.
        unreadable: the reason by the path of each image that could not be read.
    """

    top1: float
    top5: float
    evaluated: int
    images: int
    unreadable: dict[str, str]


def accuracy(model: nn.Module, folders: ClassFolders, **how: Any) -> Accuracy:
    """Measure the accuracy of ``model`` on ``folders``.

    Args:
        model: in eval mode, with one output per class.
        how: what :func:`backbones.commands.image_models.infer` takes, ``device`` at least.

    Raises:
        ValueError: another number of classes than the model has; or an error of
            :func:`backbones.commands.image_models.infer`.
    """
    if len(folders.classes) != model.num_classes:
        raise ValueError(
            f"the model's head has {model.num_classes} classes, {folders.root} has "
            f"{len(folders.classes)} of them ({_some(folders.classes)})"
        )
    labels = torch.tensor(folders.labels)
    unreadable: dict[str, str] = {}
    first = among_five = evaluated = 0
    for indices, logits in infer(model, folders.paths, unreadable, **how):
        ranked = logits.topk(min(5, logits.shape[1])).indices
        hits = ranked == labels[indices].unsqueeze(1)
        first += int(hits[:, 0].sum())
        among_five += int(hits.sum())
        evaluated += len(indices)
    return Accuracy(
        100 * first / evaluated,
        100 * among_five / evaluated,
        evaluated,
        len(folders.paths),
        unreadable,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the accuracy; return the exit status."""
    parser = make_parser(
        "backbones.commands.evaluate",
        """\
Measure top-1 and top-5 accuracy on images in one folder per class, and print them beside the
published score. The folders' sorted names are the classes of the head, as in torchvision's
ImageFolder; for ImageNet they are the wnids (n01440764, …).""",
        """\
examples:
  python -m backbones evaluate --model rev_vit_base --pretrained --data imagenet
  python -m backbones evaluate --weights REV_VIT_B.pyth --data imagenet/val --amp bfloat16
  python -m backbones evaluate --weights mine.safetensors --data flowers --json out.json

Images are prepared as the original does: short side to 256 pixels, bicubic, centre of 224; in
proportion for other sizes. Unreadable images are left out, counted and named.""",
    )
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FOLDER", help="of class folders, or of val/"
    )
    add_options(parser)
    return run_command(parser, _evaluate, arguments)


def _evaluate(options: argparse.Namespace) -> None:
    folders = find_classes(options.data.expanduser())
    model, how = prepare(options)
    _note_order(folders)
    result = accuracy(model, folders, **how)
    name = name_of(model) or type(model).__name__
    top1 = top5 = None
    if model.num_classes == IMAGENET_CLASSES:
        record = MODELS.get(name)
        top1, top5 = (record.top1, record.top5) if record else (None, None)
    size = options.img_size or input_shape(model)[-1]
    precision = options.amp or "float32"
    weights = options.weights or "released weights"
    print(f"{name}, {weights}, {size} px, {precision}, {how['device']}")
    print(
        f"{result.top1:.2f} top-1{_beside(top1)}, {result.top5:.2f} top-5{_beside(top5)} "
        f"on {result.evaluated:,} of {result.images:,} images in {folders.root}"
    )
    print_unreadable(result.unreadable, options.json)
    if options.json:
        content = {
            "model": name,
            "weights": weights,
            "data": str(folders.root),
            "classes": len(folders.classes),
            "img_size": size,
            "precision": precision,
            "device": str(how["device"]),
            "torch": torch.__version__,
            "top1": result.top1,
            "top5": result.top5,
            "published_top1": top1,
            "published_top5": top5,
            "evaluated": result.evaluated,
            "images": result.images,
            "unreadable": result.unreadable,
        }
        write_json(options.json, content)


def _note_order(folders: ClassFolders) -> None:
    """Say so where the order of the folders is hardly that of ImageNet's classes."""
    names = folders.classes
    if len(names) == IMAGENET_CLASSES and not all(re.fullmatch(r"n\d{8}", n) for n in names):
        print(
            f"note: the folders in {folders.root} are not named by wnid; their sorted order "
            f"({_some(names)}) is taken for that of the head",
            file=sys.stderr,
        )


def _beside(published: float | None) -> str:
    return "" if published is None else f" (published {published})"


if __name__ == "__main__":
    sys.exit(main())
