"""What the image commands share: their options, the model they ask for, and running it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.common.console import add_device, not_negative, parse_device, positive
from backbones.common.files import replacing
from backbones.common.images import ImageFiles, image_loader, import_images
from backbones.factory import create_model
from backbones.registry import MODELS, input_shape
from backbones.weights.checkpoint import Checkpoint, WeightsError, read_checkpoint
from backbones.weights.download import download
from backbones.weights.formats import convert_state_dict
from backbones.weights.loading import CONFIG, load_checkpoint
from backbones.weights.saved_models import from_pyslowfast, load_model

__all__ = [
    "add_options",
    "build_model",
    "infer",
    "prepare",
    "prepare_file",
    "print_unreadable",
    "shown",
    "write_json",
]

_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMED = 20  # files that are printed where a JSON file has all


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`prepare` wants, the same for every command."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="as python -m backbones lists; not needed with weights "
        "that say what they are of (own format, PySlowFast)",
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", metavar="FILE_OR_URL", help="own, PySlowFast or mmpretrain")
    weights.add_argument(
        "--pretrained", action="store_true", help="the released weights of --model"
    )
    parser.add_argument(
        "--img-size",
        type=positive,
        metavar="PIXELS",
        help="side of the crop (default: the model's)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=not_negative,
        default=min(4, os.cpu_count() or 1),
        help="processes that read images, 0 for none but this (default: %(default)s)",
    )
    parser.add_argument("--amp", choices=tuple(_AMP), help="autocast (default: none)")
    add_device(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")


def prepare(options: argparse.Namespace, head: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """What the options of :func:`add_options` ask for, tried before the work starts.

    Args:
        head: see :func:`build_model`.

    Returns:
        the model, and the arguments of :func:`infer` that are options.

    Raises:
        ValueError, OSError, ImportError: an option that cannot be met; one line says which.
    """
    how: dict[str, Any] = {"device": parse_device(options.device)}
    if options.json:
        prepare_file(options.json)
    model = build_model(options.model, options.weights, options.img_size, head)
    how |= {key: getattr(options, key) for key in ("img_size", "batch_size", "workers", "amp")}
    return model, how


def build_model(
    name: str | None, weights: str | None, img_size: int | None = None, head: bool = True
) -> nn.Module:
    """The model that the options ask for, with its weights, in eval mode.

    Args:
        name: as ``--model``. Without it, the file must say which model it is of.
        weights: as ``--weights``; None for the released ones of ``name``.
        img_size: as ``--img-size``: position embeddings of a model that is built by name are made
            for it, so that they are resized once.
        head: whether the classes are wanted; without, the model returns pooled features.

    Raises:
        ValueError: no such model; weights that cannot be had or do not fit; or a model of clips,
            of other than three channels, or without the head that is wanted.
    """
    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if weights is None:
        if name is None:
            raise ValueError("--pretrained needs --model NAME")
        model = create_model(name, pretrained=True, **size)
        weights = str(MODELS[name].weights)
    else:
        model = _model_of_file(name, weights, size)
    channels, *frames, _, _ = input_shape(model)
    if frames:
        raise ValueError(f"{weights} is of a model that takes clips, not images")
    if channels != 3:
        raise ValueError(f"{weights} is of a model of {channels} channels; images here have 3")
    if head and not model.num_classes:
        raise ValueError(f"{weights} has no head, so it gives features but no classes")
    if not head:
        model.head = nn.Identity()  # what num_classes=0 has
    return model.eval()


def _model_of_file(name: str | None, weights: str, size: dict[str, Any]) -> nn.Module:
    path = download(weights) if "://" in weights else Path(weights).expanduser()
    checkpoint = read_checkpoint(path)
    if CONFIG in checkpoint.metadata:
        model = load_model(path)
        own: str = vars(model)["config"]["name"]
        if name not in (None, own):
            raise WeightsError(f"{weights} is of {own}, not of {name}; leave --model out")
        return model
    if name is None:
        if checkpoint.cfg is None:
            raise WeightsError(f"{weights} does not say which model it is of; add --model NAME")
        return from_pyslowfast(path)
    model = create_model(name, num_classes=_head_of(checkpoint, name), **size)
    report = load_checkpoint(model, checkpoint, weights)
    if report.missing:
        raise WeightsError(f"{weights} has no {', '.join(report.missing)}")
    print(report, file=sys.stderr)
    return model


def _head_of(checkpoint: Checkpoint, name: str) -> int:
    """The number of classes of the head in a checkpoint, 0 if it has none."""
    with torch.device("meta"):
        model = create_model(name)
    head = convert_state_dict(checkpoint.tensors, model).get("head.weight")
    return head.shape[0] if head is not None and head.ndim == 2 else 0


def infer(
    model: nn.Module,
    paths: Sequence[str],
    unreadable: dict[str, str],
    *,
    device: torch.device,
    img_size: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    amp: str | None = None,
    upright: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run a model on image files, with a progress bar where stderr is a terminal.

    The values do not depend on ``workers``. A file that cannot be read is left out of its batch.

    Args:
        model: from images (B, 3, H, W) to (B, classes); is moved to ``device``.
        paths: the files.
        unreadable: takes the reason by the path of each file that cannot be read.
        img_size: side of the crop in pixels; None for what the model is made for.
        amp: ``"bfloat16"`` or ``"float16"`` for autocast.
        upright: see :func:`backbones.common.images.read_image`.

    Yields:
        for each batch, which of the files are in it, and what the model returned for them: a row
        each, in float32, on the CPU.

    Raises:
        ValueError: too large a batch for the device's memory; an output that is not finite; or,
            at the end, not a single image that could be read.
    """
    height, width = input_shape(model)[-2:] if img_size is None else (img_size, img_size)
    files = ImageFiles(paths, height, width, upright)
    loader = image_loader(files, batch_size, workers, pin_memory=device.type == "cuda")
    model = model.to(device)
    tqdm = import_images("tqdm").tqdm
    with tqdm(total=len(files), unit="image", disable=None) as bar:
        for batch in loader:
            unreadable |= {paths[index]: reason for index, reason in batch.unreadable.items()}
            bar.update(len(batch.images) + len(batch.unreadable))
            if not len(batch.images):
                continue
            values = _forward(model, batch.images.to(device, non_blocking=True), amp)
            finite = values.isfinite().all(1)
            if not finite.all():
                file = shown(paths[batch.indices[finite.logical_not()][0]])
                remedy = "try another --amp, or none" if amp else "are the weights damaged?"
                raise ValueError(f"the output for {file} is not finite; {remedy}")
            yield batch.indices.tolist(), values
    if 0 < len(files) == len(unreadable):
        path, reason = next(iter(unreadable.items()))
        raise ValueError(
            f"none of the {len(files):,} images could be read; {shown(path)}: {reason}"
        )


def _forward(model: nn.Module, images: Tensor, amp: str | None) -> Tensor:
    dtype = None if amp is None else _AMP[amp]
    try:
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, dtype, enabled=amp is not None),
        ):
            values: Tensor = model(images)
        return values.float().cpu()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{images.device} has not enough memory for a batch of {len(images)}; "
            "use a smaller --batch-size"
        ) from error


def shown(path: str) -> str:
    """A path as it can be printed, even if its name is no valid Unicode."""
    return os.fsencode(path).decode(errors="backslashreplace")


def print_unreadable(unreadable: Mapping[str, str], json_file: Path | None) -> None:
    """Count and name, with its reason, what could not be read; nothing if all could.

    Of many the first ones, if ``json_file`` has them all.
    """
    if not unreadable:
        return
    print(f"{len(unreadable):,} unreadable:")
    named = list(unreadable.items())[: _NAMED if json_file else None]
    for path, reason in named:
        print(f"  {shown(path)}: {reason}")
    if len(unreadable) > len(named):
        print(f"  and {len(unreadable) - len(named):,} more, which are in {json_file}")


def prepare_file(path: Path) -> None:
    """Make sure, before the work, that its result can be written; make the folder.

    Raises:
        ValueError: ``path`` is a folder, or nothing can be written where it lies.
        OSError: the folder cannot be made.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write into {path.parent}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
