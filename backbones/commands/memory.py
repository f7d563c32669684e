"""Show where the memory of a training step (forward, backward, AdamW) goes under each policy. Needs
no GPU and no weights: a step on shape-only tensors is counted. Where there is a GPU, real steps
check the count and measure the speed.

examples:
  python -m backbones memory --model rev_vit_base --input 64x3x224x224 --budget 8GB
  python -m backbones memory --model rev_mvit_base_16x4 --input 4x3x16x224x224 --amp bfloat16 \\
      --budget 16GB --plot memory.png

'store' keeps all activations, 'checkpoint' the input of each block, 'reversible' rebuilds them.
A budget adds what backbones.fit_memory chooses: the products that the blocks keep, or how many
of the last ones are stored. The picture shows what speed can be had for which bytes.

The rows, at the moment of the peak: stem, stages and head are what these made in the forward
pass and is still alive; 'working set' is what the backward pass and the optimizer need for the
moment. Below the total: 'held', all that waits between forward and backward pass. 'speed' is
the throughput over that of 'store': counted, from the operations of a step, which is a bound;
measured, from a few real steps in turn, at a smaller batch where 'store' does not fit. On a GPU
'allocated' is the peak of real steps, by torch's allocator, and 'total is off by' compares.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from backbones.commands.memory_plot import frontier, plot
from backbones.commands.real_steps import ROUNDS, Settings, Trial
from backbones.common.console import show_progress
from backbones.common.errors import UserError, optional_import
from backbones.engine.policies import MemoryPolicy
from backbones.memory.budget import fastest_that_fits, free_bytes, parse_budget, readable
from backbones.memory.simulation import Simulation
from backbones.registry import build

Shape = tuple[int, ...]

# Of the memory that is free, what steps are planned with: other programs want some of it too.
_MEASURED_SHARE = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="as python -m backbones zoo lists")
    shape = "BxCxHxW, for clips BxCxTxHxW, such as 8x3x224x224"
    add("--input", required=True, metavar="SHAPE", help=shape)
    add("--budget", metavar="SIZE", help="such as 8GB, 800MB or 8GiB; auto: what the GPU has free")
    add("--amp", choices=("bfloat16", "float16"), help="count under autocast (default: float32)")
    where = "where the training would run (default: %(default)s, which need not be there)"
    add("--device", choices=("cuda", "cpu"), default="cuda", help=where)
    steps = (
        "run real steps: on a GPU for the peak and the speed, on a CPU for the speed, which may "
        "take minutes (default: if the device is a GPU that is there)"
    )
    add("--measure", action=argparse.BooleanOptionalAction, help=steps)
    add("--plot", metavar="FILE.png", help="write a picture of the table")


def run(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    budget = None if options.budget is None else parse_budget(options.budget, device)
    shape = _parse_shape(options.input)
    autocast = getattr(torch, options.amp) if options.amp else None
    here = device.type == "cpu" or torch.cuda.is_available()
    if options.measure and not here:
        raise UserError("--measure finds no GPU: add --device cpu to measure on the CPU")
    if options.plot:
        _check_plot(Path(options.plot))

    simulation = _simulate(options.model, shape, device, autocast)
    saving = simulation.saving_policy
    policies: tuple[MemoryPolicy, ...] = "store", "checkpoint", saving
    settings: Settings = {policy: (policy, 0, ()) for policy in policies}
    for name, setting in settings.items():
        show_progress(f"counting a step under {name}")
        simulation.step(*setting)
    if budget is not None:
        show_progress("looking for the mixture that fits the budget")
        plan = fastest_that_fits(simulation, budget)
        settings["fitted"] = saving, plan.stored_blocks, plan.keep
    show_progress("")
    steps = {name: simulation.step(*setting) for name, setting in settings.items()}

    precision = f"{options.amp} autocast" if options.amp else "float32"
    title = f"{options.model}, input {options.input}, {precision}"
    print(f"{title}: peak of a training step with AdamW\n")
    _print_row("", settings)
    for part in steps["store"].peak:
        _print_row(part, (readable(step.peak[part]) for step in steps.values()))
    _print_row("total", (readable(step.peak_bytes) for step in steps.values()))
    _print_row("held", (readable(step.held_bytes) for step in steps.values()))
    most = steps["store"].operations
    _print_row("speed, counted", (f"{most / step.operations:.2f}" for step in steps.values()))
    if options.measure or (options.measure is None and device.type == "cuda" and here):
        _measure(options.model, shape, device, settings, simulation)
    elif here:
        print("\nnot measured; --measure runs real steps")
    else:
        print("\nnot measured, because no GPU is here; --device cpu --measure takes the CPU")
    if budget is not None:
        print(
            f"\nfitted to {readable(budget)}: {plan.summary}\n"
            f"  backbones.set_memory(model, {saving!r}, {plan.stored_blocks}, keep={plan.keep!r})"
        )
    if options.plot:
        show_progress("counting what a byte buys")
        curves = frontier(simulation)
        show_progress("")
        plot(steps, title, budget, options.plot, curves)


def _check_plot(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: there is no such folder")
    backend = optional_import("matplotlib.backend_bases", "images", "--plot")
    formats = backend.FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UserError(f"--plot {path} should end in .png, or in one of .{', .'.join(formats)}")


def _simulate(
    name: str, shape: Shape, device: torch.device, autocast: torch.dtype | None
) -> Simulation:
    with torch.device("meta"):
        model, example = build(name), torch.empty(shape)
    return Simulation(model, example, device.type, autocast)


def _print_row(label: str, cells: Iterable[str]) -> None:
    print(f"{label:<16}" + "".join(f"{cell:>15}" for cell in cells))


def _measure(
    name: str, shape: Shape, device: torch.device, settings: Settings, simulation: Simulation
) -> None:
    """Print rows of what real steps say: the peak on a GPU, and the speed."""
    free = free_bytes(device)
    with device:
        trial = Trial(build(name), simulation.autocast)
    if device.type == "cuda":
        rows = []
        for setting in settings.values():
            counted = simulation.step(*setting).peak_bytes
            peak = trial.allocated_peak(shape, *setting) if counted <= free else None
            rows.append((readable(peak), f"{counted / peak - 1:+.1%}") if peak else ("-", "-"))
        allocated, errors = zip(*rows, strict=True)
        _print_row("allocated", allocated)
        _print_row("total is off by", errors)
    batch, *sample = shape
    while simulation.step("store").peak_bytes > _MEASURED_SHARE * free and batch > 1:
        batch //= 2
        simulation = _simulate(name, (batch, *sample), device, simulation.autocast)
    if simulation.step("store").peak_bytes > _MEASURED_SHARE * free:
        print(f"\nspeed not measured: of {readable(free)}, 'store' has no room for one sample")
        return
    others = {name: setting for name, setting in settings.items() if name != "store"}
    speeds = {"store": 1.0, **trial.relative_speeds((batch, *sample), others)}
    _print_row("speed, measured", (f"{speed:.2f}" for speed in speeds.values()))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    print(f"\nspeed measured on {where}, batch {batch}, median of {ROUNDS} rounds")


def _parse_shape(text: str) -> Shape:
    shape = tuple(map(int, re.findall(r"\d+", text)))
    # Above, torch cannot say how many bytes it would take.
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3,4}", text) or math.prod(shape) > 2**48:
        raise UserError(
            f"cannot read the input {text!r}: give BxCxHxW such as 8x3x224x224, "
            "or for clips BxCxTxHxW such as 4x3x16x224x224"
        )
    return shape
