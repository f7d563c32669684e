"""What a run leaves behind: results.json, the predictions for each video, the curves."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from backbones.common.files import replacing
from revvideo.config import Config
from revvideo.data.videos import VideoData
from revvideo.training.curves import draw_curves
from revvideo.training.metrics import TOP_K
from revvideo.training.module import VideoModule

logger = logging.getLogger("revvideo")

METRICS = "metrics.csv"
PREDICTIONS = "predictions.csv"
RESULTS = "results.json"


def write_results(
    config: Config,
    data: VideoData,
    module: VideoModule,
    facts: dict[str, Any],
    left_out: dict[str, str],
) -> None:
    """Write and log what a test came to.

    Args:
        config: of the run.
        data: what was tested on.
        module: after the test.
        facts: of the training; empty if this session has not trained.
        left_out: the reason for each file that could not be used, by its path.
    """
    output_dir, test = Path(config.train.output_dir), config.test
    output_dir.mkdir(parents=True, exist_ok=True)
    results = output_dir / RESULTS
    if not facts.get("seconds") and results.is_file():
        # This session has not trained: what an earlier one wrote about its training stands.
        facts = {**facts, **json.loads(results.read_text()).get("run", {})}
    views = {"clips": test.clips, "crops": test.crops}
    content = {"test": {**asdict(module.accuracy), **views}, "run": facts, "left_out": left_out}
    with replacing(results) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
    _write_predictions(output_dir / PREDICTIONS, data, module)
    if (output_dir / METRICS).is_file():
        draw_curves(output_dir / METRICS, output_dir / "curves.png")
    if left_out:
        logger.warning("left out: %d files, named in %s", len(left_out), results)
    published = f"; published: {test.published_top1:.1f}" if test.published_top1 else ""
    logger.info("test: %s, %d x %d views%s", module.accuracy, test.clips, test.crops, published)
    logger.info("%s: %s", output_dir, ", ".join(sorted(path.name for path in output_dir.iterdir())))


def _write_predictions(path: Path, data: VideoData, module: VideoModule) -> None:
    """One line for each tested video: its class, and the best classes with their scores."""
    index, label, scores = (values.cpu() for values in module.predictions)
    best, order = scores.topk(min(TOP_K, scores.shape[1]), dim=1)
    names = data.classes
    ranks = range(1, best.shape[1] + 1)
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["path", "class", *(f"{what}{k}" for k in ranks for what in ("top", "score"))]
        )
        for row, video in enumerate(index.tolist()):
            cells = [data.val_records[video].path, names[int(label[row])]]
            for name, score in zip(order[row].tolist(), best[row].tolist(), strict=True):
                cells += [names[name] if name < len(names) else str(name), f"{score:.7f}"]
            writer.writerow(cells)


def gathered(problems: dict[str, str]) -> dict[str, str]:
    """Those of all processes."""
    if not torch.distributed.is_initialized():
        return problems
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, problems)
    return {path: reason for part in parts for path, reason in part.items()}
