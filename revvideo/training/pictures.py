"""What a run looks like: its curves."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from revvideo.training.metrics import read_metrics

# Titles, the columns of metrics.csv, and what these are multiplied by.
_PANELS: tuple[tuple[str, list[str], int], ...] = (
    ("training loss", ["train/loss"], 1),
    ("validation, top-1 and top-5 (%)", ["val/top1", "val/top5"], 1),
    ("learning rate", ["lr"], 1),
    ("waiting for data (%)", ["train/data_wait"], 100),
)


def draw_curves(metrics: Path, output: Path) -> None:
    """Plot loss, accuracy, learning rate, and time spent waiting for data over the steps."""
    rows = read_metrics(metrics)
    figure = Figure(figsize=(18, 3.8))  # not of pyplot, which may want a display
    axes = figure.subplots(1, len(_PANELS))
    for axis, (title, names, scale) in zip(axes, _PANELS, strict=True):
        for name in names:
            steps = [row["step"] for row in rows if name in row]
            values = [scale * row[name] for row in rows if name in row]
            marker = "o" if name.startswith("val/") else None
            axis.plot(steps, values, marker=marker, markersize=3, label=name)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if "%" in title:
            axis.set_ylim(0, 100)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
