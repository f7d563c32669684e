"""What is shown while a run goes on: lines in the log, and the progress bar."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

from backbones.common.errors import UserError
from revvideo.training.hardware import is_first_process
from revvideo.training.module import VideoModule

logger = logging.getLogger("revvideo")

# What Lightning says that users of this command cannot act on.
_NOISE = (
    ".*isinstance.treespec, LeafSpec.. is deprecated|The dirpath has changed from|"
    "Checkpoint directory .* exists and is not empty|"  # of a run that is resumed
    "You're using the WeightAveraging callback with a model that overrides|"
    "The '.*_dataloader' does not have many workers"
)


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)  # above the progress bars


def set_up_log(output_dir: Path) -> None:
    """The first process writes to the console and to ``log.txt``, the others are quiet."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=_NOISE)
    for handler in logger.handlers[:]:  # of a run before in this process
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if is_first_process() else logging.CRITICAL)
    if not is_first_process():
        return
    for handler in (_Console(), logging.FileHandler(output_dir / "log.txt")):
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%m/%d %H:%M:%S"))
        logger.addHandler(handler)


class StepLog(pl.Callback):
    """Logs the learning rate and how long training waits for data, and a line for each epoch.

    ``seconds`` are those spent in training batches since training began or resumed, ``waited``
    those of them that went by waiting for data, both on the first process. A loss that is no number
    any more, seen every ``log_every`` steps, ends the run before it gets into a checkpoint.
    """

    def __init__(self, log_every: int) -> None:
        self._log_every = log_every
        self.seconds = self.waited = 0.0
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._before = (self.seconds, self.waited)
        self._clips, self._validated = 0, False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._free_since = perf_counter()  # what lies between two epochs is none of training

    on_train_start = on_train_epoch_start  # an epoch that is resumed in its middle does not start

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._validated = not trainer.sanity_checking
        self._free_since = perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any
    ) -> None:
        self._busy_since = perf_counter()
        module.log("lr", trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, _: Any, batch: Any, *__: Any
    ) -> None:
        self.waited += self._busy_since - self._free_since
        self.seconds += perf_counter() - self._free_since
        self._clips += len(batch["label"])
        module.log("train/data_wait", self._wait_share(), prog_bar=True)
        if trainer.global_step % self._log_every == 0:
            self._check_loss(trainer)
        self._free_since = perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, VideoModule)
        parts = [f"loss {float(trainer.callback_metrics['train/epoch_loss']):.4f}"]
        if self._validated:
            parts.append(f"validation {module.accuracy}")
        if self._clips:
            speed = self._clips * trainer.world_size / (self.seconds - self._before[0])
            parts.append(f"{speed:.1f} clips/s")
            parts.append(f"waiting for data {self._wait_share():.1%} of the time")
        if peak := torch.cuda.max_memory_allocated():  # 0 on the CPU
            parts.append(f"peak {peak / 1e9:.2f} GB")
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        logger.info("%s, step %s: %s", epoch, f"{trainer.global_step:,}", "; ".join(parts))
        self._begin_epoch()

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self._check_loss(trainer)

    def _check_loss(self, trainer: pl.Trainer) -> None:
        loss = float(trainer.callback_metrics.get("train/loss", 0.0))
        if not math.isfinite(loss):
            remedy = "set a smaller optim.lr or optim.clip_grad_norm=1, and continue from the last"
            where = f"at step {trainer.global_step:,}"
            raise UserError(f"the loss is {loss} {where}: {remedy} checkpoint with --resume")

    def _wait_share(self) -> float:
        """Of the time of this epoch."""
        return (self.waited - self._before[1]) / (self.seconds - self._before[0])


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, whole after a resume too."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.on_train_epoch_start(trainer)  # Lightning does not, where it is resumed in its middle
