"""When a run saves: every so many iterations, at its end, and when it is told to stop."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from backbones.common.files import checksum_file, remove
from backbones.common.stopping import Stopped, asked_to_stop, step_by_step
from revdet.training.checkpoint import FINAL, Checkpointer, periodic_checkpoints
from revdet.training.evaluation import BEST, Evaluations
from revdet.training.metrics import MetricsWriter, read_metrics

logger = logging.getLogger("revdet")


@dataclass(eq=False)
class Saving(HookBase):
    """Saves periodic checkpoints, of which it keeps some, and the final one.

    Told to stop, all processes finish the iteration, save it, and raise :class:`Stopped`.
    """

    checkpointer: Checkpointer
    period: int  # iterations between two checkpoints
    max_to_keep: int  # how many are kept, those of earlier sessions included
    facts: dict[str, Any]  # go into every checkpoint, to be compared when it is resumed
    metrics: MetricsWriter | None  # is written before a checkpoint is, on the main process
    trainer: Any = None

    def before_train(self) -> None:
        self._saved = self.trainer.start_iter - 1

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self.period == 0:
            self._save(f"model_{iteration:07d}")
        if iteration + 1 >= self.trainer.max_iter:
            self._save(FINAL)
        # One process may have heard it in this iteration, another will in the next.
        if number := max(comm.all_gather(asked_to_stop())):
            self.stop(number)

    @property
    def iteration(self) -> int:
        """The one that training is in, or has ended with."""
        return min(self.trainer.iter, self.trainer.max_iter - 1)

    def stop(self, number: int) -> None:
        """Save this iteration, if that has not been done, and raise :class:`Stopped`."""
        if self._saved != self.iteration:
            self._save(f"model_{self.iteration:07d}")
        comm.synchronize()  # the process that ends first ends the others
        where = f"iteration {self.iteration + 1} is saved in {Path(self.checkpointer.save_dir)}"
        raise Stopped(number, f"{where}; --resume continues")

    def _save(self, name: str) -> None:
        self._saved = self.trainer.iter
        if self.metrics is not None:
            self.metrics.write()
        self.checkpointer.save(name, iteration=self.trainer.iter, facts=self.facts)
        if comm.is_main_process():
            for path in periodic_checkpoints(Path(self.checkpointer.save_dir))[: -self.max_to_keep]:
                remove(path)
                remove(checksum_file(path))


class Evaluating(hooks.EvalHook):
    """Evaluates every ``train.eval_period`` iterations; with 0 at the end only.

    First the last iteration before this session, if ``pending``: a kill has cut its evaluation off.
    An evaluation that a signal interrupts ends in ``saving`` the iteration.
    """

    trainer: Any

    def __init__(self, evaluations: Evaluations, saving: Saving, *, pending: bool) -> None:
        period = evaluations.cfg.train.eval_period
        super().__init__(period, lambda: evaluations.run(saving.iteration))
        self._saving, self._pending = saving, pending

    def before_train(self) -> None:
        if self._pending:
            logger.info("the evaluation of the last iteration was interrupted: evaluating again")
            self.trainer.iter = self.trainer.storage.iter = self.trainer.start_iter - 1
            self._do_eval()
            if self._saving.metrics is not None:
                self._saving.metrics.write()
            self.trainer.iter = self.trainer.storage.iter = self.trainer.start_iter

    def after_train(self) -> None:
        if not asked_to_stop():
            super().after_train()

    def _do_eval(self) -> None:
        try:
            with step_by_step(patient=False):
                super()._do_eval()
        except Stopped as stopped:
            self._saving.stop(stopped.number)


def was_evaluated(metrics: Path, iteration: int) -> bool:
    """Whether ``metrics.json`` has the scores of an iteration; the last one's are one further."""
    rows = read_metrics(metrics) if metrics.is_file() else []
    return any(row["iteration"] in (iteration, iteration + 1) and BEST in row for row in rows)
