"""Real training steps on this machine: the allocator's peak, and the speed of each policy."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from backbones.common.console import show_progress
from backbones.engine.policies import Keep, MemoryPolicy, set_memory

# By a name: the policy, the stored blocks, what the others keep.
Settings = dict[str, tuple[MemoryPolicy, int, Keep]]

ROUNDS = 5  # that count


class Trial:
    """Training steps (forward, backward, AdamW) of a model on random input, for measuring.

    They run on the model's device, with the forward pass under ``autocast``; its weights change.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        self.model = model.train()
        self.device = next(model.parameters()).device
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(model.parameters())

    def _step(self, x: Tensor, policy: MemoryPolicy, stored: int = 0, keep: Keep = ()) -> float:
        """Do a step; return its seconds."""
        set_memory(self.model, policy, stored, keep)
        start = time.perf_counter()
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, self.autocast, enabled=enabled):
            output = self.model(x)
        torch.autograd.backward(output.float().square().sum())
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def allocated_peak(
        self, shape: tuple[int, ...], policy: MemoryPolicy, stored: int = 0, keep: Keep = ()
    ) -> int | None:
        """The peak of a training step in bytes, by the allocator of a GPU; None: out of memory."""
        try:
            x = torch.randn(shape, device=self.device)
            # Makes the state of the optimizer, which is there from now on.
            self._step(x, policy, stored, keep)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._step(x, policy, stored, keep)
        except torch.cuda.OutOfMemoryError:
            self.optimizer.zero_grad()
            return None
        return torch.cuda.max_memory_allocated(self.device)

    def relative_speeds(self, shape: tuple[int, ...], settings: Settings) -> dict[str, float]:
        """The throughput of each policy over that of ``"store"``, measured: the median over rounds.

        Each round times one step of ``"store"`` and one of each setting, so that what else the
        machine does weighs on all alike. The first round does not count.
        """
        x = torch.randn(shape, device=self.device)
        ratios: dict[str, list[float]] = {name: [] for name in settings}
        for done in range(ROUNDS + 1):
            show_progress(f"measuring the speed, round {done + 1} of {ROUNDS + 1}")
            stored = self._step(x, "store")
            for name, setting in settings.items():
                ratio = stored / self._step(x, *setting)
                if done > 0:
                    ratios[name].append(ratio)
        show_progress("")
        return {name: statistics.median(values) for name, values in ratios.items()}
