"""How much memory autograd holds between the forward and the backward pass.

The witness of the tests: it asks autograd what it saves, where the package counts what is alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["SavedBytes", "saved_bytes"]


class _Saved:
    """A tensor that autograd saved. Autograd alone keeps it alive, so its end is autograd's."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because a node that saved its own output would be kept alive by it.
        self.tensor = tensor.detach()


class SavedBytes:
    """What :func:`saved_bytes` yields.

    Attributes:
        bytes: the bytes held now by the graphs that were built in the context. Read it while the
            loss is alive: without the loss there is no graph, and nothing is held.
    """

    def __init__(self, ignore: nn.Module | None) -> None:
        self._ignore = ignore
        self._saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.add(saved)
        return saved

    @staticmethod
    def _unpack(saved: _Saved) -> Tensor:
        return saved.tensor

    @property
    def bytes(self) -> int:
        ignored: set[int] = set()
        if self._ignore is not None:
            own = chain(self._ignore.parameters(), self._ignore.buffers())
            ignored = {tensor.untyped_storage()._cdata for tensor in own}
        # A storage is told by the address of its C++ object: tensors on the meta device have no
        # data pointer, and since all of these are alive now, no two of them share an address.
        storages = (saved.tensor.untyped_storage() for saved in self._saved)
        sizes = {storage._cdata: storage.nbytes() for storage in storages}
        return sum(size for address, size in sizes.items() if address not in ignored)


@contextmanager
def saved_bytes(ignore: nn.Module | None = None) -> Iterator[SavedBytes]:
    """Count the bytes that autograd holds for the backward pass of what runs in the context.

    >>> with saved_bytes(ignore=model) as held:
    ...     loss = model(images).sum()
    >>> held.bytes

    Counts each storage once, however many views of it are saved, and whole, since a view keeps
    all of it alive. What autograd saved and has let go again does not count. Not seen: tensors that
    a custom autograd function keeps on its ``ctx`` instead of saving them through
    ``save_for_backward``; and what is saved inside other saved-tensor hooks, which replace these
    (of ``torch.utils.checkpoint``, that is what the recomputation holds for the moment).

    Args:
        ignore: its parameters and buffers do not count, since they are there anyway. Copies of
            them, as autocast makes, do.

    Yields:
        an object whose ``bytes`` is the number held at the moment it is read.
    """
    held = SavedBytes(ignore)
    with saved_tensors_hooks(held._pack, held._unpack):
        yield held
