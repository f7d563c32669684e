"""Memory policies: what a block keeps between its forward and its backward pass.

``"store"``
    Every activation, as plain autograd does. Fastest; memory grows with depth.
``"checkpoint"``
    The block's input. One more forward pass; memory still grows with depth, slowly.
``"reversible"``
    Nothing: the block's input is rebuilt from its output. One more forward pass; memory does not
    grow with depth. Blocks that cannot be inverted are checkpointed instead.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from torch import nn

__all__ = ["MemoryManaged", "MemoryPolicy", "blocks_of", "set_memory"]

MemoryPolicy = Literal["store", "checkpoint", "reversible"]


class MemoryManaged(nn.Module):
    """A block of two branches whose activation memory is a policy. See :func:`set_memory`."""

    f: nn.Module
    g: nn.Module
    invertible: ClassVar[bool] = False
    memory_policy: MemoryPolicy = "store"


def blocks_of(module: nn.Module) -> dict[str, MemoryManaged]:
    """The blocks inside ``module`` by name, first to last, transitions between stages included."""
    return {name: m for name, m in module.named_modules() if isinstance(m, MemoryManaged)}


def set_memory(module: nn.Module, policy: MemoryPolicy, stored_blocks: int = 0) -> None:
    """Choose what the blocks inside ``module`` keep for the backward pass.

    The gradients are the same under every policy; only memory and speed differ. Takes effect from
    the next forward pass on.

    Args:
        module: a model of this package, or any module that holds :class:`ReversibleBlock` s.
        policy: ``"store"``, ``"checkpoint"`` or ``"reversible"``.
        stored_blocks: how many of the last blocks store their activations whatever the policy.
            The last ones, because the backward pass frees them first: the peak is the larger of
            "these blocks" and "one recomputed block", not their sum.

    Raises:
        ValueError: unknown policy; no block in ``module``; ``"reversible"`` for a module without
            an invertible block; ``stored_blocks`` outside 0 … number of blocks.
    """
    if policy not in get_args(MemoryPolicy):
        known = ", ".join(repr(name) for name in get_args(MemoryPolicy))
        raise ValueError(f"memory policy {policy!r} does not exist; choose one of {known}")
    blocks = [*blocks_of(module).values()]
    name = type(module).__name__
    if not blocks:
        raise ValueError(f"{name} holds no block whose memory can be managed")
    if policy == "reversible" and not any(block.invertible for block in blocks):
        raise ValueError(
            f"{name} has no reversible blocks; use 'checkpoint', or its reversible twin (rev_…)"
        )
    if not 0 <= stored_blocks <= len(blocks):
        raise ValueError(f"stored_blocks must be 0 … {len(blocks)} for {name}, got {stored_blocks}")
    first_stored = len(blocks) - stored_blocks
    for index, block in enumerate(blocks):
        if index >= first_stored:
            block.memory_policy = "store"
        elif policy == "reversible" and not block.invertible:
            block.memory_policy = "checkpoint"
        else:
            block.memory_policy = policy
