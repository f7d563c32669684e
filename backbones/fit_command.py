"""``python -m backbones.memory``: where the bytes go, as a table and as a picture."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch
from torch import nn

from backbones.fit import largest_that_fits, parse_budget, readable
from backbones.memory import MemoryPolicy, set_memory
from backbones.simulate import PARTS, Simulation


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m backbones.memory``: where the bytes of a training step go, as a table."""
    parser = argparse.ArgumentParser(
        prog="python -m backbones.memory",
        description="Shows where the memory of a training step (forward, backward, AdamW; in "
        "float32) goes under each memory policy, at the moment of its peak. Needs no GPU and no "
        "weights: a step on shape-only tensors is counted.",
        epilog="example: python -m backbones.memory --model rev_vit_base --input 64x3x224x224 "
        "--budget 8GB\n'store' keeps all activations, 'checkpoint' the input of each block, "
        "'reversible' rebuilds them.\nA budget adds the mixture that backbones.fit_memory chooses: "
        "as many of the last blocks\nstored as fit. 'speed' is that of 'store' by operation count; "
        "'working set' is what the\nbackward pass and the optimizer need for the moment.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a name of backbones.list_models()")
    parser.add_argument(
        "--input", required=True, help="BxCxHxW, for clips BxCxTxHxW, such as 8x3x224x224"
    )
    parser.add_argument("--budget", help="such as 8GB, 800MB or 8GiB; auto: what the GPU has free")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where the training would run (default: %(default)s, which need not be there)",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="write a picture of the table")
    options = parser.parse_args(arguments)
    try:
        _report(options)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")


def _report(options: argparse.Namespace) -> None:
    from backbones.models import create_model

    device = torch.device(options.device)
    budget = None if options.budget is None else parse_budget(options.budget, device)
    shape = _parse_shape(options.input)
    with torch.device("meta"):
        model = create_model(options.model)
        simulation = Simulation(model, torch.empty(shape), device.type)
    policies: list[MemoryPolicy] = ["store", "checkpoint"]
    if simulation.saving_policy == "reversible":
        policies.append("reversible")
    columns = {str(policy): simulation.parts(policy, 0) for policy in policies}
    plans = {"store": 1.0, "checkpoint": 0.75, "reversible": 0.75}
    policy, stored = simulation.saving_policy, 0
    if budget is not None:
        plan = largest_that_fits(simulation, budget)
        policy, stored = plan.policy, plan.stored_blocks
        title = f"{policy}+{stored}"
        columns[title] = plan.parts
        plans[title] = plan.relative_speed

    print(f"{options.model}, input {options.input}: peak of a training step with AdamW, float32\n")
    print(f"{'':<16}" + "".join(f"{title:>15}" for title in columns))
    for name in PARTS:
        row = (readable(parts[name]) for parts in columns.values())
        print(f"{name:<16}" + "".join(f"{cell:>15}" for cell in row))
    totals = (readable(sum(parts.values())) for parts in columns.values())
    print(f"{'total':<16}" + "".join(f"{cell:>15}" for cell in totals))
    print(f"{'speed':<16}" + "".join(f"{plans[title]:>15.2f}" for title in columns))
    if budget is not None:
        print(
            f"\nwithin {readable(budget)}: {policy}, the last {stored} of {simulation.blocks} "
            f"blocks stored\n  backbones.set_memory(model, {policy!r}, stored_blocks={stored})"
        )
    if options.plot:
        _plot(columns, f"{options.model}, {options.input}", budget, options.plot)
    if device.type == "cuda" and torch.cuda.is_available():
        predicted = sum(simulation.parts(policy, stored).values())
        model = create_model(options.model)
        set_memory(model, policy, stored)
        measured = _allocator_peak(model, shape)
        print(
            f"check on the GPU ({policy}, {stored} stored): predicted {readable(predicted)}, "
            f"allocated {readable(measured)} ({predicted / measured - 1:+.1%})"
        )


def _parse_shape(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3,4}", text):
        raise ValueError(
            f"cannot read the input {text!r}: give BxCxHxW such as 8x3x224x224, "
            "or for clips BxCxTxHxW such as 4x3x16x224x224"
        )
    return [int(side) for side in text.split("x")]


def _allocator_peak(model: nn.Module, shape: Sequence[int]) -> int:
    """Peak of the second training step on the GPU, in bytes, as torch's allocator counts it."""
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(*shape, device="cuda")
    for _ in range(2):  # the first step makes the state of the optimizer
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.backward(model(images).square().sum())
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def _plot(columns: dict[str, dict[str, int]], title: str, budget: int | None, path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(1.6 + 1.4 * len(columns), 4.0), layout="constrained")
    axes = figure.add_subplot()
    bottoms = [0.0] * len(columns)
    for name in PARTS:
        heights = [parts[name] / 1e9 for parts in columns.values()]
        axes.bar(list(columns), heights, bottom=bottoms, label=name, width=0.6)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    if budget is not None:
        axes.axhline(budget / 1e9, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set_ylabel("GB at the peak of a training step")
    axes.set_title(title)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
