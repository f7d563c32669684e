"""What a run leaves behind: results.json, the predictions for each video, the curves."""

from __future__ import annotations

import csv
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backbones.common.files import replacing, write_json
from backbones.common.resuming import earlier_facts
from revvideo.models import TOP_K
from revvideo.training.module import VideoModule
from revvideo.training.pictures import draw_curves

logger = logging.getLogger("revvideo")

METRICS = "metrics.csv"


def write_results(module: VideoModule, facts: dict[str, Any], left_out: dict[str, str]) -> None:
    """Write and log what a test came to.

    ``facts`` are of the training, if this session has trained; ``left_out`` has the reason for each
    file that could not be used, by its path.
    """
    output_dir, test = Path(module.config.train.output_dir), module.config.test
    results = output_dir / "results.json"
    if not facts.get("seconds"):  # what an earlier session wrote about its training stands
        facts = {**facts, **earlier_facts(results)}
    views = {"clips": test.clips, "crops": test.crops}
    content = {"test": {**asdict(module.accuracy), **views}, "run": facts, "left_out": left_out}
    write_json(results, content)
    _write_predictions(output_dir / "predictions.csv", module)
    if (output_dir / METRICS).is_file():
        draw_curves(output_dir / METRICS, output_dir / "curves.png")
    if left_out:
        logger.warning("left out: %d files, named in %s", len(left_out), results)
    published = f"; published: {test.published_top1:.1f}" if test.published_top1 else ""
    logger.info("test: %s, %d x %d views%s", module.accuracy, test.clips, test.crops, published)
    logger.info("%s: %s", output_dir, ", ".join(sorted(path.name for path in output_dir.iterdir())))


def _write_predictions(path: Path, module: VideoModule) -> None:
    """One line for each tested video: its class, and the best classes with their scores."""
    (index, label, scores), names = module.predictions, module.data.classes
    records = module.data.val_records
    best, order = scores.topk(min(TOP_K, scores.shape[1]), dim=1)
    ranks = range(1, best.shape[1] + 1)
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = [f"{what}{rank}" for rank in ranks for what in ("top", "score")]
        writer.writerow(["path", "class", *head])
        for row, video in enumerate(index.tolist()):
            cells = [records[video].path, names[int(label[row])]]
            for name, score in zip(order[row].tolist(), best[row].tolist(), strict=True):
                cells += [names[name] if name < len(names) else str(name), f"{score:.7f}"]
            writer.writerow(cells)
