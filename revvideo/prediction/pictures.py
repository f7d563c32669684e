"""Pictures of clips and of predictions: sheets and strips of frames, scores over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display on a training machine
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from revvideo.data.decode import Video

CURVES = 6  # classes in a plot over time: those with the highest peaks
Picture = np.ndarray  # uint8 (H, W, 3), RGB
Clip = Sequence[tuple[float, Picture]]  # pictures with their times in seconds


def some_frames(video: Video, count: int, short_side: int = 180) -> Clip:
    """``count`` frames, or all if they are fewer, from the first to the last.

    Larger ones are shrunk to ``short_side`` px.

    Raises:
        VideoError: one of them does not decode.
    """
    numbers = np.unique(np.linspace(0, len(video) - 1, count).round().astype(int)).tolist()
    pictures = video.frames(numbers, short_side).permute(0, 2, 3, 1).numpy()
    return [(video.timestamps[i], picture) for i, picture in zip(numbers, pictures, strict=True)]


def draw_sheet(rows: Mapping[str, Sequence[Clip]], title: str, output: Path) -> None:
    """Draw clips side by side in rows, with the times on top.

    Args:
        rows: the name of each row and its clips, as many and as long in each; all clips of a column
            have the same size and times.
        title: above all.
        output: the PNG to write.
    """
    first = next(iter(rows.values()))
    # A narrow empty column between clips.
    widths: list[float] = []
    for clip in first:
        widths += [*(picture.shape[1] / picture.shape[0] for _, picture in clip), 0.12]
    widths.pop()
    figure, axes = plt.subplots(
        *(len(rows), len(widths)),
        figsize=(1.0 * sum(widths) + 1.2, 1.05 * len(rows) + 0.4),
        width_ratios=widths,
        gridspec_kw={"wspace": 0.03, "hspace": 0.03},
        squeeze=False,
    )
    for row, (name, clips) in enumerate(rows.items()):
        line = axes[row]
        cells = iter(line)
        for number, clip in enumerate(clips):
            if number:
                next(cells).axis("off")
            for time, picture in clip:
                axis = next(cells)
                _show(axis, picture)
                if row == 0:
                    axis.set_title(f"{time:.1f} s", fontsize=8, pad=3)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    figure.suptitle(title, fontsize=10, y=0.96)
    figure.savefig(output, dpi=90, bbox_inches="tight")
    plt.close(figure)


def _show(axis: Axes, picture: Picture) -> None:
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def draw_strip(clip: Clip, best: Sequence[tuple[str, float]], output: Path) -> None:
    """Draw frames of a video with the best classes beside them.

    Args:
        clip: some frames.
        best: names of classes and their scores in [0, 1], the highest first.
        output: the PNG to write.
    """
    height, width = clip[0][1].shape[:2]
    widths = [*([width / height] * len(clip)), 0.05, 1.6]
    figure, axes = plt.subplots(
        *(1, len(widths)),
        figsize=(1.06 * sum(widths), 1.45),
        width_ratios=widths,
        gridspec_kw={"wspace": 0.03, "left": 0.01, "right": 0.99, "top": 0.72, "bottom": 0.02},
    )
    for axis, (time, picture) in zip(axes, clip, strict=False):
        _show(axis, picture)
        axis.set_title(f"{time:.1f} s", fontsize=7, pad=2)
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
    plt.close(figure)


def draw_curve(
    times: Sequence[float],
    scores: np.ndarray,
    classes: Sequence[str],
    clip: Clip,
    output: Path,
) -> None:
    """Plot the highest scores of a long video over time, with some of its frames above.

    Args:
        times: the middle of each window, in seconds, ascending.
        scores: (windows, classes) in [0, 1].
        classes: the names.
        clip: frames, evenly spread over the video, from the first to the last.
        output: the PNG to write.
    """
    drawn = np.argsort(-scores.max(axis=0), kind="stable")[:CURVES].tolist()
    colours = {label: f"C{rank}" for rank, label in enumerate(drawn)}
    begin, end = clip[0][0], clip[-1][0]
    edges = [begin, *((a + b) / 2 for a, b in pairwise(times)), end]
    figure = plt.figure(figsize=(11, 4.2))
    grid = figure.add_gridspec(
        *(2, len(clip)),
        height_ratios=(1, 3.2),
        left=0.06,
        right=0.8,
        top=0.93,
        bottom=0.11,
        wspace=0.04,
        hspace=0.06,
    )
    for column, (time, picture) in enumerate(clip):
        axis = figure.add_subplot(grid[0, column])
        _show(axis, picture)
        axis.set_title(f"{time:.1f} s", fontsize=8, pad=3)
    axis = figure.add_subplot(grid[1, :])
    for label in drawn:
        axis.plot(times, scores[:, label], color=colours[label], label=classes[label])
    for (left, right), label in zip(pairwise(edges), scores.argmax(axis=1).tolist(), strict=True):
        axis.axvspan(left, right, ymax=0.04, color=colours.get(label, "grey"), lw=0)
    axis.set(xlabel="seconds", ylabel="score", ylim=(-0.05, 1.02), xlim=(begin, end))
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    figure.savefig(output, dpi=110)
    plt.close(figure)
