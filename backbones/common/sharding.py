"""Models whose weights are spread over the processes of a run (FSDP2), and what is kept of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: Any) -> None:
    """Give each process of a mesh its part of the weights: ``fully_shard``, in place.

    Each block is a unit of its own, of which all weights are in one place while it runs, forwards
    or backwards; the rest is one unit, there from the forward to the end of the backward pass. So
    what is held between the two does not grow with the number of reversed blocks.

    Args:
        model: the same on every process, which is not checked.
        blocks: modules inside that are called, not by other names than ``forward``.
        mesh: of one dimension, as :func:`torch.distributed.device_mesh.init_device_mesh` makes it.
    """
    from torch.distributed.fsdp import fully_shard  # late, as all of torch's sharding: 0.5 s

    # Nobody changes the outputs of our blocks in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A context in which every process has all weights, so that each can run the model alone.

    All processes enter it together; a model that is not sharded stays as it is. It is no place to
    train, and ``state_dict()`` ends it.
    """
    units = [unit for unit in model.modules() if hasattr(unit, "set_reshard_after_forward")]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
        unit.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)  # type: ignore[operator]
            unit.reshard()  # type: ignore[operator]


def is_sharded(value: object) -> bool:
    """Whether a tensor is, or of a module the parameters are, spread over processes."""
    if isinstance(value, nn.Module):
        value = next(value.parameters(), None)
    return hasattr(value, "full_tensor")


def gathered(state: Any, *, keep: bool) -> Any:
    """A state (tensors in dictionaries and lists) with whole tensors in memory of the CPU.

    All processes call it together, and those that do not ``keep`` it get None for the tensors.
    """

    def gather(tensor: Any, _: str) -> Tensor | None:
        full: Tensor = tensor.full_tensor()
        return full.cpu() if keep else None

    return _sharded_replaced(state, gather)


def spread(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has, if ``like`` is sharded; else all of it."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    there: Any = like
    value = value.to(there.device)
    # Every process has read it, so nothing is sent.
    return distribute_tensor(value, there.device_mesh, there.placements, src_data_rank=None)


def _sharded_replaced(value: Any, by: Callable[[Any, str], Any], path: str = "") -> Any:
    """``value`` with ``by(tensor, path)`` in the place of each sharded tensor in it."""
    if is_sharded(value):
        return by(value, path)
    if isinstance(value, dict):
        return {k: _sharded_replaced(v, by, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_sharded_replaced(v, by, f"{path}.{i}") for i, v in enumerate(value))
    return value
