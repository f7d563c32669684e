"""One training step."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.engine import AMPTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.nn.parallel import DistributedDataParallel

from backbones.common.errors import UserError, error_line
from backbones.common.resuming import follow_recipe
from backbones.common.seeds import seed_of
from backbones.common.sharding import spread
from backbones.engine.policies import blocks_of

logger = logging.getLogger("revdet")

# Of the memory of a GPU, what a budget may plan with: the rest is the driver's and fragments.
_SHARE = 0.85


class Trainer(AMPTrainer):
    """Detectron2's trainer with autocast on any device, and randomness that resumes exactly.

    An iteration takes ``accumulate`` batches and one step of the optimizer, with the mean of their
    gradients. Under DistributedDataParallel these are reduced once, with those of the last batch.

    What each step draws (sampling of proposals, drop path) is a function of ``seed``, the iteration
    and the batch alone, counted through all processes: a resumed run continues as if never stopped.
    ``amp_dtype`` is that of autocast, None for none; with float16 the loss is scaled.
    ``clip_grad_norm`` is the largest norm of all gradients together; 0 for no clipping.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int = 0,
        accumulate: int = 1,
        amp_dtype: torch.dtype | None = None,
        clip_grad_norm: float = 0.0,
    ) -> None:
        self.device = next(model.parameters()).device
        scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)
        super().__init__(model, data_loader, optimizer, grad_scaler=scaler)
        self.seed, self.accumulate = seed, accumulate
        self.amp_dtype, self.clip_grad_norm = amp_dtype, clip_grad_norm

    def run_step(self) -> None:
        """Run one iteration: data, forward, backward, optimizer; a UserError says why it failed."""
        try:
            self._run_step()
        except torch.OutOfMemoryError as error:
            wrong = f"out of memory in iteration {self.iter} ({error_line(error)})"
            raise UserError(f"{wrong}. {self._remedy()}") from error
        except FloatingPointError as error:
            remedy = "Lower optimizer.lr, or set train.clip_grad_norm"
            raise UserError(f"{error_line(error)} {remedy}") from error
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            what = "train.deterministic=true is not possible here"
            raise UserError(f"{what}: {error_line(error)}") from error

    def _remedy(self) -> str:
        """What was in use, under which policy, and what would fit."""
        policies = dict.fromkeys(b.memory_policy for b in blocks_of(self.model).values())
        used = f"The blocks' policy is {' and '.join(policies)}" if policies else "No blocks"
        more = "train.accumulate for smaller batches, or train.memory_slices"
        if self.device.type != "cuda":
            return f"{used}: set {more}"
        peak = torch.cuda.max_memory_allocated(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        used += f", the peak was {peak / 1e9:.2f} GB of {total / 1e9:.2f}"
        return f"{used}: set train.memory_budget={_SHARE * total / 1e9:.1f}GB, {more}"

    def _run_step(self) -> None:
        data_time = 0.0
        logged: dict[str, torch.Tensor] = {}
        self.optimizer.zero_grad()
        for index in range(self.accumulate):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            batch = index * comm.get_world_size() + comm.get_rank()
            seed_all_rng(seed_of(self.seed, self.iter, batch))
            with self._reducing(last=index == self.accumulate - 1):
                with torch.autocast(self.device.type, self.amp_dtype, self.amp_dtype is not None):
                    losses = self.model(data)
                    total = sum(losses.values()) / self.accumulate
                self.grad_scaler.scale(total).backward()
            for name, loss in losses.items():
                logged[name] = logged.get(name, 0.0) + loss.detach() / self.accumulate
        self.after_backward()
        if self.clip_grad_norm > 0:
            self.grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        self._write_metrics(logged, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _reducing(self, *, last: bool) -> AbstractContextManager[None]:
        """Where the processes' gradients are averaged, which is worth it for the last batch only.

        The forward pass belongs inside: it is there that DistributedDataParallel decides. With
        ``static_graph`` it learns the graph from the very first backward pass, which has to reduce.
        """
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        learning = self.model.static_graph and self.iter == self.start_iter
        return nullcontext() if learning else self.model.no_sync()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known, groups = state_dict["optimizer"]["state"], state_dict["optimizer"]["param_groups"]
        for name, (now, was) in follow_recipe(groups, self.optimizer.param_groups).items():
            logger.warning(f"resumed with optimizer.{name} {now}, which was {was}")
        # Other groups or parameters than expected are the optimizer's to refuse.
        for theirs, ours in zip(groups, self.optimizer.param_groups, strict=False):
            for index, param in zip(theirs["params"], ours["params"], strict=False):
                for name, value in known.get(index, {}).items():
                    if getattr(value, "shape", None) == param.shape:
                        known[index][name] = spread(value, param)
        # A run without float16 has saved no scale.
        scale = state_dict["grad_scaler"] or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": scale})
