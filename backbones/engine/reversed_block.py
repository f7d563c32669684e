"""The autograd node of a reversed block: it keeps nothing, and rebuilds its inputs going backwards.

A block may be run in slices of the batch, forwards and backwards alike, so that what is alive
while it runs is that of a slice. Each slice is a :class:`_Part` with branches of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones.engine.ambient import AutocastState, RandomState
from backbones.engine.handover import Handover, here
from backbones.engine.policies import Block, add_branch
from backbones.engine.sameness import mark
from backbones.engine.second_run import Branch
from backbones.engine.slices import Whole, cut


class _Part(NamedTuple):
    """A slice of the batch, or all of it, in one forward pass."""

    f: Branch
    g: Branch
    mask: Tensor | None


@dataclass
class _FirstRun:
    """What the first run of a block leaves to its node."""

    parts: list[_Part]
    sizes: list[int]  # samples of each
    autocast: AutocastState
    behind: Handover | None
    ahead: Handover | None
    streams: list[Tensor]
    inputs: list[Tensor]
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
    parts = [_Part(Branch(block.f, keep_f), Branch(block.g, keep_g), m) for *_, m in slices]
    if parts[0].f.state.is_hooked or parts[0].g.state.is_hooked:
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
            autocast = AutocastState(x1.device)
            random = RandomState(x1.device)
            for (f, g, part_mask), (part_x1, part_x2, _) in zip(parts, slices, strict=True):
                f_x2, random = f.first_run(part_x2, autocast, random)
                y1 = add_branch(part_x1, f_x2, part_mask)
                del f_x2
                g_y1, random = g.first_run(y1, autocast, random)
                y2 = add_branch(part_x2, g_y1, part_mask)
                del g_y1
                whole_y1.put(y1)
                whole_y2.put(y2)
            y1, y2 = whole_y1.tensor, whole_y2.tensor
    finally:
        here.chain = chain
    ahead = None if chain is None or chain.ends else Handover()
    inputs = _inputs_of(parts)
    dtypes = x1.dtype, x2.dtype
    marks = [*map(mark, inputs)]
    first = _FirstRun(parts, sizes, autocast, behind, ahead, [y1, y2], inputs, dtypes, marks)
    y1, y2 = _ReversedBlock.apply(first, x1, x2, *inputs)
    if ahead is not None:
        ahead.offer(y1, y2)
    if chain is not None:
        chain.last = ahead
    return y1, y2


def _inputs_of(parts: Sequence[_Part]) -> list[Tensor]:
    """All trained tensors of the branches, each once; tells each branch where its own are."""
    branches = [branch for f, g, _ in parts for branch in (f, g)]
    tensors = [branch.tensors for branch in branches]
    inputs = [tensor for of_one in tensors for tensor in of_one]
    places = {id(tensor): index for index, tensor in enumerate(inputs)}
    if len(places) < len(inputs):  # they share some
        inputs = [*{id(tensor): tensor for tensor in inputs}.values()]
        places = {id(tensor): index for index, tensor in enumerate(inputs)}
    for branch, of_one in zip(branches, tensors, strict=True):
        branch.indices = [places[id(tensor)] for tensor in of_one]
    return inputs


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
        first, saved = ctx.first, [*_unchanged(ctx)]
        # Not the saved inputs, which hooks (save_on_cpu) may have replaced by others.
        del saved[: len(first.inputs)]
        streams = saved[sum(first.kept) :] if first.ahead is None else [*first.ahead.take()]
        kept = iter(saved)
        _, x1_needs, x2_needs, *needs = ctx.needs_input_grad
        rebuild = first.behind is not None and (x1_needs or x2_needs)
        grads: dict[int, Tensor] = {}
        if len(first.parts) == 1:
            kept_f, kept_g = ([next(kept) for _ in range(count)] for count in first.kept)
            del saved
            x1, x2, dy1, dy2 = _rebuild(
                first, first.parts[0], streams, (kept_f, kept_g), (dy1, dy2), grads, needs, rebuild
            )
        else:
            # Nobody else has what was rebuilt for this block, so its inputs take that place.
            owned = first.ahead is not None and not first.ahead.is_kept
            into = [
                y if owned and y.dtype == dtype and rebuild else None
                for y, dtype in zip(streams, first.dtypes, strict=True)
            ]
            wholes = [Whole(first.sizes, place) for place in into]
            gradients = [Whole(first.sizes), Whole(first.sizes)]
            of_streams = [y.split(first.sizes) for y in streams]
            of_grads = [_split(grad, first.sizes) for grad in (dy1, dy2)]
            counts = iter(first.kept)
            for index, part in enumerate(first.parts):
                kept_f, kept_g = ([next(kept) for _ in range(next(counts))] for _ in "fg")
                *xs, d1, d2 = _rebuild(
                    first,
                    part,
                    [of_streams[0][index], of_streams[1][index]],
                    (kept_f, kept_g),
                    (of_grads[0][index], of_grads[1][index]),
                    grads,
                    needs,
                    rebuild,
                )
                if not rebuild:
                    xs = [None, None]
                for whole, tensor in zip((*wholes, *gradients), (*xs, d1, d2), strict=True):
                    whole.put(tensor)
                del xs, d1, d2
            x1, x2, dy1, dy2 = (whole.tensor for whole in (*wholes, *gradients))
        if rebuild and x1 is not None:
            first.behind.leave(x1, x2)
        return (None, dy1, dy2, *(grads.get(index) for index in range(len(first.inputs))))


def _rebuild(
    first: _FirstRun,
    part: _Part,
    streams: list[Tensor],
    kept: tuple[list[Tensor], list[Tensor]],
    gradients: tuple[Tensor | None, Tensor | None],
    grads: dict[int, Tensor],
    needs: Sequence[bool],
    rebuild: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """From the outputs of a block, in the slice ``part``, and their gradients to its inputs and
    theirs: x1, or None where it is not wanted (``rebuild``) or not known; x2; their gradients.

    Args:
        streams: y1 and y2, which are taken out: nobody else should hold them.
        kept: outputs of f's products and of g's.
        gradients: of y1 and y2.
        grads: takes the gradients of the node's inputs, by index, beside those that are there.
        needs: which of them are wanted.
    """
    mask, autocast = part.mask, first.autocast
    y2, y1 = streams.pop(), streams.pop()
    dy1, dy2 = gradients
    if dy2 is None:
        g_y1 = part.g.output(y1, kept[1], autocast)
    else:
        leaf, g_y1, wanted = part.g.second_run(y1, kept[1], first.inputs, needs, autocast)
        d, g_grads = part.g.gradients(g_y1, leaf, wanted, dy2, mask)
        dy1 = _sum(dy1, d)
        _add(grads, g_grads)
        del leaf, d, wanted, g_grads
    x2 = _subtract_branch(y2, g_y1.detach(), mask).to(first.dtypes[1])
    # The names are dropped as soon as they are spent: they are the peak of the backward pass.
    del g_y1, y2

    x1 = f_x2 = None
    if dy1 is not None:
        leaf, f_x2, wanted = part.f.second_run(x2, kept[0], first.inputs, needs, autocast)
        d, f_grads = part.f.gradients(f_x2, leaf, wanted, dy1, mask)
        dy2 = _sum(dy2, d)
        _add(grads, f_grads)
        del leaf, d, wanted
    elif rebuild:
        f_x2 = part.f.output(x2, kept[0], autocast)
    if rebuild and f_x2 is not None:
        x1 = _subtract_branch(y1, f_x2.detach(), mask).to(first.dtypes[0])
    return x1, x2, dy1, dy2


def _add(grads: dict[int, Tensor], more: dict[int, Tensor]) -> None:
    for index, grad in more.items():
        grads[index] = grads[index] + grad if index in grads else grad


def _split(grad: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if grad is None else grad.split(sizes)


def _unchanged(ctx: Any) -> tuple[Tensor, ...]:
    """What a node has saved; an error if somebody has changed it."""
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        if [*map(mark, ctx.first.inputs)] != ctx.first.marks:
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
