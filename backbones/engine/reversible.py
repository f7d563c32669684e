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
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from backbones.engine.ambient import AutocastState, RandomState, only_plain
from backbones.engine.handover import Chain, Handover, here
from backbones.engine.policies import Block, MemoryPolicy, add_branch
from backbones.engine.second_run import Branch, checked


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
        return self.run(self._couple, x1, x2, mask, reverse=lambda: _reversed(self, x1, x2, mask))

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


@dataclass
class _FirstRun:
    """What the first run of a block leaves to its node."""

    f: Branch
    g: Branch
    mask: Tensor | None
    autocast: AutocastState
    behind: Handover | None
    ahead: Handover | None
    streams: list[Tensor]
    inputs: list[Tensor]
    dtypes: tuple[torch.dtype, torch.dtype]


def _reversed(
    block: ReversibleBlock, x1: Tensor, x2: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run a block that keeps nothing."""
    f, g = Branch(block.f, block.kept_in("f")), Branch(block.g, block.kept_in("g"))
    if f.state.is_hooked or g.state.is_hooked:
        block.warn_of_hooks()
        return block._couple(x1, x2, mask)
    chain = here.chain
    behind = None if chain is None else chain.last
    if behind is not None and not behind.claim(x1, x2):
        behind = None
    here.chain = None  # blocks inside of the branches are none of this sequence
    try:
        with torch.no_grad():
            autocast = AutocastState(x1.device)
            random = RandomState(x1.device)
            f_x2, random = f.first_run(x2, autocast, random)
            y1 = add_branch(x1, f_x2, mask)
            del f_x2
            g_y1, _ = g.first_run(y1, autocast, random)
            y2 = add_branch(x2, g_y1, mask)
            del g_y1
    finally:
        here.chain = chain
    ahead = None if chain is None or chain.ends else Handover()
    of_f, of_g = f.tensors, g.tensors
    inputs = [*of_f, *of_g]
    f.indices, g.indices = range(len(of_f)), range(len(of_f), len(inputs))
    if len(set(map(id, inputs))) < len(inputs):  # the branches share some
        inputs = [*{id(tensor): tensor for tensor in inputs}.values()]
        places = {id(tensor): index for index, tensor in enumerate(inputs)}
        f.indices, g.indices = ([places[id(t)] for t in tensors] for tensors in (of_f, of_g))
    dtypes = x1.dtype, x2.dtype
    first = _FirstRun(f, g, mask, autocast, behind, ahead, [y1, y2], inputs, dtypes)
    y1, y2 = _ReversedBlock.apply(first, x1, x2, *inputs)
    if ahead is not None:
        ahead.offer(y1, y2)
    if chain is not None:
        chain.last = ahead
    return y1, y2


class _ReversedBlock(torch.autograd.Function):
    """The autograd node of one block that keeps nothing, or, at the end of a run, its outputs."""

    @staticmethod
    def forward(
        ctx: Any, first: _FirstRun, x1: Tensor, x2: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        y1, y2 = first.streams
        first.streams.clear()
        ctx.first = first
        ctx.set_materialize_grads(False)
        # The inputs go through save_for_backward for its check that nobody changed them.
        kept = [*first.f.kept, *first.g.kept]
        ctx.counts = len(inputs), len(inputs) + len(first.f.kept), len(inputs) + len(kept)
        first.f.kept.clear()
        first.g.kept.clear()
        ctx.save_for_backward(*inputs, *kept, *(() if first.ahead else (y1, y2)))
        return y1, y2

    @staticmethod
    def backward(ctx: Any, dy1: Tensor | None, dy2: Tensor | None) -> tuple[Tensor | None, ...]:
        # Not once_differentiable, which lets a gradient pass that does not depend on dy1 and dy2.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of gradients (create_graph=True) do not pass reversed blocks: "
                "choose the 'store' policy for this model"
            )
        first, saved = ctx.first, _unchanged(ctx)
        of_inputs, of_f, of_g = ctx.counts
        # Not the saved inputs, which hooks (save_on_cpu) may have replaced by others.
        inputs, kept_f, kept_g = first.inputs, saved[of_inputs:of_f], saved[of_f:of_g]
        y1, y2 = saved[of_g:] if first.ahead is None else first.ahead.take()
        _, x1_needs, x2_needs, *needs = ctx.needs_input_grad
        mask, autocast = first.mask, first.autocast

        grads: dict[int, Tensor] = {}
        if dy2 is None:
            g_y1 = first.g.output(y1, kept_g, autocast)
        else:
            leaf, g_y1, wanted = first.g.second_run(y1, kept_g, inputs, needs, autocast)
            d, grads = first.g.gradients(g_y1, leaf, wanted, dy2, mask)
            dy1 = _sum(dy1, d)
            del leaf, d, wanted
        x2 = _subtract_branch(y2, g_y1.detach(), mask).to(first.dtypes[1])
        # The names are dropped as soon as they are spent: they are the peak of the backward pass.
        del g_y1, y2

        rebuild = first.behind is not None and (x1_needs or x2_needs)
        f_x2 = None
        if dy1 is not None:
            leaf, f_x2, wanted = first.f.second_run(x2, kept_f, inputs, needs, autocast)
            d, f_grads = first.f.gradients(f_x2, leaf, wanted, dy1, mask)
            dy2 = _sum(dy2, d)
            for index, grad in f_grads.items():
                grads[index] = grads[index] + grad if index in grads else grad
            del leaf, d, wanted
        elif rebuild:
            f_x2 = first.f.output(x2, kept_f, autocast)
        if rebuild and f_x2 is not None:
            x1 = _subtract_branch(y1, f_x2.detach(), mask).to(first.dtypes[0])
            first.behind.leave(x1, x2)
        return (None, dy1, dy2, *(grads.get(index) for index in range(len(inputs))))


def _unchanged(ctx: Any) -> tuple[Tensor, ...]:
    """What a node has saved; an error if somebody has changed it in place."""
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "parameters or outputs of a reversible block were changed in place between the forward "
            "and the backward pass (modified by an inplace operation), and the block needs them as "
            f"they were: step the optimizer after backward(), or choose 'store' ({error})"
        ) from None
    return saved


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _subtract_branch(y: Tensor, branch: Tensor, mask: Tensor | None) -> Tensor:
    """The inverse of :func:`add_branch`."""
    if mask is None:
        return y - branch
    return torch.addcmul(y, branch, mask, value=-1)
