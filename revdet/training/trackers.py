"""Experiment trackers that a run reports to besides its own files: ``train.loggers``."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from detectron2.utils.events import EventWriter, TensorboardXWriter
from omegaconf import DictConfig

from revdet.training.metrics import ScalarWriter


def trackers(cfg: DictConfig, start_iter: int) -> list[EventWriter]:
    """The writers of ``train.loggers``; for the first process."""
    folder = Path(cfg.train.output_dir)
    made: dict[str, Callable[..., EventWriter]] = {"wandb": _wandb, "mlflow": _mlflow}
    made["tensorboard"] = partial(TensorboardXWriter, purge_step=start_iter)
    return [made[name](folder) for name in cfg.train.loggers]


def _wandb(folder: Path) -> ScalarWriter:
    import wandb

    run = wandb.init(project="revdet", name=folder.name, dir=str(folder), resume="allow")
    return ScalarWriter(lambda values, step: run.log(values, step=step), run.finish)


def _mlflow(folder: Path) -> ScalarWriter:
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    mlflow.set_experiment("revdet")
    mlflow.start_run(run_name=folder.name)
    return ScalarWriter(lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run)
