"""What the image commands share: their options, the model they ask for, and running it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.common.console import add_device, not_negative, positive, try_device
from backbones.common.errors import UserError
from backbones.common.files import printable
from backbones.common.images import ImageFiles, image_loader, import_images
from backbones.factory import create_model
from backbones.models.trunk import Trunk
from backbones.registry import input_shape, record_of
from backbones.weights.checkpoint import read_checkpoint
from backbones.weights.download import local_file
from backbones.weights.formats import convert_state_dict
from backbones.weights.loading import CONFIG, load_checkpoint, load_model
from backbones.weights.pyslowfast import from_pyslowfast


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`chosen_model` wants."""
    add = parser.add_argument
    told = "not needed with weights that say what they are of (own format, PySlowFast)"
    add("--model", metavar="NAME", help=f"as python -m backbones zoo lists; {told}")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", metavar="FILE_OR_URL", help="what load_weights reads")
    weights.add_argument("--pretrained", action="store_true", help="those released for --model")
    add("--img-size", type=positive, metavar="PIXELS", help="of the input (default: the model's)")


def chosen_model(options: argparse.Namespace) -> Trunk:
    """The model of the options of :func:`add_model`, with its weights."""
    # Made for the size that will come, so that position embeddings are resized once.
    size = {"img_size": options.img_size} if options.img_size else {}
    if options.weights:
        return model_of_file(options.model, options.weights, size)
    if not options.model:
        raise UserError("--pretrained needs --model NAME")
    return create_model(options.model, pretrained=True, **size)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`prepare` wants, the same for every command."""
    add_model(parser)
    add = parser.add_argument
    add("--batch-size", type=positive, default=64, metavar="N", help="default: %(default)s")
    readers = "processes that read images, 0 for none but this (default: %(default)s)"
    cores = os.cpu_count() or 1
    add("--workers", metavar="N", type=not_negative, default=min(4, cores), help=readers)
    add("--amp", choices=("bfloat16", "float16"), help="autocast (default: none)")
    add_device(parser)
    add("--json", metavar="FILE", type=Path, help="write the results there as well")


def prepare(options: argparse.Namespace, head: bool = True) -> nn.Module:
    """The model of the options of :func:`add_options`, all of which are tried before the work.

    It is on its device, in eval mode. Without ``head`` it returns pooled features, no classes.
    """
    device = try_device(options.device)
    if options.json:
        prepare_file(options.json)
    model = chosen_model(options)
    weights = options.weights or record_of(options.model).weights
    channels, *frames, _, _ = input_shape(model)
    if frames:
        raise UserError(f"{weights} is of a model that takes clips, not images")
    if channels != 3:
        raise UserError(f"{weights} is of a model of {channels} channels; images here have 3")
    if head and not model.num_classes:
        raise UserError(f"{weights} has no head, so it gives features but no classes")
    if not head:
        model.head = nn.Identity()  # what num_classes=0 has
    return model.eval().to(device)


def model_of_file(name: str | None, weights: str, size: dict[str, Any]) -> Trunk:
    """The model ``name``, or the one that the file says, with the file's weights and head; a
    UserError if it does not say, says another, or lacks weights."""
    checkpoint = read_checkpoint(local_file(weights))
    if CONFIG in checkpoint.metadata:
        model = load_model(checkpoint)
        own: str = vars(model)["config"]["name"]
        if name not in (None, own):
            raise UserError(f"{weights} is of {own}, not of {name}; leave --model out")
        return model
    if name is None:
        if checkpoint.cfg is None:
            raise UserError(f"{weights} does not say which model it is of; add --model NAME")
        return from_pyslowfast(checkpoint)
    with torch.device("meta"):
        outline = create_model(name)
    head = convert_state_dict(checkpoint.tensors, outline).get("head.weight")
    classes = head.shape[0] if head is not None and head.ndim == 2 else 0
    model = create_model(name, num_classes=classes, **size)
    report = load_checkpoint(model, checkpoint, weights)
    if report.missing:
        raise UserError(f"{weights} has no {', '.join(report.missing)}")
    print(report, file=sys.stderr)
    return model


def infer(
    model: nn.Module,
    paths: Sequence[str],
    unreadable: dict[str, str],
    options: argparse.Namespace,
    upright: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run a model of :func:`prepare` on image files, with a progress bar on a terminal.

    A file that cannot be read is left out of its batch, and ``unreadable`` takes the reason by its
    path; ``upright`` is that of :func:`backbones.common.images.read_image`. Yields for each batch
    which of the files are in it, and what the model returned: a row each, in float32, on the CPU.
    """
    side, device = options.img_size, torch.device(options.device)
    height, width = (side, side) if side else input_shape(model)[-2:]
    files = ImageFiles(paths, height, width, upright)
    on_gpu = device.type == "cuda"
    loader = image_loader(files, options.batch_size, options.workers, pin_memory=on_gpu)
    tqdm = import_images("tqdm").tqdm
    with tqdm(total=len(files), unit="image", disable=None) as bar:
        for indices, images, reasons in loader:
            unreadable |= {paths[index]: reason for index, reason in reasons.items()}
            bar.update(len(images) + len(reasons))
            if not indices:
                continue
            values = _forward(model, images.to(device, non_blocking=True), options.amp)
            finite = values.isfinite().all(1)
            if not finite.all():
                file = printable(paths[indices[int(finite.int().argmin())]])
                remedy = "try another --amp, or none" if options.amp else "are the weights damaged?"
                raise UserError(f"the output for {file} is not finite; {remedy}")
            yield indices, values
    if 0 < len(files) == len(unreadable):
        path, reason = next(iter(unreadable.items()))
        none = f"none of the {len(files):,} images could be read"
        raise UserError(f"{none}; {printable(path)}: {reason}")


def _forward(model: nn.Module, images: Tensor, amp: str | None) -> Tensor:
    dtype = None if amp is None else getattr(torch, amp)
    autocast = torch.autocast(images.device.type, dtype, enabled=amp is not None)
    try:
        with torch.inference_mode(), autocast:
            values: Tensor = model(images)
        return values.float().cpu()
    except torch.OutOfMemoryError as error:
        lack = f"{images.device} has not enough memory for a batch of {len(images)}"
        raise UserError(f"{lack}; use a smaller --batch-size") from error


def prepare_file(path: Path) -> None:
    """Make sure, before the work, that its result can be written; make the folder."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write into {path.parent}")
