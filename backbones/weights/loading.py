"""Weights in and out: checked as a whole before a single one is copied."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.common.errors import some_of
from backbones.models.trunk import Trunk
from backbones.registry import build
from backbones.weights.adapting import adapt
from backbones.weights.checkpoint import (
    Checkpoint,
    WeightsError,
    read_checkpoint,
    write_safetensors,
)
from backbones.weights.download import local_file
from backbones.weights.formats import Layout, describe, recognise, translate
from backbones.weights.resizing import (
    Grid,
    grids_of,
    is_table,
    resize_patches,
    resize_positions,
    resize_tables,
)

# Entries of a safetensors file's metadata, both JSON: the model's name and arguments, and the
# grids of its position embeddings, which the number of their rows does not tell.
CONFIG = "backbones.config"
_GRIDS = "backbones.grids"

_HEAD = "head."


@dataclass
class LoadReport:
    """What :func:`load_weights` did. Names are the model's own; ``str()`` gives a summary.

    Attributes:
        source: the path or address.
        format: whose layout the file has: ``"own"``, ``"PySlowFast"``, ``"mmpretrain"``,
            ``"timm"`` (also DeiT, MAE, DINOv2), ``"Detectron2"`` (ViTDet), ``"Hugging Face"``,
            ``"torchvision"`` or ``"PyTorchVideo"`` (read by revvideo alone).
        net: what net it is, in words; empty where only the layout is known.
        loaded: tensors that were copied into the model.
        converted: those among them, or what else of the file, that took another form: a class
            token with its position, LayerScale that was folded, a plain net's norm and head in a
            reversible model; each with what was done.
        resized: those among them that were resized to the model's grid, each with what was done.
        left_out: tensors of the file that were not used, each with the reason.
        missing: tensors of the model that keep the values they had: those of the head, tables of
            relative positions where the file has none, and a final norm (ViTDet has none).
        averaged: under which name the file holds averaged weights too, which were not taken.
    """

    source: str
    format: Layout
    net: str = ""
    loaded: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    averaged: str | None = None

    def __str__(self) -> str:
        what = ": ".join(filter(None, (self.format, self.net)))
        lines = [f"{self.source} ({what}): {len(self.loaded)} tensors loaded"]
        for did, names in (
            ("converted", self.converted),
            ("resized", self.resized),
            ("left out", self.left_out),
        ):
            reasons: dict[str, list[str]] = {}
            for name, why in names.items():
                reasons.setdefault(why, []).append(name)
            lines += [f"{did} {some_of(group)}: {why}" for why, group in reasons.items()]
        if self.averaged is not None:
            lines.append(f"not taken: averaged weights under {self.averaged!r} (ema=True)")
        tables = [name for name in self.missing if is_table(name)]
        if others := [name for name in self.missing if not is_table(name)]:
            lines.append(f"left unchanged: {', '.join(others)}")
        if tables:
            count = f"{len(tables)} tables of relative positions"
            lines.append(f"not in the file, unchanged: {count} ({some_of(sorted(tables))})")
        return "\n  ".join(lines)


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
    """As :func:`load_weights`, for a checkpoint that was read already from ``source``.

    Raises:
        WeightsError: it does not fit the model.
    """
    report, ready = fit_checkpoint(model, checkpoint, source, ema)
    own = model.state_dict()
    with torch.no_grad():
        for name, value in ready.items():
            own[name].copy_(value)
    return report


def fit_checkpoint(
    model: nn.Module, checkpoint: Checkpoint, source: str, ema: bool = False
) -> tuple[LoadReport, dict[str, Tensor]]:
    """What :func:`load_checkpoint` would do, and with which tensors; the model stays as it is.

    Raises:
        WeightsError: it does not fit the model.
    """
    own: dict[str, Tensor] = model.state_dict()
    report = LoadReport(source, recognise(checkpoint.tensors), averaged=checkpoint.averaged)
    try:
        translation = translate(checkpoint.tensors, model, ema)
        tensors, report.format = translation.tensors, translation.layout
        report.net = describe(translation)
        if odd := odd_numbers(tensors, own):
            raise WeightsError(f"not plain numbers: {some_of(odd)}")
        adapt(translation, model, report)
        grids = _recorded_grids(checkpoint.metadata)
        report.resized = resize_positions(tensors, model, grids, foreign=report.format != "own")
        report.resized |= resize_tables(tensors, own)
        if report.format not in ("own", "PySlowFast", "mmpretrain"):
            report.resized |= resize_patches(tensors, own)
        _drop_head(tensors, own, report)
        absent = [name for name in own if name not in tensors]
        has_tables = any(map(is_table, tensors))
        report.missing += [
            name for name in absent if name.startswith(_HEAD) or (is_table(name) and not has_tables)
        ]
        _check_names_and_shapes(tensors, own, report.missing)
    except WeightsError as error:
        kind = type(model).__name__
        raise WeightsError(
            f"{source}, taken for {report.format}'s layout, does not fit this {kind}: {error}"
        ) from error
    # To dtype and device first, since that may still fail; copying cannot.
    ready = {name: tensors[name].to(own[name]) for name in own if name in tensors}
    report.loaded = list(ready)
    return report, ready


def odd_numbers(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """The names of values of which copying into their places is not sure to work."""
    if any(value.is_meta for value in own.values()):
        raise WeightsError("the model is on the meta device and has no values")
    return [
        name
        for name, value in sorted(tensors.items())
        if value.layout != torch.strided
        or value.device.type != "cpu"
        or value.is_quantized
        or (
            name in own
            and (value.is_floating_point(), value.is_complex())
            != (own[name].is_floating_point(), own[name].is_complex())
        )
    ]


def _recorded_grids(metadata: dict[str, str]) -> dict[str, Grid]:
    """What :func:`save_weights` wrote of the grids; nothing if it was not this function."""
    try:
        items = json.loads(metadata.get(_GRIDS, "{}")).items()
        return {name: (int(t), int(h), int(w)) for name, (t, h, w) in items}
    except (AttributeError, TypeError, ValueError) as error:
        raise WeightsError("its metadata is damaged") from error


def _drop_head(tensors: dict[str, Tensor], own: dict[str, Tensor], report: LoadReport) -> None:
    """Leave a head out that the model has not, or has for another number of classes."""
    has_head = any(key.startswith(_HEAD) for key in own)
    for name in [name for name in tensors if name.startswith(_HEAD)]:
        value, mine = tensors[name], own.get(name)
        if mine is None:
            if has_head:
                continue  # not the kind of head that these models have
            why = "the model has no head"
        elif value.ndim and value.shape[0] != mine.shape[0] and value.shape[1:] == mine.shape[1:]:
            why = f"{value.shape[0]} classes, the model has {mine.shape[0]}"
        else:
            continue
        del tensors[name]
        report.left_out[name] = why


def _check_names_and_shapes(
    tensors: dict[str, Tensor], own: dict[str, Tensor], allowed: Iterable[str]
) -> None:
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
    checkpoint = read_checkpoint(path)
    if CONFIG not in checkpoint.metadata:
        raise WeightsError(
            f"{checkpoint.path} does not say which model it is of; use create_model(…) and "
            "load_weights(…)"
        )
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
    write_safetensors(Path(path).expanduser(), model.state_dict(), metadata)
