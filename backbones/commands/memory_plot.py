"""The picture of ``python -m backbones memory``: where the bytes go, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backbones.memory.budget import readable
from backbones.memory.frontier import keeps_by_worth
from backbones.memory.simulation import Simulation, StepMemory

Curves = dict[str, list[tuple[int, float]]]  # peaks in bytes, and speeds beside "store"

_POINTS = 10  # of a curve


def frontier(simulation: Simulation) -> Curves:
    """Peak and speed by operation count of what ``fit_memory`` chooses from, and of what else
    there is: whole blocks stored, checkpointed blocks, and these with their products kept (torch's
    selective checkpointing)."""
    policy, blocks = simulation.saving_policy, simulation.blocks
    fastest = simulation.step("store").operations

    def point(*setting: Any) -> tuple[int, float]:
        step = simulation.step(*setting)
        return step.peak_bytes, fastest / step.operations

    keeps = keeps_by_worth(simulation)
    some = sorted({round(i * (len(keeps) - 1) / _POINTS) for i in range(_POINTS + 1)})
    counts = sorted({round(i * blocks / _POINTS) for i in range(_POINTS + 1)})
    return {
        "products kept": [point(policy, 0, keeps[i]) for i in some],
        "whole blocks stored": [point(policy, count, ()) for count in counts],
        "checkpoint": [point("checkpoint", 0, ())],
        "selective checkpoint": [point("checkpoint", 0, keeps[-1])],
        "store": [point("store", 0, ())],
    }


def plot(
    steps: Mapping[str, StepMemory], title: str, budget: int | None, path: str, curves: Curves
) -> None:
    """Write a picture of training steps, by the names of their policies, ``"store"`` among them:
    the parts of each peak, the bytes over each step, and, as :func:`frontier` has counted, what
    speed can be had for which bytes. The suffix of ``path`` decides the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17.0, 4.8), layout="constrained")
    of_parts, of_time, of_speed = figure.subplots(1, 3)
    of_time.sharey(of_parts)
    for axes in (of_parts, of_time):
        axes.spines[["top", "right"]].set_visible(False)
        if budget is not None:
            axes.axhline(budget / 1e9, color="black", linestyle="--", linewidth=1, label="budget")
    _draw_parts(of_parts, steps)
    _draw_time(of_time, steps)
    _draw_curves(of_speed, curves, budget)
    figure.suptitle(f"Memory of a training step: {title}")
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Any, curves: Curves, budget: int | None) -> None:
    for name, points in curves.items():
        size, speed = zip(*points, strict=True)
        axes.plot([x / 1e9 for x in size], speed, "o-" if len(points) > 1 else "D", label=name)
    if budget is not None:
        axes.axvline(budget / 1e9, color="black", linestyle="--", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="GB at the peak", ylabel='speed, "store" being 1, by operation count')
    axes.set_title("what a byte buys", loc="left")
    axes.legend(frameon=False, fontsize=8)


def _draw_parts(axes: Any, steps: Mapping[str, StepMemory]) -> None:
    """A bar for each policy: grey what is there under all, one hue from the stem to the head."""
    from matplotlib import colormaps

    first = steps["store"]
    greys = iter(colormaps["Greys"]([0.65, 0.5, 0.35, 0.2]))
    hues = iter(colormaps["viridis"]([i / (len(first.held) - 1) for i in range(len(first.held))]))
    styles: dict[str, dict[str, Any]] = {
        part: {"color": next(hues if part in first.held else greys)}
        for part in first.peak
        if part != "working set"
    }
    styles["working set"] = {"color": "white", "hatch": "////"}
    bottoms = [0.0] * len(steps)
    for part, style in styles.items():
        heights = [step.peak[part] / 1e9 for step in steps.values()]
        style |= {"edgecolor": "black", "linewidth": 0.4, "label": part}
        axes.bar(list(steps), heights, 0.7, bottoms, **style)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for name, step in steps.items():
        place = {"textcoords": "offset points", "ha": "center"}
        top = (name, step.peak_bytes / 1e9)
        text = axes.annotate(readable(step.peak_bytes), top, (0, 3), **place)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_ylabel("GB")
    axes.set_title("at the peak", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    # From the top down, as the bars are, and beside them.
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _draw_time(axes: Any, steps: Mapping[str, StepMemory]) -> None:
    """The bytes alive against the work done, so that a longer line is a slower step."""
    whole = steps["store"].operations
    for name, step in steps.items():
        work = [operations / whole for operations, _ in step.timeline]
        axes.plot(work, [size / 1e9 for _, size in step.timeline], label=name, linewidth=1.3)
    axes.set_xlabel("operations so far, 1 being a whole step under 'store'")
    axes.set_title("over the step", loc="left")
    axes.legend(frameon=False)
