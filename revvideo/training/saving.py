"""When a run saves: every so many steps, and when it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from backbones.common.stopping import Stopped, asked_to_stop, listen_again
from revvideo.training.module import VideoModule


class Averaging(EMAWeightAveraging):
    """The average of the weights over the steps, which is what is tested.

    Lightning's gives it to the model at the end, and a run that goes on from there would train it.
    Here it stays in the checkpoint, from where it is tested, beside the weights that were trained.
    """

    def on_train_end(self, *_: Any) -> None:
        """Nothing."""


class Saving(pl.Callback):
    """Writes the checkpoint of a run between two steps of the optimizer.

    Not behind the last batch of an epoch, whose validation a run that resumes from there would
    leave out: it is then written one step later. Told to stop, all processes finish the step, save
    it, and raise :class:`Stopped`; a validation is finished, and one step more.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._step, self._due, self._stop = 0, False, 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put Lightning into the epoch that the steps of the checkpoint have come to: it counts one
        that ``max_steps`` has broken off as whole, and the run would end some steps too early."""
        assert isinstance(module, VideoModule)
        done, more = divmod(checkpoint["global_step"], module.data.steps_per_epoch)
        begun = done + bool(more)
        for epochs in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            epochs.update(ready=begun, started=begun, processed=done, completed=done)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, VideoModule)
        listen_again()  # Lightning has a handler of its own, which saves nothing
        self._step = trainer.global_step
        if self._step % module.data.steps_per_epoch == 0:
            # With ``max_steps`` Lightning would go through the epoch before again, without batches.
            trainer.fit_loop.epoch_loop.restarting = False

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:  # gradients of one more batch are accumulated
            return
        self._step = trainer.global_step
        self._due = self._due or self._step % self.every == 0
        if trainer.is_last_batch:
            return
        self._stop = told_to_stop(trainer)
        if self._due or self._stop:
            trainer.save_checkpoint(self.path)
            self._due = False

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._stop:  # only now has Lightning written the metrics of the step
            raise stopped_at(trainer, self._stop, self.path)


def told_to_stop(trainer: pl.Trainer) -> int:
    """The signal that one of the processes has heard; 0 if none has."""
    heard = asked_to_stop()
    if trainer.world_size == 1:
        return heard
    tensor = torch.tensor(heard, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op="max"))


def stopped_at(trainer: pl.Trainer, number: int, path: Path) -> Stopped:
    """What a run ends with that has saved its last step."""
    return Stopped(number, f"step {trainer.global_step} is saved in {path}; --resume continues")
