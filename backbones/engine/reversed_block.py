"""The autograd node of a reversed block: it keeps nothing, and rebuilds its inputs going backwards.

A block may be run in slices of the batch, forwards and backwards alike, so that what is alive
while it runs is that of a slice. Each slice has branches of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from backbones.engine.ambient import AutocastState, RandomState
from backbones.engine.handover import Handover, here
from backbones.engine.policies import Block, add_branch
from backbones.engine.sameness import mark
from backbones.engine.second_run import Branch
from backbones.engine.slices import Whole, cut, split
from backbones.engine.state import hooked_everywhere

# A slice of the batch, or all of it, in one forward pass: f, g and their drop-path mask.
_Part = tuple[Branch, Branch, Tensor | None]


@dataclass
class _FirstRun:
    """What the first run of a block leaves to its node."""

    parts: list[_Part]
    sizes: list[int]  # samples of each
    behind: Handover | None
    ahead: Handover | None
    streams: list[Tensor]
    inputs: dict[int, Tensor]  # all trained tensors of the branches, by id
    dtypes: tuple[torch.dtype, torch.dtype]
    marks: list[tuple[int, int]]  # of the inputs
    kept: list[int] = field(default_factory=list)  # how many tensors each branch keeps


def run_reversed(
    block: Block,
    couple: Callable[..., tuple[Tensor, Tensor]],
    x1: Tensor,
    x2: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a block that keeps nothing; ``couple``, its method, is what it computes."""
    sizes, slices = cut(block, block.slices_of, couple, x1, x2, mask)
    keep_f, keep_g = block.kept_in("f"), block.kept_in("g")
    autocast = AutocastState(x1.device)
    parts = [
        (Branch(block.f, keep_f, autocast), Branch(block.g, keep_g, autocast), part_mask)
        for *_, part_mask in slices
    ]
    f, g, _ = parts[0]
    if f.state.layout.hooked or g.state.layout.hooked or hooked_everywhere():
        block.warn_of_hooks()
        return couple(x1, x2, mask)
    chain = here.chain
    behind = None if chain is None else chain.last
    if behind is not None and not behind.claim(x1, x2):
        behind = None
    here.chain = None  # blocks inside of the branches are none of this sequence
    whole_y1, whole_y2 = Whole(sizes), Whole(sizes)
    try:
        with torch.no_grad():
            random = RandomState(x1.device)
            for (f, g, part_mask), (part_x1, part_x2, _) in zip(parts, slices, strict=True):
                f_x2, random = f.first_run(part_x2, random)
                y1 = add_branch(part_x1, f_x2, part_mask)
                del f_x2
                g_y1, random = g.first_run(y1, random)
                y2 = add_branch(part_x2, g_y1, part_mask)
                del g_y1
                whole_y1.put(y1)
                whole_y2.put(y2)
            y1, y2 = whole_y1.tensor, whole_y2.tensor
    finally:
        here.chain = chain
    ahead = None if chain is None or chain.ends else Handover()
    inputs: dict[int, Tensor] = {}
    for f, g, _ in parts:
        inputs |= f.tensors | g.tensors
    dtypes, marks = (x1.dtype, x2.dtype), [*map(mark, inputs.values())]
    first = _FirstRun(parts, sizes, behind, ahead, [y1, y2], inputs, dtypes, marks)
    y1, y2 = _ReversedBlock.apply(first, x1, x2, *inputs.values())
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
        kept: list[Tensor] = []
        for f, g, _ in first.parts:
            for branch in (f, g):
                first.kept.append(len(branch.kept))
                kept += branch.kept
                branch.kept.clear()
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
        first = ctx.first
        # Not the saved inputs, which hooks (save_on_cpu) may have replaced by others.
        saved = iter(_unchanged(ctx)[len(first.inputs) :])
        kept = [[*islice(saved, count)] for count in first.kept]
        streams = [*saved] if first.ahead is None else [*first.ahead.take()]
        _, x1_needs, x2_needs, *needs = ctx.needs_input_grad
        rebuild = first.behind is not None and (x1_needs or x2_needs)
        needed = {key for key, need in zip(first.inputs, needs, strict=True) if need}
        grads: dict[int, Tensor] = {}
        if len(first.parts) == 1:
            x1, x2, dy1, dy2 = _run_back(
                first, first.parts[0], streams, kept, (dy1, dy2), needed, grads, rebuild
            )
        else:
            # Nobody else has what was rebuilt for this block, so its inputs take that place.
            owned = rebuild and first.ahead is not None and not first.ahead.is_kept
            into = [
                y if owned and y.dtype == dtype else None
                for y, dtype in zip(streams, first.dtypes, strict=True)
            ]
            wholes = [Whole(first.sizes, place) for place in (*into, None, None)]
            slices = split(first.sizes, *streams, dy1, dy2)
            pairs = zip(kept[::2], kept[1::2], strict=True)
            for part, pair, (*ys, d1, d2) in zip(first.parts, pairs, slices, strict=True):
                found = _run_back(first, part, ys, pair, (d1, d2), needed, grads, rebuild)
                for whole, tensor in zip(wholes, found, strict=True):
                    whole.put(tensor)
                del found, tensor
            x1, x2, dy1, dy2 = (whole.tensor for whole in wholes)
        if rebuild:
            first.behind.leave(x1, x2)
        return (None, dy1, dy2, *map(grads.get, first.inputs))


def _run_back(
    first: _FirstRun,
    part: _Part,
    streams: list[Tensor],
    kept: Sequence[list[Tensor]],
    gradients: tuple[Tensor | None, Tensor | None],
    needed: Set[int],
    grads: dict[int, Tensor],
    rebuild: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """From the outputs of a block, in the slice ``part``, and their gradients to its inputs, None
    each if they are not wanted (``rebuild``), and their gradients.

    Args:
        streams: y1 and y2, which are taken out: nobody else should hold them.
        kept: outputs of f's products and of g's.
        gradients: of y1 and y2.
        needed, grads: as of :meth:`Branch.second_run`.
    """
    f, g, mask = part
    y2, y1 = streams.pop(), streams.pop()
    dy1, dy2 = gradients
    g_y1, d = g.second_run(y1, kept[1], dy2, mask, needed, grads)
    dy1 = _sum(dy1, d)
    x2 = _subtract_branch(y2, g_y1, mask).to(first.dtypes[1])
    # The names are dropped as soon as they are spent: they are the peak of the backward pass.
    del g_y1, y2, d

    if dy1 is None and not rebuild:
        return None, None, None, dy2
    f_x2, d = f.second_run(x2, kept[0], dy1, mask, needed, grads)
    dy2 = _sum(dy2, d)
    del d
    if not rebuild:
        return None, None, dy1, dy2
    return _subtract_branch(y1, f_x2, mask).to(first.dtypes[0]), x2, dy1, dy2


def _unchanged(ctx: Any) -> tuple[Tensor, ...]:
    """What a node has saved; an error if somebody has changed it."""
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        if [*map(mark, ctx.first.inputs.values())] != ctx.first.marks:
            raise RuntimeError("modified by an inplace operation, or by tensor.data = …")
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "parameters or outputs of a reversible block were changed in place or got other data "
            "between the forward and the backward pass (modified by an inplace operation), and the "
            "block needs them as they were: step the optimizer after backward(), or choose 'store' "
            f"({error})"
        ) from None
    return saved


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _subtract_branch(y: Tensor, branch: Tensor, mask: Tensor | None) -> Tensor:
    """The inverse of :func:`add_branch`."""
    if mask is None:
        return y - branch
    return torch.addcmul(y, branch, mask, value=-1)
