"""Print the five likeliest classes of images with their probabilities, or save pooled features.

examples:
  python -m backbones predict cat.jpg --model rev_vit_small --pretrained
  python -m backbones predict photos 'more/*.png' --weights mine.safetensors --classes names.txt
  python -m backbones predict photos --weights REV_VIT_B.pyth --features photos.npz

The features are read with numpy.load('photos.npz'): 'features' is (N, C) in float32, 'files' has
the N file names. Unreadable images are left out, counted and named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from backbones.commands.image_models import add_options, infer, prepare, prepare_file
from backbones.common.console import name_unreadable
from backbones.common.errors import UserError
from backbones.common.files import find_files, printable, read_class_names, replacing, write_json
from backbones.common.images import IMAGENET_CLASSES, image_suffixes, import_images

_Batches = Iterator[tuple[list[int], Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", help="a file, a folder or a pattern")
    add_options(parser)
    default = "ImageNet's for a head of 1000 classes, else numbers"
    names = f"names of the classes, one per line (default: {default})"
    add("--classes", metavar="FILE", type=Path, help=names)
    add("--features", metavar="FILE.npz", type=Path, help="save pooled features instead")


def run(options: argparse.Namespace) -> None:
    if options.features:
        if options.classes or options.json:
            raise UserError("--features goes without --classes and --json")
        if options.features.suffix != ".npz":
            raise UserError(f"--features {options.features} should end in .npz")
        prepare_file(options.features)
    suffixes = image_suffixes()
    what = f"image ({', '.join(suffixes)})"
    found = find_files(options.images, lambda p: p.suffix.lower() in suffixes, what, option="")
    paths = [str(path) for path in found]
    model = prepare(options, head=not options.features)
    unreadable: dict[str, str] = {}
    # Upright, because photographs often lie on their side in the file.
    batches = infer(model, paths, unreadable, options, upright=True)
    if options.features:
        _save_features(paths, batches, options.features)
    else:
        classes = cast(int, model.num_classes)
        file = options.classes
        names = read_class_names(file, classes) if file else default_names(classes)
        predictions = _rank(paths, batches, names)
        if options.json:
            write_json(options.json, {"predictions": predictions, "unreadable": unreadable})
    name_unreadable(unreadable, options.json)


def default_names(classes: int) -> list[str]:
    """The names of the classes of a head: of 1000 those of ImageNet-1k, else numbers."""
    if classes != IMAGENET_CLASSES:
        return [str(index) for index in range(classes)]
    weights = import_images("torchvision.models").ResNet18_Weights.IMAGENET1K_V1
    return list(weights.meta["categories"])


def _rank(paths: list[str], batches: _Batches, names: list[str]) -> list[dict[str, Any]]:
    """Print the likeliest classes; return them as they go into a JSON file."""
    write = import_images("tqdm").tqdm.write  # beside the progress bar, not into it
    predictions = []
    for indices, logits in batches:
        top = logits.softmax(1).topk(min(5, len(names)))
        for index, *ranking in zip(indices, top.indices.tolist(), top.values.tolist(), strict=True):
            ranked = zip(*ranking, strict=True)
            classes = [{"index": c, "name": names[c], "probability": p} for c, p in ranked]
            lines = [f"{100 * c['probability']:7.2f} %  {c['name']}" for c in classes]
            write("\n".join([printable(paths[index]), *lines]), file=sys.stdout)
            predictions.append({"file": paths[index], "classes": classes})
    return predictions


def _save_features(paths: list[str], batches: _Batches, file: Path) -> None:
    numpy = import_images("numpy")
    indices, rows = zip(*batches, strict=True)
    files = [paths[index] for index in chain.from_iterable(indices)]
    features = torch.cat(rows)
    with replacing(file) as partial, partial.open("wb") as stream:  # a name would get a suffix
        numpy.savez(stream, features=features.numpy(), files=numpy.array(files))
    count, width = features.shape
    print(f"{file}: features {count} x {width}, of {count:,} of {len(paths):,} images")
