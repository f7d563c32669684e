"""One training step, and what is written about it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)

from revdet.dataloader import seed_of

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer(SimpleTrainer):
    """Detectron2's trainer with autocast on any device, and randomness that resumes exactly.

    Args:
        model, data_loader, optimizer: as for ``SimpleTrainer``.
        seed: what each step draws (sampling of proposals, drop path) is a function of the seed,
            the iteration and the process alone, so a resumed run continues as if never stopped.
        amp_dtype: dtype of autocast, or None for none. With float16 the loss is scaled.
        clip_grad_norm: largest norm of all gradients together; 0 for no clipping.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        amp_dtype: torch.dtype | None = None,
        clip_grad_norm: float = 0.0,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self.amp_dtype = amp_dtype
        self.clip_grad_norm = clip_grad_norm
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)

    def run_step(self) -> None:
        """Run one iteration: data, forward, backward, optimizer."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        seed_all_rng(seed_of(self.seed, self.iter, comm.get_rank()))

        self.optimizer.zero_grad()
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            losses = self.model(data)
            total = sum(losses.values())
        self.scaler.scale(total).backward()
        if self.clip_grad_norm > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self._write_metrics(losses, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer and loss scale."""
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        if state_dict["grad_scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state_dict["grad_scaler"])


def build_writers(output_dir: str, max_iter: int, start_iter: int) -> list[EventWriter]:
    """A progress line with ETA, ``metrics.json`` and TensorBoard events.

    What an interrupted run logged after the checkpoint that it resumes from is dropped, since it
    will be logged again. ``metrics.json`` holds values of single iterations, not running medians.
    """
    metrics = Path(output_dir) / "metrics.json"
    _drop_from(metrics, start_iter)
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(str(metrics), window_size=1),
        TensorboardXWriter(output_dir, purge_step=start_iter),
    ]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.json``, without the last one if a kill has cut it off."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _drop_from(path: Path, start_iter: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["iteration"] < start_iter]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in kept))
    os.replace(partial, path)
