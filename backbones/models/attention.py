"""Attention over a grid of tokens: windows of it, and relative positions without an N x N bias.

MViTv2 (arXiv 2112.01526, section 4.1) and ViTDet (arXiv 2203.16527) add to the logit of a query at
(t, h, w) and a key at (t', h', w') what the query makes of the distance along each axis::

    q . k / sqrt(D)  +  q . R_t[t - t']  +  q . R_h[h - h']  +  q . R_w[w - w']

The added part is a sum of one number for each row, column and frame of the keys, so it is itself a
dot product: of the T' + H' + W' numbers of the query, and of a vector of the key that is 1 at the
key's own t', h' and w' and 0 elsewhere. Appended to q and to k they make plain fused attention
compute these logits, and memory grows with N (T' + H' + W') instead of N N.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GridAttention(nn.Module):
    """What all attention here has in common: the fused kernel, and where tokens are to each other.

    ``rel_pos_sides`` is (T, H, W) of the grid that the tables of relative positions are made for,
    of the finer one where queries and keys differ; 0 for an axis whose distances do not count, such
    as T of images; None for no relative positions. A table is (2 side - 1, head_dim), zeros at
    first.
    """

    rel_pos_t: Tensor | None
    rel_pos_h: Tensor | None
    rel_pos_w: Tensor | None

    def __init__(
        self, head_dim: int, attn_drop: float, rel_pos_sides: tuple[int, int, int] | None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attn_drop = attn_drop
        for axis, side in zip("thw", rel_pos_sides or (0, 0, 0), strict=True):
            table = nn.Parameter(torch.zeros(2 * side - 1, head_dim)) if side else None
            self.register_parameter(f"rel_pos_{axis}", table)

    def reset_parameters(self) -> None:
        """Let no distance count; the layers inside initialise themselves."""
        for table in (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w):
            if table is not None:
                nn.init.zeros_(table)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, …, head_dim) each -> (B, heads, N, head_dim), with N queries.

        With relative positions, what stands between is T, H, W; the keys' may differ.
        """
        dropout = self.attn_drop if self.training else 0.0
        tables = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        if any(table is not None for table in tables):
            return rel_pos_attention(q, k, v, tables, dropout)
        q, k, v = (x.flatten(2, -2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class Attention(GridAttention):
    """Multi-head self-attention over the grid, or within windows of it.

    Args (the others as for :class:`backbones.ViT`):
        dim: channels of a token; a ValueError if it is no multiple of ``num_heads``.
        window_size: side of the windows in tokens; 0 for attention over the whole grid.
        rel_pos_sides: as for :class:`GridAttention`, of a window where there are windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: int = 0,
        rel_pos_sides: tuple[int, int, int] | None = None,
    ) -> None:
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        super().__init__(dim // num_heads, attn_drop, rel_pos_sides)
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, C) -> (B, …, C); every dimension between is one of the token grid.

        Windows and relative positions need all of it, (B, T, H, W, C).
        """
        if not self.window_size:
            return self._attend_to_all(x)
        windows = self._attend_to_all(to_windows(x, self.window_size))
        return from_windows(windows, *x.shape[2:4])

    def _attend_to_all(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:-1], 3, self.num_heads, self.head_dim)
        # Each (B, heads, …, head_dim).
        q, k, v = (part.movedim(-2, 1) for part in qkv.unbind(-3))
        out = self.attend(q, k, v).transpose(1, 2).reshape(x.shape)
        return cast(Tensor, self.proj_drop(self.proj(out)))


def to_windows(x: Tensor, size: int) -> Tensor:
    """(B, T, H, W, C) -> (B ceil(H / size) ceil(W / size), T, size, size, C): square windows that
    do not overlap, row by row within each sample.

    A grid whose sides are no multiples of ``size`` is padded with zeros below and on the right. As
    in ViTDet nothing tells these tokens from others afterwards.
    """
    batch, time, height, width, channels = x.shape
    # Rounded up, as ONNX does it right: its division of negative numbers rounds towards zero.
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    if differ((rows * size, columns * size), (height, width)):
        x = F.pad(x, (0, 0, 0, columns * size - width, 0, rows * size - height))
    x = x.view(batch, time, rows, size, columns, size, channels).permute(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(batch * rows * columns, time, size, size, channels)


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`to_windows` of (B, T, height, width, C), the padding included."""
    count, time, size, _, channels = windows.shape
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    batch = count // (rows * columns)
    x = windows.reshape(batch, rows, columns, time, size, size, channels)
    x = x.permute(0, 3, 1, 4, 2, 5, 6).reshape(batch, time, rows * size, columns * size, channels)
    if torch.compiler.is_exporting():  # a slice would fix whether there is padding
        x = x.index_select(2, torch.arange(height, device=x.device))
        return x.index_select(3, torch.arange(width, device=x.device))
    return x[:, :, :height, :width]


def differ(sides: Sequence[int], others: Sequence[int]) -> bool:
    """Whether sizes differ; in a graph that is exported for any size they may."""
    if torch.compiler.is_exporting() and any(isinstance(x, torch.SymInt) for x in sides):
        return True
    return tuple(sides) != tuple(others)


def resize_table(table: Tensor, rows: int) -> Tensor:
    """(L, D) -> (rows, D), linearly, as relative positions of another grid. Floating point."""
    if not differ([rows], table.shape[:1]):
        return table
    return F.interpolate(table.t().unsqueeze(0), size=rows, mode="linear").squeeze(0).t()


def relative_rows(table: Tensor, q_side: int, k_side: int) -> Tensor:
    """The embedding of the distance of each query to each key on an axis, (q_side, k_side, D).

    As ``get_rel_pos`` in Detectron2 and SlowFast: distances are counted in steps of the finer of
    the two grids, and rounded down to a row of the table.

    Args:
        table: (2 S - 1, D), made for S steps; row S - 1 is distance 0. Resized linearly where the
            finer grid has another number of steps.
        q_side, k_side: steps of the grids of queries and keys.
    """
    table = resize_table(table, 2 * max(q_side, k_side) - 1)
    # In float32 whatever the default is: where one side does not divide the other, rounding decides
    # which row is taken, and it has to be the row that released models were trained with.
    steps = torch.arange(max(q_side, k_side), dtype=torch.float32, device=table.device)
    q_step, k_step = max(k_side / q_side, 1.0), max(q_side / k_side, 1.0)
    distance = steps[:q_side, None] * q_step - steps[:k_side] * k_step + (k_side - 1) * k_step
    return table[distance.long()]


# Kernels load 16 bytes at once: where a width is no multiple of this many halves, some refuse, and
# the N x N weights would come back through the kernel that is not fused.
_WIDTH_MULTIPLE = 8

# Numbers in the widened queries, or keys, of the heads that are attended to at once: 8 MiB in half
# precision. Values, outputs and the gradients of all four are as wide, and the latter need not be
# there for every head at the same time.
_AT_ONCE = 2**22


def rel_pos_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor | None], dropout_p: float = 0.0
) -> Tensor:
    """Scaled dot-product attention with decomposed relative positions.

    The relative positions are dotted with the queries as they are, not with the scaled ones, as in
    Detectron2 and SlowFast.

    Args:
        q: (B, heads, T, H, W, D), floating point.
        k, v: (B, heads, T', H', W', D), of ``q``'s dtype.
        tables: for the axes T, H, W one table each as in :func:`relative_rows`; None for an axis
            whose distances do not count, which is not all of them.

    Returns:
        (B, heads, T H W, D), of ``q``'s dtype.
    """
    heads, head_dim = q.shape[1], q.shape[-1]
    given = {axis: table for axis, table in enumerate(tables) if table is not None}
    # The kernel will scale what is appended along with the rest.
    rows = {
        "thw"[axis]: relative_rows(table, q.shape[2 + axis], k.shape[2 + axis]) * sqrt(head_dim)
        for axis, table in given.items()
    }
    places = _places(k, [*given])
    width = head_dim + places.shape[-1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [q]
        for axis, embedding in rows.items():
            parts.append(torch.einsum(f"bnthwc,{axis}kc->bnthwk", q, embedding).to(q.dtype))
        unused = width - sum(part.shape[-1] for part in parts)
        parts.append(q.new_zeros(1).expand(*q.shape[:-1], unused))
        wide_q = torch.cat(parts, dim=-1).flatten(2, 4)
        k, v = k.flatten(2, 4), v.flatten(2, 4)
        wide_k = torch.cat((k, places.expand(*k.shape[:2], -1, -1)), dim=-1)
        # FlashAttention and the fused kernel of the CPU want one width.
        wide_v = F.pad(v, (0, width - head_dim))
        wide, scale = (wide_q, wide_k, wide_v), 1 / sqrt(head_dim)
        out = F.scaled_dot_product_attention(*wide, dropout_p=dropout_p, scale=scale)
        return out[..., :head_dim]

    rounds = 1  # in a graph, for any batch
    if not torch.compiler.is_exporting():
        tokens = max(q.shape[:-1].numel(), k.shape[:-1].numel())
        rounds = -(-tokens * width // _AT_ONCE)
    share = -(-heads // rounds)
    groups = zip(q.split(share, 1), k.split(share, 1), v.split(share, 1), strict=True)
    return torch.cat([attend(*group) for group in groups], dim=1)


def _places(k: Tensor, axes: Sequence[int]) -> Tensor:
    """Where each key is: (T' H' W', width), for each of the axes a 1 at its place among zeros.

    Filled up with zeros to a width that, with that of ``k``, suits the kernels.
    """
    grid = k.shape[2:5]
    marks = []
    for axis in axes:
        mark = torch.eye(grid[axis], dtype=k.dtype, device=k.device)[:, None, None]
        marks.append(mark.movedim(0, axis).expand(*grid, -1))
    places = torch.cat(marks, dim=-1).flatten(0, 2)
    if torch.compiler.is_exporting():  # for which kernel, nobody knows yet
        return places
    return F.pad(places, (0, -(k.shape[-1] + places.shape[-1]) % _WIDTH_MULTIPLE))
