"""What a run looks like: predictions beside the ground truth, and the training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.evaluation import inference_context
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.figure import Figure
from torch import nn

from backbones.common.files import free_name
from revdet.training.metrics import read_metrics

matplotlib.rcParams["text.parse_math"] = False  # a class may be called $x_$

PANEL_HEIGHT = 480  # px; small images are enlarged so that labels are legible
PANEL_WIDTH = 860  # at most: two of them and the margins stay below 2000 px
SHOWN_SCORE = 0.5  # predictions below it are not drawn
SMOOTHED = 7  # logged losses averaged in the plot: each is of one batch, which may hold no object


def draw_predictions(
    model: nn.Module, records: Sequence[dict[str, Any]], mapper: Any, dataset: str, output_dir: Path
) -> set[Path]:
    """Draw ground truth and predictions side by side, for each image a PNG of its name.

    Images of one name in two folders get two. ``records`` are the images, as Detectron2's dataset
    dictionaries, ``mapper`` is the recipe's for tests, ``dataset`` that of the class names.
    """
    metadata = MetadataCatalog.get(dataset)
    files: set[Path] = set()
    for record in records:
        image = utils.read_image(record["file_name"], format="RGB")
        with inference_context(model), torch.no_grad():
            found = model([mapper(record)])[0]["instances"].to("cpu")
        scale = min(PANEL_HEIGHT / image.shape[0], PANEL_WIDTH / image.shape[1])
        look = image, metadata, scale, ColorMode.SEGMENTATION
        truth = Visualizer(*look).draw_dataset_dict(record)
        guess = Visualizer(*look).draw_instance_predictions(found[found.scores >= SHOWN_SCORE])
        file = free_name(output_dir, Path(record["file_name"]), ".png", files)
        _side_by_side([truth.get_image(), guess.get_image()], file)
    return files


def _side_by_side(panels: Sequence[np.ndarray], file: Path) -> None:
    titles = "ground truth", f"predictions (score ≥ {SHOWN_SCORE:g})"
    height, width = panels[0].shape[:2]
    figure = Figure(figsize=(2 * width / 90, height / 90))  # not of pyplot: it may want a display
    for axis, title, panel in zip(figure.subplots(1, 2), titles, panels, strict=True):
        axis.imshow(panel)
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.savefig(file, dpi=100, bbox_inches="tight")


def draw_curves(metrics_file: Path, output: Path) -> None:
    """Plot losses, learning rate and evaluations of a ``metrics.json`` into a PNG."""
    lines = read_metrics(metrics_file)
    if not lines:
        return
    figure = Figure(figsize=(15, 4.2))
    losses, rates, scores = figure.subplots(1, 3)
    names = {key for line in lines for key in line if "loss" in key}
    half = SMOOTHED // 2
    for name in sorted(names, key=lambda name: (name != "total_loss", name)):
        iterations, values = _series(lines, name)
        around = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
        width = 2.2 if name == "total_loss" else 1.0
        losses.plot(iterations, [*map(np.mean, around)], label=name, linewidth=width)
    losses.set(title=f"losses (mean of {SMOOTHED} logged values)", xlabel="iteration", yscale="log")
    losses.legend(fontsize=8)
    rates.plot(*_series(lines, "lr"))
    rates.set(title="learning rate", xlabel="iteration")
    for name in ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"):
        if any(name in line for line in lines):
            scores.plot(*_series(lines, name), marker="o", label=name)
            scores.legend(fontsize=8)
    scores.set(title="validation", xlabel="iteration", ylabel="COCO points", ylim=(0, 100))
    for axis in (losses, rates, scores):
        axis.grid(alpha=0.3)
        axis.set_xlim(0, 1.03 * (lines[-1]["iteration"] + 1))
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def _series(lines: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(line["iteration"], line[name]) for line in lines if name in line]
    return [x for x, _ in points], [y for _, y in points]
