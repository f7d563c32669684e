"""What happens around the steps of training: lines in the log, metrics.csv, checkpoints."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from backbones.common.errors import UserError
from backbones.common.files import replacing
from revvideo.training.module import VideoModule

logger = logging.getLogger("revvideo")


class StepLog(pl.Callback):
    """Logs the learning rate and how long training waits for data, and a line for each epoch.

    Times are those of the first process. A loss that is no number any more ends the run before it
    gets into a checkpoint.

    Args:
        log_every: steps between two looks at the loss.

    Attributes:
        seconds, waited, clips: spent in training batches, of that waiting for data, and how many
            clips came, since training began or resumed.
    """

    def __init__(self, log_every: int) -> None:
        self._log_every = log_every
        self.seconds = self.waited = 0.0
        self.clips = 0
        self._before_epoch = (0.0, 0.0, 0)
        self._validated = False

    def on_train_start(self, *_: Any) -> None:
        """From here on time counts."""
        self._free_since = perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        """What lies between two epochs is none of training."""
        self._free_since = perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nor is the validation."""
        self._validated = not trainer.sanity_checking
        self._free_since = perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int
    ) -> None:
        """The batch is here."""
        self._busy_since = perf_counter()
        pl_module.log("lr", trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """The batch is done."""
        self.waited += self._busy_since - self._free_since
        self.seconds += perf_counter() - self._free_since
        self.clips += len(batch["label"])
        seconds, waited, _ = self._of_epoch()
        pl_module.log("train/data_wait", waited / seconds, prog_bar=True)
        if trainer.global_step % self._log_every == 0:
            self._check_loss(trainer)
        self._free_since = perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what came out."""
        assert isinstance(pl_module, VideoModule)
        seconds, waited, clips = self._of_epoch()
        parts = [f"loss {float(trainer.callback_metrics['train/epoch_loss']):.4f}"]
        if self._validated:
            parts.append(f"validation {pl_module.accuracy}")
        if seconds:
            parts.append(f"{clips * trainer.world_size / seconds:.1f} clips/s")
            parts.append(f"waiting for data {waited / seconds:.1%} of the time")
        if torch.cuda.is_available():
            parts.append(f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        logger.info("%s, step %s: %s", epoch, f"{trainer.global_step:,}", "; ".join(parts))
        self._before_epoch = (self.seconds, self.waited, self.clips)
        self._validated = False

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        """Not one with weights that are no numbers."""
        self._check_loss(trainer)

    def _check_loss(self, trainer: pl.Trainer) -> None:
        loss = float(trainer.callback_metrics.get("train/loss", 0.0))
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {trainer.global_step:,}: set a smaller optim.lr or "
                "optim.clip_grad_norm=1, and continue from the last checkpoint with --resume"
            )

    def _of_epoch(self) -> tuple[float, float, int]:
        seconds, waited, clips = self._before_epoch
        return self.seconds - seconds, self.waited - waited, self.clips - clips


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, without the number of the logger's version, and whole after a resume."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that is resumed in its middle does not start, for Lightning."""
        super().on_train_start(trainer, pl_module)
        self.train_progress_bar.total = self.total_train_batches
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")


class MetricsLogger(Logger):
    """``metrics.csv``: a line for each logged step, written at once, and none of them twice.

    Lightning's own deletes the file of the session before.

    Args:
        path: the file.
        start_step: the first step of this session; what an interrupted one logged from there on
            is dropped, since it will be logged again.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = ["step"]
        self._start_step = start_step
        self._started = False

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.name

    @property
    def version(self) -> str:
        """There is only one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Nothing: the run has a config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line; the first time after those of the sessions before."""
        if not self._started:
            kept = read_metrics(self.path) if self.path.exists() else []
            self._rewrite([row for row in kept if row["step"] < self._start_step])
            self._started = True
        row = {"step": float(step or 0), **metrics}
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite(read_metrics(self.path))
        with self.path.open("a", newline="") as file:
            self._writer(file).writerow({key: f"{value:.9g}" for key, value in row.items()})

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        self._columns += sorted({key for row in rows for key in row} - set(self._columns))
        with replacing(self.path) as partial, partial.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows({k: f"{v:.9g}" for k, v in row.items()} for row in rows)

    def _writer(self, file: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, lineterminator="\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.csv``, each with what it holds."""
    lines = path.read_text().splitlines(keepends=True)
    # A kill may have cut the last one off; its step comes after the last checkpoint.
    whole = [line for line in lines if line.endswith("\n")]
    return [
        {key: float(value) for key, value in row.items() if value} for row in csv.DictReader(whole)
    ]


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is whole, or not there.

    Lightning writes to the system's folder for temporary files, from where the file may have to be
    copied.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside ``path``, wait until it is on the disk, rename."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
