"""The ambient state of a computation that will be run a second time: autocast and randomness.

A block that drops its activations computes its branches twice, once in the forward pass and once
in the backward pass. The second run must see what the first one saw, although by then the user
has left the ``torch.autocast`` region and the random generators have moved on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AutocastState", "RandomState"]


@dataclass(frozen=True)
class AutocastState:
    """Whether autocast was on for a type of device, and to which dtype."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def capture(cls, device: torch.device) -> AutocastState:
        """Read the state that is in force now for the type of ``device``."""
        if not torch.amp.is_autocast_available(device.type):
            return cls(device.type, False, None)
        return cls(
            device.type,
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
        )

    def restored(self) -> AbstractContextManager[object]:
        """A context in which the captured state is in force, without autocast's weight cache.

        Without the cache, because a cast weight kept from a pass without grad has no way back to
        its parameter, and one kept from the second run serves nobody.
        """
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(
            self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False
        )


@dataclass(frozen=True)
class RandomState:
    """The states of the default generators that a computation on ``device`` may draw from."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Copy the states of the CPU's generator and, where there is one, of ``device``'s."""
        accelerator = None
        if device.type not in ("cpu", "meta"):
            accelerator = torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), accelerator)

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two captures."""
        if not torch.equal(self.cpu, other.cpu):
            return False
        if self.accelerator is None or other.accelerator is None:
            return self.accelerator is other.accelerator
        return torch.equal(self.accelerator, other.accelerator)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A context that draws the same numbers, and leaves the generators as it found them."""
        if self.accelerator is None:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.cpu)
                yield
            return
        module = torch.get_device_module(self.device)
        with torch.random.fork_rng(devices=[self.device], device_type=self.device.type):
            torch.set_rng_state(self.cpu)
            module.set_rng_state(self.accelerator, self.device)
            yield
