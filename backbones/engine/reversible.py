"""The reversible engine: blocks whose input is rebuilt from their output in the backward pass.

The coupling is that of RevNet (Gomez et al., 2017) as used by Reversible Vision Transformers
(Mangalam et al., CVPR 2022, arXiv 2302.04869, section 3.1)::

    forward   y1 = x1 + f(x2)        inverse   x2 = y2 - g(y1)
              y2 = x2 + g(y1)                  x1 = y1 - f(x2)

From top to bottom: a block, and a sequence of blocks. Read next ``reversed_block.py``, the autograd
node that a reversed block is: each has one of its own with the block's parameters among its inputs,
so that gradients arrive block by block, as autograd, hooks and DistributedDataParallel expect them.
What other policies do is in ``policies.py``; how a branch is run again, with gradients, in
``second_run.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from backbones.engine.ambient import AutocastState, only_plain
from backbones.engine.handover import Chain, here
from backbones.engine.policies import Block, MemoryPolicy, add_branch
from backbones.engine.reversed_block import run_reversed
from backbones.engine.second_run import checked


class ReversibleBlock(Block):
    """Two residual branches coupled so that the block can be inverted.

    ``y1 = x1 + m f(x2)``, ``y2 = x2 + m g(y1)``, where the drop-path mask ``m`` is drawn once per
    sample and block and shared by both branches, as in the original implementation.

    Args:
        f: any module that maps a tensor to one of the same shape: attention with its norm.
        g: likewise: the MLP with its norm. Neither holds a residual connection or changes its
            input in place. Both run twice, and what the first run saw the second one sees too
            (parameters, also in lists and from outside, flags, counters, statistics, random
            numbers), or there is an error; a block with forward hooks inside stores instead.
        drop_path: the probability that a sample skips the block in training, in [0, 1).

    Attributes:
        memory_policy: ``"reversible"`` until :func:`backbones.set_memory` says otherwise.

    Raises:
        ValueError: ``drop_path`` outside [0, 1).
    """

    invertible: ClassVar[bool] = True
    memory_policy: MemoryPolicy = "reversible"

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Map the two streams, of one shape (B, …), to two of the same shape.

        Raises:
            RuntimeError: a branch changes its input in place, under ``"reversible"``.
            TypeError: a branch returns no tensor.
            ValueError: a branch returns a tensor of another shape than its input's.
        """
        mask = self.draw_mask(x1)
        streams = x1, x2, mask
        return self.run(
            self._couple, *streams, reverse=lambda: run_reversed(self, self._couple, *streams)
        )

    def _couple(self, x1: Tensor, x2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        y1 = add_branch(x1, checked(self.f, self.f(x2), x2), mask)
        y2 = add_branch(x2, checked(self.g, self.g(y1), y1), mask)
        # What g takes and what is returned are two, as they are where nothing is kept: hooks on an
        # output see the same gradient under every policy.
        return (y1.view_as(y1) if y1.requires_grad else y1), y2

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuild the block's inputs ``(x1, x2)`` from its outputs.

        Raises:
            RuntimeError: in training mode with drop path, whose mask is not known any more.
        """
        if self.training and self.drop_path > 0.0:
            raise RuntimeError("inverse() does not know the drop-path mask: call .eval() first")
        x2 = y2 - self.g(y1)
        x1 = y1 - self.f(x2)
        return x1, x2


class ReversibleSequence(nn.Module):
    """Reversible blocks one after the other, of which only the last keeps its outputs.

    Each block follows its own ``memory_policy`` (:func:`backbones.set_memory`). Going backwards,
    a reversed block rebuilds its inputs, which are the outputs of the block before it. The outputs
    of a block with a forward hook are kept too (two tensors), since a loss may be put on them.

    Args:
        blocks: the blocks, first to last. Their streams have one shape throughout.
    """

    def __init__(self, blocks: Iterable[ReversibleBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Map two streams of one shape (B, …) to two of the same shape.

        Under autocast the streams are kept in float32 and only the branches run in the autocast
        dtype: streams in half precision would make the rebuilt inputs drift.

        Raises:
            ValueError: the streams differ in shape.
        """
        if x1.shape != x2.shape:
            raise ValueError(
                f"the two streams must have one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}"
            )
        if AutocastState(x1.device).enabled:
            x1, x2 = _at_least_float32(x1), _at_least_float32(x2)
        if only_plain():
            for block in self.blocks:
                x1, x2 = block(x1, x2)
            return x1, x2
        chain, outer = Chain(), here.chain
        here.chain = chain
        try:
            # Not strict: of no blocks, nothing follows the last.
            for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=False):
                chain.ends = following is None or _ends_run(block, following)
                x1, x2 = block(x1, x2)
        finally:
            here.chain = outer
            if chain.last is not None:
                chain.last.settle()
        return x1, x2

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuild the sequence's inputs ``(x1, x2)`` from its outputs, last block first.

        Raises:
            RuntimeError: in training mode with drop path.
        """
        for block in reversed(self.blocks):
            y1, y2 = cast(ReversibleBlock, block).inverse(y1, y2)
        return y1, y2


def _ends_run(block: nn.Module, following: nn.Module) -> bool:
    """Whether nobody will rebuild this block's outputs for it, so that it must keep them itself."""
    policies = {getattr(block, "memory_policy", None), getattr(following, "memory_policy", None)}
    return policies != {"reversible"} or any(map(_is_of_the_user, block._forward_hooks.values()))


def _is_of_the_user(hook: Any) -> bool:
    """Whether a hook on a block may put a loss on its outputs; those of torch's sharding do not."""
    home = type(getattr(hook, "__self__", None)).__module__
    return not home.startswith("torch.distributed.")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
