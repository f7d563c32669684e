"""What a run leaves behind: results.json, pictures and curves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from backbones.common.files import write_json
from backbones.common.resuming import earlier_facts
from revdet.data.datasets import dataset_facts, dataset_names
from revdet.training.pictures import draw_curves, draw_predictions

logger = logging.getLogger("revdet")

Facts = dict[str, Any]  # as JSON has them


def finish(
    cfg: DictConfig, model: nn.Module, metrics: Facts, facts: Facts, *, trained: bool
) -> None:
    """Write results.json and the pictures, and say where they are; on the main process.

    What an earlier session wrote about its training is kept where this one has only evaluated.
    """
    if not comm.is_main_process():
        return
    output_dir = Path(cfg.train.output_dir)
    results = output_dir / "results.json"
    if not trained:
        facts = {**earlier_facts(results), **facts}
    write_json(results, {**metrics, "dataset": dataset_facts(cfg), "run": facts})

    name, mapper = dataset_names(cfg, evaluation_only=True)[0], cfg.dataloader.test.mapper
    records = DatasetCatalog.get(name)[: cfg.train.pictures]
    files = draw_predictions(model, records, instantiate(mapper), name, output_dir / "pictures")
    written = f"results.json, {len(files)} pictures in pictures/"
    if (output_dir / "metrics.json").exists():
        draw_curves(output_dir / "metrics.json", output_dir / "curves.png")
        written += ", curves.png"
    for task, scores in metrics.items():
        line = "  ".join(f"{key} {value:.2f}" for key, value in scores.items() if "-" not in key)
        logger.info(f"{task}: {line}")
    logger.info(f"{output_dir}: {written}")
