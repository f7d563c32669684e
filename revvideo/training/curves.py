"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from revvideo.training.callbacks import read_metrics

matplotlib.use("Agg")  # no display on a training machine
import matplotlib.pyplot as plt


def draw_curves(metrics: Path, output: Path) -> None:
    """Plot loss, learning rate, time spent waiting for data, and accuracy over the steps.

    Args:
        metrics: the ``metrics.csv`` of a run.
        output: the PNG to write.
    """
    rows = read_metrics(metrics)
    figure, axes = plt.subplots(1, 4, figsize=(18, 3.8))
    for axis, title, names in zip(
        axes,
        (
            "training loss",
            "validation, top-1 and top-5 (%)",
            "learning rate",
            "waiting for data (%)",
        ),
        (["train/loss"], ["val/top1", "val/top5"], ["lr"], ["train/data_wait"]),
        strict=True,
    ):
        for name in names:
            steps, values = _series(rows, name)
            scale = 100 if name == "train/data_wait" else 1
            marker = "o" if name.startswith("val/") else None
            axis.plot(steps, [scale * v for v in values], marker=marker, markersize=3, label=name)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[1].set_ylim(0, 100)
    axes[1].legend(fontsize=8)
    axes[3].set_ylim(0, 100)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _series(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [x for x, _ in points], [y for _, y in points]
