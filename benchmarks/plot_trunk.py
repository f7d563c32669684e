"""Draw memory against depth from a JSON file of `benchmarks.bench_trunk`.

python -m benchmarks.plot_trunk benchmarks/results/trunk_<device name>.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.bench_trunk import PLOT

COLOURS = {
    "store": "#8a8a8a",
    "reversible, half stored": "#e08a1e",
    "checkpoint": "#3b7dd8",
    "reversible": "#c2185b",
}
LABELS = {
    "store": "stored",
    "reversible, half stored": "reversible,\nlast half stored",
    "checkpoint": "checkpointed",
    "reversible": "reversible",
}
INK = "#333333"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw one line per policy, labelled at its end, and write the picture to ``path``.

    Args:
        results: what `benchmarks.bench_trunk` writes, parsed.
        path: a PNG, SVG or PDF file; its folder is made.
    """
    depths = results["memory"]["depths"]
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    for name, held in results["memory"]["held"].items():
        megabytes = [value / 1e6 for value in held]
        axes.plot(
            depths,
            megabytes,
            color=COLOURS[name],
            linewidth=3.0 if name == "reversible" else 2.0,
            marker="o",
            markersize=5,
            clip_on=False,
        )
        axes.annotate(
            f"{LABELS[name]}, {megabytes[-1]:.{0 if megabytes[-1] >= 10 else 1}f} MB",
            (depths[-1], megabytes[-1]),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[name],
            fontweight="bold" if name == "reversible" else "normal",
            annotation_clip=False,
        )
    axes.set_xlim(0, depths[-1])
    axes.set_ylim(0)
    axes.set_xticks([0, *depths])
    axes.set_xlabel("depth (blocks)", color=INK)
    axes.set_title(
        "Activations held for the backward pass (MB per image)",
        loc="left",
        color=INK,
        fontsize=12,
        fontweight="bold",
        pad=24,
    )
    axes.text(
        0.0,
        1.035,
        f"{results['model']} width {results['embed_dim']}, {results['img_size']} px, "
        f"{results['precision']}",
        transform=axes.transAxes,
        color="#777777",
        fontsize=9.5,
    )
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot_trunk", description="Plot results of bench_trunk."
    )
    parser.add_argument("results", type=Path, help="JSON file written by bench_trunk")
    parser.add_argument("--output", type=Path, default=PLOT, help="picture to write")
    args = parser.parse_args(argv)
    plot(json.loads(args.results.read_text()), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
