"""List the models: sizes, cost, published accuracy, activation memory.

examples:
  python -m backbones zoo
  python -m backbones zoo rev_vit_base vit_base
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.common.console import show_progress
from backbones.memory.simulation import Simulation
from backbones.registry import MODELS, build, input_shape, list_models

_NOTES = """\
GFLOPs: multiply-accumulates of convolutions, linear layers and attention, as the papers count.
top-1: published, ImageNet-1k (rev_mvit_base_16x4: Kinetics-400); of vit_*, the paper's own ViTs.
stored, reversed: activations held for the backward pass, per image or clip in float32, under the
"store" and the "reversible" memory policy, without parameters and input (1 MB = 1e6 bytes)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="models; without any, all")


def run(options: argparse.Namespace) -> None:
    names = options.names or list_models()
    entries = []
    for index, name in enumerate(names, start=1):
        show_progress(f"{index}/{len(names)} {name}")
        entries.append(describe(name))
    show_progress("")
    print(zoo_table(entries))


class ZooEntry(NamedTuple):
    """One model of the zoo."""

    name: str
    parameters: int  # their number, with the published head
    macs: int  # of one sample: convolutions, matrix products and attention
    input_shape: tuple[int, ...]  # of that sample, (3, H, W) or (3, T, H, W)
    top1: float | None  # published, in percent
    released: bool  # whether pretrained=True finds weights
    stored_bytes: int  # for the backward pass, in float32 on a GPU, without parameters
    reversible_bytes: int | None  # likewise; None for a model that cannot be reversed


def describe(name: str) -> ZooEntry:
    """Count what one model does and holds, on tensors that have a shape and no memory."""
    with torch.device("meta"):
        model = build(name)
        x = torch.empty(1, *input_shape(model))
    with FlopCounterMode(display=False) as operations, torch.no_grad():
        model(x)
    simulation = Simulation(model, x, "cuda")
    can_reverse = simulation.saving_policy == "reversible"
    return ZooEntry(
        name=name,
        parameters=sum(param.numel() for param in model.parameters()),
        macs=operations.get_total_flops() // 2,
        input_shape=tuple(x.shape[1:]),
        top1=MODELS[name].top1,
        released=MODELS[name].weights is not None,
        stored_bytes=simulation.held_bytes("store"),
        reversible_bytes=simulation.held_bytes("reversible") if can_reverse else None,
    )


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


# What the table says of a model, by its heading.
_COLUMNS: dict[str, Callable[[ZooEntry], str]] = {
    "name": lambda entry: entry.name,
    "params (M)": lambda entry: f"{entry.parameters / 1e6:.2f}",
    "GFLOPs": lambda entry: f"{entry.macs / 1e9:.2f}",
    "input": lambda entry: "x".join(map(str, entry.input_shape)),
    "top-1": lambda entry: "-" if entry.top1 is None else f"{entry.top1:.1f}",
    "weights": lambda entry: "released" if entry.released else "-",
    "stored (MB)": lambda entry: _megabytes(entry.stored_bytes),
    "reversed (MB)": lambda entry: _megabytes(entry.reversible_bytes),
}


def zoo_table(entries: Sequence[ZooEntry]) -> str:
    """A table of models, and its notes."""
    columns = []
    for heading, cell in _COLUMNS.items():
        cells = [heading, *map(cell, entries)]
        align = str.ljust if heading in ("name", "input", "weights") else str.rjust
        width = max(map(len, cells))
        columns.append([align(text, width) for text in cells])
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([*lines, "", _NOTES])
