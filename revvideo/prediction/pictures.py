"""Pictures of predictions: strips of frames, scores over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from revvideo.data.decode import Video
from revvideo.prediction.predictor import Windows

matplotlib.rcParams["text.parse_math"] = False  # a `$` in the name of a class starts no formula

CURVES = 6  # classes in a plot over time: those with the highest peaks
Picture = np.ndarray  # uint8 (H, W, 3), RGB
Clip = Sequence[tuple[float, Picture]]  # pictures with their times in seconds


def some_frames(video: Video, count: int, short_side: int = 180) -> Clip:
    """``count`` frames (or all) of a whole video, shrunk to ``short_side``; else a VideoError."""
    numbers = np.unique(np.linspace(0, len(video) - 1, count).round().astype(int)).tolist()
    pictures = video.frames(numbers, short_side).permute(0, 2, 3, 1).numpy()
    return [(video.timestamps[i], picture) for i, picture in zip(numbers, pictures, strict=True)]


def _show(axis: Axes, time: float, picture: Picture) -> None:
    axis.imshow(picture)
    axis.set_title(f"{time:.1f} s", fontsize=7, pad=2)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def draw_strip(clip: Clip, best: Sequence[tuple[str, float]], output: Path) -> None:
    """Draw frames of a video beside its best classes and their scores in [0, 1], as a PNG."""
    height, width = clip[0][1].shape[:2]
    shape = min(max(width / height, 0.3), 3.0)  # of a frame in the picture, however long it is
    widths = [*([shape] * len(clip)), 0.05, 1.6]
    figure = Figure(figsize=(1.06 * sum(widths), 1.45))
    margins = {"wspace": 0.03, "left": 0.01, "right": 0.99, "top": 0.72, "bottom": 0.02}
    axes = figure.subplots(1, len(widths), width_ratios=widths, gridspec_kw=margins)
    for axis, frame in zip(axes, clip, strict=False):
        _show(axis, *frame)
    axes[-2].axis("off")
    bars = axes[-1]
    places = range(len(best))
    bars.barh(places, [score for _, score in best], color="#9ecae1", height=0.8)
    for place, (name, score) in zip(places, best, strict=True):
        bars.text(0.02, place, f"{100 * score:.0f}%  {name}", va="center", fontsize=7)
    bars.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5))
    bars.axis("off")
    name, score = best[0]
    figure.suptitle(f"{name}  {100 * score:.0f}%", x=0.01, y=0.98, ha="left", fontsize=11)
    figure.savefig(output, dpi=110)


def draw_curve(windows: Windows, classes: Sequence[str], clip: Clip, output: Path) -> None:
    """Plot the highest scores of a long video over time, below frames from all of it, as a PNG."""
    times = [(start + end) / 2 for start, end in zip(windows.starts, windows.ends, strict=True)]
    scores = windows.scores.numpy()
    drawn = np.argsort(-scores.max(axis=0), kind="stable")[:CURVES].tolist()
    colours = {label: f"C{rank}" for rank, label in enumerate(drawn)}
    begin, end = clip[0][0], clip[-1][0]
    edges = [begin, *((a + b) / 2 for a, b in pairwise(times)), end]
    figure = Figure(figsize=(11, 4.2))
    margins: dict[str, Any] = {"left": 0.06, "right": 0.8, "top": 0.93, "bottom": 0.11}
    spaces = {"height_ratios": (1, 3.2), "wspace": 0.04, "hspace": 0.06}
    grid = figure.add_gridspec(2, len(clip), **spaces, **margins)
    for column, frame in enumerate(clip):
        _show(figure.add_subplot(grid[0, column]), *frame)
    axis = figure.add_subplot(grid[1, :])
    for label in drawn:
        axis.plot(times, scores[:, label], color=colours[label], label=classes[label])
    # Along the bottom, the colour of the best class.
    for (left, right), label in zip(pairwise(edges), scores.argmax(axis=1).tolist(), strict=True):
        axis.axvspan(left, right, ymax=0.04, color=colours.get(label, "grey"), lw=0)
    axis.set(xlabel="seconds", ylabel="score", ylim=(-0.05, 1.02), xlim=(begin, end))
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    figure.savefig(output, dpi=110)
