"""How the blocks of a sequence know of each other: what one hands to the next, verified."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Chain:
    """The blocks of a sequence in one forward pass."""

    ends: bool = True  # whether the block that runs now keeps its outputs, come what may
    last: Handover | None = None  # what the block before has handed over


class _Here(threading.local):
    chain: Chain | None = None


# The sequence that this thread is in. Blocks find it here also from within modules around them.
here = _Here()


class Handover:
    """What a block hands to the next one, which rebuilds it in the backward pass.

    Until the next block has taken them, unchanged, for its inputs, the outputs are kept here.
    """

    def __init__(self) -> None:
        self._streams: tuple[Tensor, Tensor] | None = None
        self._versions = (0, 0)
        self.is_kept = True  # whether the outputs stayed, so that others may see them too

    def offer(self, y1: Tensor, y2: Tensor) -> None:
        """Take the outputs of the block, until they are claimed or settled, which follows soon."""
        self._streams, self._versions = (y1, y2), (y1._version, y2._version)

    def claim(self, x1: Tensor, x2: Tensor) -> bool:
        """Whether these inputs are the outputs, unchanged; if so, nothing is kept any more."""
        if not self.is_kept or self._streams is None:
            return False
        unchanged = (x1._version, x2._version) == self._versions
        if unchanged and all(map(_is_same, self._streams, (x1, x2))):
            self.is_kept, self._streams = False, None
            return True
        self.settle()
        return False

    def settle(self) -> None:
        """Keep what nobody has claimed, without its graph, which would keep itself alive."""
        if self.is_kept and self._streams is not None:
            y1, y2 = self._streams
            self._streams = (y1.detach(), y2.detach())

    def leave(self, x1: Tensor, x2: Tensor) -> None:
        """Bring back what was claimed."""
        self._streams = (x1, x2)

    def take(self) -> tuple[Tensor, Tensor]:
        """The outputs of the block, kept or rebuilt."""
        if self._streams is None:
            raise RuntimeError(
                "the gradient of a loss reached a reversible block without passing the blocks "
                "behind it, so its outputs cannot be rebuilt. Take intermediate outputs with a "
                "forward hook on the block, or give the block the 'store' policy."
            )
        y1, y2 = self._streams
        if not self.is_kept:
            self._streams = None
        elif (y1._version, y2._version) != self._versions:
            raise RuntimeError(
                "the outputs of a reversible block were changed in place before the next block, "
                "so its inputs cannot be rebuilt: change a copy, or choose the 'store' policy"
            )
        return y1, y2


def _is_same(kept: Tensor, x: Tensor) -> bool:
    return x is kept or bool(
        x.dtype == kept.dtype
        and x.shape == kept.shape
        and x.stride() == kept.stride()
        and x.storage_offset() == kept.storage_offset()
        and torch._C._is_alias_of(kept, x)  # type: ignore[attr-defined]
    )
