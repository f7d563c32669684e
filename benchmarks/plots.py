"""The pictures of `docs/benchmarks.md`, drawn from the checked-in results.

`python -m benchmarks.report` draws all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measuring import ROOT, Json

IMAGES = ROOT / "docs" / "images"
INK = "#333333"
COLOURS = {
    "store": "#8a8a8a",
    "checkpoint": "#3b7dd8",
    "selective checkpoint": "#1f9e89",
    "reversible, half stored": "#e08a1e",
    "reversible": "#c2185b",
    "fp32": "#c2185b",
    "bf16": "#3b7dd8",
    "fp16": "#e08a1e",
    "plain": "#8a8a8a",
    "rewired": "#c2185b",
    "from scratch": "#3b7dd8",
}


@contextmanager
def _axes(path: Path, title: str, subtitle: str, x: str, height: float = 4.0) -> Any:
    """Axes in the style of all pictures, saved at the end."""
    figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
    yield axes
    axes.set_xlabel(x, color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=24)
    place = {"transform": axes.transAxes, "color": "#777777", "fontsize": 9.5}
    axes.text(0.0, 1.0 + 0.14 / height, subtitle, **place)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _line(axes: Any, name: str, x: Sequence[float], y: Sequence[float], label: str) -> None:
    """A line with its label at its end, in the margin."""
    bold = name == "reversible"
    colour = COLOURS[name]
    axes.plot(x, y, color=colour, linewidth=3.0 if bold else 2.0, marker="o", markersize=5)
    weight = "bold" if bold else "normal"
    place: dict[str, Any] = {
        "textcoords": "offset points",
        "va": "center",
        "annotation_clip": False,
    }
    axes.annotate(label, (x[-1], y[-1]), (10, 0), color=colour, fontweight=weight, **place)


def memory_depth(results: Json) -> None:
    """Bytes held against the number of blocks."""
    part = results["depths"]
    subtitle = f"{results['model']}, {results['img_size']} px, {results['precision']}"
    title = "Activations held for the backward pass (MB per image)"
    with _axes(IMAGES / "memory_depth.png", title, subtitle, "depth (blocks)") as axes:
        for name, held in part["held"].items():
            values = [value / part["batch"] / 1e6 for value in held]
            digits = 0 if values[-1] >= 10 else 1
            _line(axes, name, part["depth"], values, f"{name}, {values[-1]:.{digits}f} MB")
        axes.set_xlim(0, part["depth"][-1])
        axes.set_ylim(0)
        axes.set_xticks([0, *part["depth"]])


def memory_batch(results: Json) -> None:
    """Bytes held against the batch."""
    part = results["batches"]
    subtitle = f"{results['model']}, {part['depth']} blocks, {results['img_size']} px"
    title = "Activations held for the backward pass (GB)"
    with _axes(IMAGES / "memory_batch.png", title, subtitle, "batch (images)") as axes:
        for name, held in part["held"].items():
            values = [value / 1e9 for value in held]
            _line(axes, name, part["batch"], values, f"{name}, {values[-1]:.2f} GB")
        axes.set_xlim(0, part["batch"][-1])
        axes.set_ylim(0)
        axes.set_xticks([0, *part["batch"][1:]])


def mixture(contestants: Json, subtitle: str, name: str = "mixture") -> None:
    """Throughput against memory, from all blocks reversed to all stored.

    Args:
        contestants: of which those with ``stored_blocks`` are drawn.
        subtitle: what was measured where.
        name: of the picture.
    """
    points = sorted(
        (values for values in contestants.values() if "stored_blocks" in values),
        key=lambda values: values["stored_blocks"],
    )
    held = "held" in points[0]
    label = "activations held (MB)" if held else "peak of the activations (MB)"
    title = "Throughput of the mixtures, relative to all blocks stored"
    with _axes(IMAGES / f"{name}.png", title, f"{subtitle}; bars: quartiles", label) as axes:
        x = [values["held" if held else "peak"] / 1e6 for values in points]
        y = [values["throughput"] for values in points]
        bars = [
            [y - values["quartiles"][0] for y, values in zip(y, points, strict=True)],
            [values["quartiles"][1] - y for y, values in zip(y, points, strict=True)],
        ]
        axes.errorbar(x, y, bars, color=COLOURS["reversible"], linewidth=2.5, marker="o", capsize=3)
        for *place, values in zip(x, y, points, strict=True):
            text = f"{values['stored_blocks']} stored"
            axes.annotate(text, place, (6, -14), textcoords="offset points", color=INK)
        axes.set_xlim(0, 1.12 * x[-1])


def curves(
    lines: Mapping[str, Sequence[Sequence[float]]], name: str, title: str, subtitle: str, x: str
) -> None:
    """Lines of (x, y), each with its name at its end."""
    with _axes(IMAGES / f"{name}.png", title, subtitle, x) as axes:
        for label, points in lines.items():
            if points:
                _line(axes, label, *zip(*points, strict=True), label)
        axes.set_xlim(0)
        axes.set_ylim(0)


def drift(results: Json, name: str = "drift") -> None:
    """Gradient error against depth."""
    title = "Relative error of the gradients against stored activations"
    subtitle = f"{results['model']}, the block that is off most"
    with _axes(IMAGES / f"{name}.png", title, subtitle, "depth (blocks)") as axes:
        for precision, errors in results["drift"].items():
            _line(axes, precision, results["depths"], errors["gradient"], precision)
        axes.set_yscale("log")
        axes.set_xticks([0, *results["depths"]])


def recipes(results: Json) -> None:
    """Training memory of each recipe, as bars."""
    found: Mapping[str, Any] = results["recipes"]
    names = list(found)[::-1]
    policies = ("store", "checkpoint", "reversible")
    title = "Memory of each image or clip (GB)"
    path = IMAGES / "recipes.png"
    with _axes(path, title, results["precision"], "GB", height=0.6 * len(names) + 1) as axes:
        for row, name in enumerate(names):
            present = [policy for policy in policies if policy in found[name]["policies"]]
            for number, policy in enumerate(present):
                value = found[name]["policies"][policy]["per_image"] / 1e9
                place = row + 0.27 * (1 - number)
                axes.barh(place, value, 0.25, color=COLOURS[policy])
                axes.text(value, place, f" {value:.2f}", va="center", fontsize=7.5, color=INK)
        axes.set_yticks(range(len(names)), [name.split("/", 1)[1] for name in names], fontsize=8.5)
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[policy]) for policy in policies]
        axes.legend(handles, policies, frameon=False, loc="lower right", labelcolor=INK)
        axes.grid(visible=False)


def rewire(results: Json) -> None:
    """Accuracy of a plain net that goes on, and of reversible ones, over the steps."""
    title = "Test accuracy (%)"
    subtitle = (
        f"12 blocks, {results['photographs']} photographs; mean of {len(results['seeds'])} seeds, "
        "each of them thin"
    )
    with _axes(IMAGES / "rewire.png", title, subtitle, "steps") as axes:
        for name in ("plain", "rewired", "from scratch"):
            runs = [found[name] for found in results["seeds"]]
            steps = [step for step, _ in runs[0]]
            for run in runs:
                axes.plot(steps, [y for _, y in run], color=COLOURS[name], linewidth=0.8, alpha=0.5)
            means = [sum(run[i][1] for run in runs) / len(runs) for i in range(len(steps))]
            label = f"{name}: {means[-1]:.1f} %, {results['held'][name] / 1e6:.1f} MB held"
            axes.plot(steps, means, color=COLOURS[name], linewidth=2.5, marker="o", label=label)
        axes.legend(frameon=False, loc="lower right", labelcolor="linecolor")
        axes.set_xlim(0, steps[-1])
        axes.set_ylim(0)
