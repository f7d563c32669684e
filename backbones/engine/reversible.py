"""The reversible engine: blocks whose input is rebuilt from their output in the backward pass.

The coupling is that of RevNet (Gomez et al., 2017) as used by Reversible Vision Transformers
(Mangalam et al., CVPR 2022, arXiv 2302.04869, section 3.1)::

    forward   y1 = x1 + f(x2)        inverse   x2 = y2 - g(y1)
              y2 = x2 + g(y1)                  x1 = y1 - f(x2)

From top to bottom: a block, a sequence of blocks, and the autograd node that a reversed block is.
Each has a node of its own with the block's parameters among its inputs, so that gradients arrive
block by block, as autograd, hooks and DistributedDataParallel expect them. What other policies do
is in ``policies.py``; how a branch is run again, with gradients, in ``second_run.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from backbones.engine.policies import Block, MemoryPolicy, add_branch
from backbones.engine.second_run import AutocastState, Branch, RandomState, parameters_of

__all__ = ["ReversibleBlock", "ReversibleSequence"]


class ReversibleBlock(Block):
    """Two residual branches coupled so that the block can be inverted.

    ``y1 = x1 + m f(x2)``, ``y2 = x2 + m g(y1)``, where the drop-path mask ``m`` is drawn once per
    sample and block and shared by both branches, as in the original implementation.

    Args:
        f: any module that maps a tensor to one of the same shape: attention with its norm.
        g: likewise: the MLP with its norm. Neither holds a residual connection, changes its input
            in place, depends on a state that changes between calls (batch-norm statistics would
            be updated twice), or trains a tensor that is not a parameter of its own.
        drop_path: the probability that a sample skips the block in training, in [0, 1).

    Attributes:
        memory_policy: ``"reversible"`` until :func:`backbones.set_memory` says otherwise.

    Raises:
        ValueError: ``drop_path`` outside [0, 1).
    """

    invertible: ClassVar[bool] = True
    memory_policy: MemoryPolicy = "reversible"

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        behind: _Relay | None = None,
        ahead: _Relay | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map the two streams, of one shape (B, …), to two of the same shape.

        ``behind`` and ``ahead`` connect the blocks of a :class:`ReversibleSequence` in the
        backward pass. A block that is called alone keeps its own outputs.

        Raises:
            RuntimeError: a branch trains a tensor that is not a parameter, under ``"reversible"``.
        """
        mask = self.draw_mask(x1)

        def reverse() -> tuple[Tensor, Tensor]:
            params = parameters_of(self)
            streams = _ReversedBlock.apply(self, mask, behind, ahead, x1, x2, *params)
            return cast(tuple[Tensor, Tensor], streams)

        return self.run(self._couple, x1, x2, mask, reverse=reverse)

    def _couple(self, x1: Tensor, x2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        y1 = add_branch(x1, self.f(x2), mask)
        y2 = add_branch(x2, self.g(y1), mask)
        return y1, y2

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
        blocks = [cast(ReversibleBlock, block) for block in self.blocks]
        behind: _Relay | None = None
        # Not strict: of no blocks, nothing follows the last.
        for block, following in zip(blocks, [*blocks[1:], None], strict=False):
            ahead = None if following is None or _ends_run(block, following) else _Relay()
            x1, x2 = block(x1, x2, behind, ahead)
            behind = ahead
        return x1, x2

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuild the sequence's inputs ``(x1, x2)`` from its outputs, last block first.

        Raises:
            RuntimeError: in training mode with drop path.
        """
        for block in reversed(self.blocks):
            y1, y2 = cast(ReversibleBlock, block).inverse(y1, y2)
        return y1, y2


def _ends_run(block: ReversibleBlock, following: ReversibleBlock) -> bool:
    """Whether nobody will rebuild this block's outputs for it, so that it must keep them itself."""
    return (
        block.memory_policy != "reversible"
        or following.memory_policy != "reversible"
        or bool(block._forward_hooks)
        or bool(following._forward_pre_hooks)
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _ReversedBlock(torch.autograd.Function):
    """The autograd node of one block that keeps nothing, or, at the end of a run, its outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        block: ReversibleBlock,
        mask: Tensor | None,
        behind: _Relay | None,
        ahead: _Relay | None,
        x1: Tensor,
        x2: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = x1.device
        autocast = AutocastState(device)
        before_f = RandomState(device)
        with autocast.restored():
            f_x2 = block.f(x2)
        y1 = add_branch(x1, f_x2, mask)
        del f_x2
        before_g = RandomState(device)
        with autocast.restored():
            g_y1 = block.g(y1)
        y2 = add_branch(x2, g_y1, mask)
        after_g = RandomState(device)

        index_of = {id(param): index for index, param in enumerate(params)}
        ctx.f = Branch(block.f, index_of, None if before_f.same_as(before_g) else before_f)
        ctx.g = Branch(block.g, index_of, None if before_g.same_as(after_g) else before_g)
        ctx.autocast, ctx.mask = autocast, mask
        ctx.behind, ctx.ahead = behind, ahead
        # The parameters go through save_for_backward for its check that nobody changed them.
        outputs = (y1, y2) if ahead is None else ()
        ctx.save_for_backward(*params, *outputs)
        return y1, y2

    @staticmethod
    def backward(ctx: Any, dy1: Tensor, dy2: Tensor) -> tuple[Tensor | None, ...]:
        # Not once_differentiable, which lets a gradient pass that does not depend on dy1 and dy2.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of gradients (create_graph=True) do not pass reversed blocks: "
                "choose the 'store' policy for this model"
            )
        saved = ctx.saved_tensors
        if ctx.ahead is None:
            *params, y1, y2 = saved
        else:
            params = saved
            y1, y2 = ctx.ahead.take()
        _, _, _, _, x1_needs, x2_needs, *param_needs = ctx.needs_input_grad
        leaves = [p.detach().requires_grad_(n) for p, n in zip(params, param_needs, strict=True)]
        f, g, mask, autocast = ctx.f, ctx.g, ctx.mask, ctx.autocast

        y1_leaf, g_y1 = g.rerun(y1, leaves, autocast)
        d, grads = g.gradients(g_y1, y1_leaf, leaves, dy2, mask)
        if d is not None:
            dy1 = dy1 + d
        x2 = _subtract_branch(y2, g_y1.detach(), mask)
        # The names are dropped as soon as they are spent: they are the peak of the backward pass.
        del y1_leaf, g_y1, y2, d

        x2_leaf, f_x2 = f.rerun(x2, leaves, autocast)
        d, f_grads = f.gradients(f_x2, x2_leaf, leaves, dy1, mask)
        if d is not None:
            dy2 = dy2 + d
        for index, grad in f_grads.items():
            grads[index] = grads[index] + grad if index in grads else grad
        if ctx.behind is not None and (x1_needs or x2_needs):
            ctx.behind.leave(_subtract_branch(y1, f_x2.detach(), mask), x2)
        param_grads = (grads.get(index) for index in range(len(leaves)))
        return (None, None, None, None, dy1, dy2, *param_grads)


def _subtract_branch(y: Tensor, branch: Tensor, mask: Tensor | None) -> Tensor:
    """The inverse of :func:`add_branch`."""
    if mask is None:
        return y - branch
    return torch.addcmul(y, branch, mask, value=-1)


class _Relay:
    """Where a node of the backward pass leaves the inputs it rebuilt for the node before it."""

    def __init__(self) -> None:
        self._streams: tuple[Tensor, Tensor] | None = None

    def leave(self, x1: Tensor, x2: Tensor) -> None:
        self._streams = (x1, x2)

    def take(self) -> tuple[Tensor, Tensor]:
        if self._streams is None:
            raise RuntimeError(
                "the gradient of a loss reached a reversible block without passing the blocks "
                "behind it, so its outputs cannot be rebuilt. Take intermediate outputs with a "
                "forward hook on the block, or give the block the 'store' policy."
            )
        streams, self._streams = self._streams, None
        return streams
