"""Experiment trackers that a run reports to besides its own files: ``train.loggers``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, TensorboardXWriter
from omegaconf import DictConfig

from revdet.training.metrics import NewScalars


class TrackerWriter(EventWriter):
    """Hand the scalars of each iteration, and its number, to a tracker; ``close`` ends its run."""

    def __init__(
        self, log: Callable[[dict[str, float], int], Any], close: Callable[[], Any]
    ) -> None:
        self._log, self.close = log, close
        self._new = NewScalars()

    def write(self) -> None:
        """Hand on what has been put into the event storage since the last call."""
        for iteration, values in self._new().items():
            self._log(values, iteration)


def trackers(cfg: DictConfig, start_iter: int) -> list[EventWriter]:
    """The writers of ``train.loggers``; for the first process."""
    folder = Path(cfg.train.output_dir)
    made: dict[str, Callable[[], EventWriter]] = {
        "tensorboard": lambda: TensorboardXWriter(str(folder), purge_step=start_iter),
        "wandb": lambda: _wandb(folder),
        "mlflow": lambda: _mlflow(folder),
    }
    return [made[name]() for name in cfg.train.loggers]


def _wandb(folder: Path) -> TrackerWriter:
    import wandb

    run = wandb.init(project="revdet", name=folder.name, dir=str(folder), resume="allow")
    return TrackerWriter(lambda values, step: run.log(values, step=step), run.finish)


def _mlflow(folder: Path) -> TrackerWriter:
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    mlflow.set_experiment("revdet")
    mlflow.start_run(run_name=folder.name)
    return TrackerWriter(lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run)
