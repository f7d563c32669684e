"""Weights in and out: checked as a whole before a single one is copied."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.common.errors import optional_import, some_of
from backbones.common.files import replacing
from backbones.models.trunk import Trunk
from backbones.registry import build
from backbones.weights import resizing
from backbones.weights.adapting import LoadReport, Tensors, adapt
from backbones.weights.checkpoint import Checkpoint, WeightsError, read_checkpoint
from backbones.weights.download import local_file
from backbones.weights.formats import describe, recognise, translate
from backbones.weights.resizing import Grid, grids_of, is_table

# Entries of a safetensors file's metadata, both JSON: the model's name and arguments, and the
# grids of its position embeddings, which the number of their rows does not tell.
CONFIG = "backbones.config"
_GRIDS = "backbones.grids"

_HEAD = "head."


def load_weights(
    model: nn.Module, path_or_url: str | PathLike[str], ema: bool = False
) -> LoadReport:
    """Load pretrained weights into ``model``: of this package or of another one.

    Whose they are shows in the file: timm's (DeiT, MAE, DINOv2 among them), Hugging Face's ViT and
    DINOv2, torchvision's ViT, Detectron2's ViTDet, PySlowFast's, mmpretrain's; as ``.pth``,
    ``.safetensors``, an index of several of these, or the ``.pkl`` of Detectron2's zoo; nested and
    prefixed as trainers do.

    Position embeddings made for another grid are resized, bicubically in space and linearly in
    time, tables of relative positions linearly. Where a file has no such tables, those of the model
    stay as they are: zeros, in a new one. A class token and registers that the model has not are
    left out, and LayerScale is folded into the layers before it. A head is left out that is for
    another number of classes, or reads something else than the model's. The branches of a plain
    net go into its reversible twin, which has to be fine-tuned then (docs/pretrained.md). Anything
    else that does not fit is an error, and then the model is as it was. No code in the file is run.

    >>> print(load_weights(model, "REV_VIT_S.pyth"))
    REV_VIT_S.pyth (PySlowFast): 151 tensors loaded

    Args:
        model: a model of this package. Its dtype and device stay.
        path_or_url: a file, or an address, which is downloaded once (see
            :func:`backbones.weights.download.download`), or a name such as ``mae_vit_base``.
        ema: take the averaged weights of a file that holds others too. The report names them.

    Raises:
        WeightsError: a file that cannot be had or read, does not fit the model, is of another
            kind of net (by its name), or has no averaged weights.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    checkpoint = read_checkpoint(local_file(path_or_url), ema)
    return load_checkpoint(model, checkpoint, str(path_or_url), ema)


def load_checkpoint(
    model: nn.Module, checkpoint: Checkpoint, source: str, ema: bool = False
) -> LoadReport:
    """As :func:`load_weights`, for a checkpoint that was read already from ``source``."""
    report, ready = fit_checkpoint(model, checkpoint, source, ema)
    own = model.state_dict()
    with torch.no_grad():
        for name, value in ready.items():
            own[name].copy_(value)
    return report


def fit_checkpoint(
    model: nn.Module, checkpoint: Checkpoint, source: str, ema: bool = False
) -> tuple[LoadReport, Tensors]:
    """What :func:`load_checkpoint` would do, and with which tensors; the model stays as it is."""
    own: Tensors = model.state_dict()
    report = LoadReport(source, recognise(checkpoint.tensors), averaged=checkpoint.averaged)
    try:
        translation = translate(checkpoint.tensors, model, ema)
        tensors, report.format = translation.tensors, translation.layout
        report.net = describe(translation)
        if odd := odd_numbers(tensors, own):
            raise WeightsError(f"not plain numbers: {some_of(odd)}")
        adapt(translation, model, report)
        grids, foreign = _recorded_grids(checkpoint.metadata), report.format != "own"
        report.resized = resizing.resize_positions(tensors, model, grids, foreign)
        report.resized |= resizing.resize_tables(tensors, own)
        if report.format not in ("own", "PySlowFast", "mmpretrain"):
            report.resized |= resizing.resize_patches(tensors, own)
        _drop_head(tensors, own, report)
        absent = [name for name in own if name not in tensors]
        has_tables = any(map(is_table, tensors))
        report.missing += [
            name for name in absent if name.startswith(_HEAD) or (is_table(name) and not has_tables)
        ]
        _check_names_and_shapes(tensors, own, report.missing)
    except WeightsError as error:
        kind, taken = type(model).__name__, f"taken for {report.format}'s layout"
        raise WeightsError(f"{source}, {taken}, does not fit this {kind}: {error}") from error
    # To dtype and device first, since that may still fail; copying cannot.
    ready = {name: tensors[name].to(own[name]) for name in own if name in tensors}
    report.loaded = list(ready)
    return report, ready


def odd_numbers(tensors: Tensors, own: Tensors) -> list[str]:
    """The names of values of which copying into their places is not sure to work."""
    if any(value.is_meta for value in own.values()):
        raise WeightsError("the model is on the meta device and has no values")

    def is_odd(value: Tensor, mine: Tensor) -> bool:
        plain = value.layout == torch.strided and value.device.type == "cpu"
        kinds = [(x.is_floating_point(), x.is_complex()) for x in (value, mine)]
        return not plain or value.is_quantized or kinds[0] != kinds[1]

    return [name for name, value in sorted(tensors.items()) if is_odd(value, own.get(name, value))]


def _recorded_grids(metadata: dict[str, str]) -> dict[str, Grid]:
    """What :func:`save_weights` wrote of the grids; nothing if it was not this function."""
    try:
        items = json.loads(metadata.get(_GRIDS, "{}")).items()
        return {name: (int(t), int(h), int(w)) for name, (t, h, w) in items}
    except (AttributeError, TypeError, ValueError) as error:
        raise WeightsError("its metadata is damaged") from error


def _drop_head(tensors: Tensors, own: Tensors, report: LoadReport) -> None:
    """Leave a head out that the model has not, or has for another number of classes."""
    has_head = any(key.startswith(_HEAD) for key in own)
    for name in [name for name in tensors if name.startswith(_HEAD)]:
        theirs, mine = tensors[name].shape, own[name].shape if name in own else ()
        if not has_head:
            report.left_out[name] = "the model has no head"
        elif theirs and mine and theirs[0] != mine[0] and theirs[1:] == mine[1:]:
            report.left_out[name] = f"{theirs[0]} classes, the model has {mine[0]}"
        else:
            continue  # it fits, or is another kind of head, which will be refused
        del tensors[name]


def _check_names_and_shapes(tensors: Tensors, own: Tensors, allowed: Iterable[str]) -> None:
    problems = {
        "of another shape": {
            f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if tensors[name].shape != own[name].shape
        },
        "not in the model": tensors.keys() - own.keys(),
        "not in the file": own.keys() - tensors.keys() - set(allowed),
    }
    # The first that is wrong: the others follow from it as a rule.
    for what, names in problems.items():
        if names:
            raise WeightsError(f"{what}: {some_of(sorted(names))}")


def load_model(path: str | PathLike[str] | Checkpoint) -> Trunk:
    """Build the model that :func:`save_weights` wrote to ``path``, and load its weights.

    Raises:
        WeightsError: a file that cannot be read, does not say which model it is of, or holds
            other tensors than that model.
        ImportError: safetensors is not installed.
    """
    checkpoint, instead = read_checkpoint(path), "use create_model(…) and load_weights(…)"
    if CONFIG not in checkpoint.metadata:
        raise WeightsError(f"{checkpoint.path} does not say which model it is of; {instead}")
    try:
        config = json.loads(checkpoint.metadata[CONFIG])
        name, arguments = config["name"], config["arguments"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{checkpoint.path}: its metadata is damaged") from error
    return build_described(checkpoint, name, arguments)


def build_described(checkpoint: Checkpoint, name: str, arguments: dict[str, Any]) -> Trunk:
    """The model that a checkpoint says it is of, with no less than all of its weights."""
    path = checkpoint.path
    try:
        model = build(name, **arguments)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} names a model that cannot be built: {error}") from error
    report = load_checkpoint(model, checkpoint, str(path))
    problems = [f"{name}: {why}" for name, why in report.left_out.items()]
    if absent := [name for name in report.missing if name not in report.left_out]:
        problems.append(f"not in the file: {some_of(absent)}")
    if problems:
        raise WeightsError(f"{path} is not of the model that it describes: {'; '.join(problems)}")
    return model


def save_weights(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the weights of ``model`` as a safetensors file.

    The file remembers the name and the arguments that :func:`create_model` was given, so that
    :func:`load_model` builds the model again, and the grids of its position embeddings. A model
    that was built without ``create_model`` is saved without its name.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written. A file that was there before is still there.
        TypeError: arguments that JSON cannot hold.
    """
    model = getattr(model, "_orig_mod", model)  # within what torch.compile returns
    metadata = {_GRIDS: json.dumps(grids_of(model))}
    if config := getattr(model, "config", None):
        metadata[CONFIG] = json.dumps(config)
    save = optional_import("safetensors.torch", "weights", f"writing {path}").save_file
    # Cloned, because tensors that share a storage cannot be written.
    whole = {"memory_format": torch.contiguous_format}
    own = {key: value.detach().cpu().clone(**whole) for key, value in model.state_dict().items()}
    with replacing(Path(path).expanduser()) as partial:
        # Readers that follow the Hugging Face hub ask for this entry.
        save(own, partial, metadata={"format": "pt", **metadata})
