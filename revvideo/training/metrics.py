"""``metrics.csv``: a line for each logged step, written at once, and none of them twice."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from backbones.common.files import cut_lines, replacing

_STEP = "step"  # the first column


class MetricsLogger(Logger):
    """Appends to the file of the sessions before, which Lightning's own logger deletes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Nothing: the run has a config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line; one with a new column adds it to the lines before."""
        row = {_STEP: float(step or 0), **metrics}
        if not self._columns and self._path.is_file():
            with self._path.open() as file:
                self._columns = next(csv.reader(file))
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            before = read_metrics(self._path)
            with replacing(self._path) as partial, partial.open("w") as file:
                file.write(",".join(self._columns) + "\n")
                self._write(file, before)
        with self._path.open("a") as file:
            self._write(file, [row])

    def _write(self, file: TextIO, rows: Iterable[Mapping[str, float]]) -> None:
        writer = csv.DictWriter(file, self._columns, lineterminator="\n")
        writer.writerows({key: f"{value:.9g}" for key, value in row.items()} for row in rows)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.csv``, each with what it holds; none where there is no file."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    # A kill may have cut the last one off; its step comes after the last checkpoint.
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def cut_metrics(path: Path, step: int) -> None:
    """Drop what an interrupted session has logged from ``step`` on: it will be logged again."""
    cut_lines(path, lambda line: line.startswith(_STEP) or float(line.partition(",")[0]) < step)


def trackers(names: Sequence[str], output_dir: Path, start_step: int) -> list[Logger]:
    """Lightning's loggers of ``train.loggers``."""
    name, database = output_dir.name, f"sqlite:///{output_dir.absolute() / 'mlflow.db'}"
    made: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(
            output_dir, name="tensorboard", version="", purge_step=start_step or None
        ),
        "wandb": lambda: WandbLogger(
            name=name, save_dir=output_dir, project="revvideo", resume="allow"
        ),
        "mlflow": lambda: MLFlowLogger(
            experiment_name="revvideo",
            run_name=name,
            run_id=os.environ.get("MLFLOW_RUN_ID"),
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", database),
        ),
    }
    return [made[name]() for name in names]
