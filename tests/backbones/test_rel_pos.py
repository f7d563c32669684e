"""Relative positions inside fused attention are those of the dense formula, and never N x N."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor, prod, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones import MViT, RevMViT
from backbones.models import attention
from backbones.models.attention import Attention, rel_pos_attention, relative_rows
from backbones.models.pooled_attention import PooledAttention
from tests.backbones.helpers import random_model

Grid = tuple[int, int, int]

# The grids of queries and of keys, and the sides that the tables were made for; 0 for no table.
CASES: dict[str, tuple[Grid, Grid, Grid]] = {
    "window": ((1, 7, 7), (1, 7, 7), (0, 7, 7)),
    "whole grid, not square": ((1, 5, 9), (1, 5, 9), (0, 5, 9)),
    "coarser keys": ((1, 8, 6), (1, 4, 2), (0, 8, 6)),
    "finer keys": ((1, 3, 4), (1, 6, 8), (0, 6, 8)),
    "coarser keys, odd": ((1, 7, 5), (1, 4, 3), (0, 7, 5)),
    "clip": ((3, 4, 5), (3, 4, 5), (3, 4, 5)),
    "clip, coarser keys": ((4, 6, 4), (2, 3, 2), (4, 6, 4)),
    "tables of a smaller grid": ((1, 6, 9), (1, 6, 9), (0, 4, 5)),
    "tables of a larger grid": ((2, 3, 4), (2, 3, 4), (5, 8, 7)),
    "one row, and a table of one": ((1, 1, 6), (1, 1, 6), (0, 1, 1)),
    "one axis only": ((1, 4, 3), (1, 4, 3), (0, 0, 3)),
}


def resized(table: Tensor, rows: int) -> Tensor:
    """Linear interpolation by hand: rows are centres of cells, the ends go on as they are."""
    new = []
    for row in range(rows):
        place = min(max((row + 0.5) * len(table) / rows - 0.5, 0.0), len(table) - 1)
        low, share = int(place), place - int(place)
        new.append(table[low] * (1 - share) + table[min(low + 1, len(table) - 1)] * share)
    return torch.stack(new)


def dense_rows(table: Tensor, q_side: int, k_side: int) -> Tensor:
    """One embedding for each pair, by exact fractions."""
    finest = max(q_side, k_side)
    table = resized(table, 2 * finest - 1)
    q_step, k_step = Fraction(finest, q_side), Fraction(finest, k_side)
    return torch.stack(
        [
            torch.stack(
                [table[floor(i * q_step - (j - k_side + 1) * k_step)] for j in range(k_side)]
            )
            for i in range(q_side)
        ]
    )


def dense(q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor | None]) -> Tensor:
    """The formula as it stands, with a bias for each pair of tokens."""
    logits = torch.einsum("bnthwc,bnxyzc->bnthwxyz", q, k) / sqrt(q.shape[-1])
    for axis, table in enumerate(tables):
        if table is None:
            continue
        a, b = "thw"[axis], "xyz"[axis]
        rows = dense_rows(table, q.shape[2 + axis], k.shape[2 + axis])
        bias = torch.einsum(f"bnthwc,{a}{b}c->bnthw{b}", q, rows)
        shape = [*q.shape[:5], 1, 1, 1]
        shape[5 + axis] = k.shape[2 + axis]
        logits = logits + bias.reshape(shape)
    weights = logits.flatten(5).flatten(2, 4).softmax(-1)
    return weights @ v.flatten(2, 4)


def make_tensors(case: str, head_dim: int = 6, heads: int = 3) -> list[Tensor | None]:
    """q, k, v and the tables, far from zero."""
    q_grid, k_grid, sides = CASES[case]
    torch.manual_seed(0)
    tensors: list[Tensor | None] = [
        torch.randn(2, heads, *grid, head_dim, dtype=torch.float64, requires_grad=True)
        for grid in (q_grid, k_grid, k_grid)
    ]
    tensors += [
        torch.randn(2 * side - 1, head_dim, dtype=torch.float64, requires_grad=True)
        if side
        else None
        for side in sides
    ]
    return tensors


def outputs_and_grads(attention: Any, tensors: list[Tensor | None]) -> list[Tensor]:
    q, k, v, *tables = tensors
    out = attention(q, k, v, tables)
    ramp = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)
    wanted = [tensor for tensor in tensors if tensor is not None]
    return [out, *torch.autograd.grad((out * ramp * (out + ramp)).sum(), wanted)]


@pytest.mark.parametrize("at_once", (2**22, 500), ids=("all heads at once", "in rounds"))
@pytest.mark.parametrize("case", CASES)
def test_dense_formula(case: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_AT_ONCE", at_once)
    tensors = make_tensors(case)
    fused = outputs_and_grads(rel_pos_attention, tensors)
    for ours, theirs in zip(fused, outputs_and_grads(dense, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_tables_make_a_difference() -> None:
    """The comparison above would pass if nobody looked at them."""
    tensors = make_tensors("clip")
    out = rel_pos_attention(*tensors[:3], tensors[3:])
    for index in (3, 4, 5):
        others = [None if i == index else tensor for i, tensor in enumerate(tensors)]
        without = rel_pos_attention(*others[:3], others[3:])
        assert (without - out).abs().max() > 0.1


class _Kernels(TorchDispatchMode):
    """The names of the operators that ran, and the largest tensor among their results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("grid", ((32, 32), (31, 27)), ids=str)
def test_nothing_is_as_large_as_pairs_of_tokens(grid: tuple[int, int]) -> None:
    attention = Attention(32, 2, rel_pos_sides=(0, *grid))
    tokens = prod(grid)
    with _Kernels() as kernels:
        attention(torch.randn(1, 1, *grid, 32)).sum().backward()
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in kernels.names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in kernels.names
    assert kernels.largest < tokens * tokens / 4


def test_widths_are_those_that_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of 8, the same for all three: else a GPU falls back to N x N weights."""
    widths = []
    fused = nn.functional.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        widths.append({q.shape[-1], k.shape[-1], v.shape[-1]})
        return fused(q, k, v, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    for case in CASES:
        q, k, v, *tables = make_tensors(case)
        rel_pos_attention(q, k, v, tables)
    assert all(len(width) == 1 and width.pop() % 8 == 0 for width in widths)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = Attention(32, 2, rel_pos_sides=(0, 6, 7))
    nn.init.normal_(attention.rel_pos_h)
    nn.init.normal_(attention.rel_pos_w)
    x = torch.randn(2, 1, 6, 7, 32)
    with torch.autocast("cpu", dtype):
        half = attention(x)
    assert half.dtype == dtype
    out = attention(x)
    assert (half.float() - out).abs().max() < 0.03 * out.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("grid", ((64, 64), (50, 67)), ids=str)
def test_on_a_gpu(grid: tuple[int, int]) -> None:
    """A global block of ViTDet's base size, in less than what N x N weights alone would take."""
    attention = Attention(768, 12, rel_pos_sides=(0, *grid))
    nn.init.normal_(attention.rel_pos_h, std=0.1)
    nn.init.normal_(attention.rel_pos_w, std=0.1)
    x = torch.randn(1, 1, *grid, 768)
    expected = attention(x).detach()
    attention.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        out = attention(x.cuda())
    out.float().square().sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{grid}: {peak / 2**20:.0f} MiB")
    assert peak < 12 * prod(grid) ** 2 * 2
    assert (out.float().cpu() - expected).abs().max() < 0.03 * expected.abs().max()


# ---- Detectron2's own code, where it is installed


def test_rows_of_detectron2() -> None:
    """Which row is taken where distances are no whole numbers is decided by rounding in float32."""
    utils = pytest.importorskip("detectron2.modeling.backbone.utils")
    for q_side in range(1, 44):
        for k_side in range(1, 44):
            table = torch.arange(2.0 * max(q_side, k_side) - 1)[:, None]
            theirs = utils.get_rel_pos(q_side, k_side, table)
            assert torch.equal(relative_rows(table, q_side, k_side), theirs), (q_side, k_side)


@pytest.mark.parametrize("grid", ((6, 6), (5, 8)), ids=str)
def test_attention_of_vitdet(grid: tuple[int, int]) -> None:
    vit = pytest.importorskip("detectron2.modeling.backbone.vit")
    theirs = vit.Attention(
        12, 3, use_rel_pos=True, rel_pos_zero_init=False, input_size=(6, 6)
    ).double()
    ours = Attention(12, 3, rel_pos_sides=(0, 6, 6)).double()
    ours.load_state_dict(theirs.state_dict())
    for param in ours.parameters():
        nn.init.normal_(param)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x[:, None])[:, 0], theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strides", ((1, 1), (1, 2), (2, 2), (2, 1)), ids=str)
@pytest.mark.parametrize("grid", ((8, 8), (5, 7)), ids=str)
def test_attention_of_mvitv2(grid: tuple[int, int], strides: tuple[int, int]) -> None:
    """Relative positions and residual pooling, and the tables' names and sizes."""
    mvit = pytest.importorskip("detectron2.modeling.backbone.mvit")
    q_stride, kv_stride = strides
    theirs = mvit.MultiScaleAttention(
        8,
        12,
        2,
        stride_q=q_stride,
        stride_kv=kv_stride,
        use_rel_pos=True,
        input_size=(8, 8),
        norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
    ).double()
    ours = PooledAttention(
        8,
        12,
        2,
        (1, 3, 3),
        (1, kv_stride, kv_stride),
        (1, q_stride, q_stride),
        residual_pooling=True,
        rel_pos_grid=(0, 8, 8),
    ).double()
    for param in theirs.parameters():
        nn.init.normal_(param)
    ours.load_state_dict(
        {
            name: value.unsqueeze(2) if value.ndim == 4 else value
            for name, value in theirs.state_dict().items()
        }
    )
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x[:, None])[:, 0], theirs(x), rtol=1e-10, atol=1e-10)


def test_logits_of_slowfasts_mvitv2() -> None:
    """By torchvision's port of it, whose released weights are SlowFast's. It has a class token."""
    mvit = pytest.importorskip("torchvision.models.video.mvit")
    for q_grid, k_grid in (((4, 6, 6), (2, 3, 3)), ((3, 5, 4), (3, 5, 4)), ((2, 3, 3), (4, 6, 6))):
        q, k = (torch.randn(2, 3, *grid, 8, dtype=torch.float64) for grid in (q_grid, k_grid))
        sides = map(max, q_grid, k_grid)
        time, *space = (torch.randn(2 * side - 1, 8, dtype=torch.float64) for side in sides)
        v = torch.eye(prod(k_grid), dtype=torch.float64)[:, :8].view(*k_grid, 8).expand_as(k)
        ours = rel_pos_attention(q, k, v, [time, *space])  # the weights of the first eight keys
        flat_q, flat_k = q.flatten(2, 4), k.flatten(2, 4)
        logits = nn.functional.pad(flat_q @ flat_k.mT / sqrt(8), (1, 0, 1, 0))
        padded_q = nn.functional.pad(flat_q, (0, 0, 1, 0))
        logits = mvit._add_rel_pos(logits, padded_q, q_grid, k_grid, *space, time)
        theirs = logits[..., 1:, 1:].softmax(-1)[..., :8]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- Multiscale models with the options of MViTv2

SMALL = {
    "img_size": 32,
    "embed_dim": 6,
    "depth": 5,
    "transitions": (1, 3),
    "num_classes": 3,
    "use_rel_pos": True,
    "residual_pooling": True,
    "drop_path_rate": 0.3,
}


def test_sizes_of_the_tables() -> None:
    """Of the finer of the grids of queries and keys, for the configured size."""

    def sides(model: MViT) -> list[tuple[int, ...]]:
        return [
            tuple((len(table) + 1) // 2 for name, table in module.named_parameters(recurse=False))
            for module in model.modules()
            if isinstance(module, PooledAttention)
        ]

    arguments = {**SMALL, "img_size": (64, 40)}  # grids of 16 x 10, 8 x 5 and 4 x 3
    # The second transition's keys, not strided any more, are on the finer grid.
    assert sides(RevMViT(**arguments)) == [(16, 10), (8, 5), (8, 5), (8, 5), (4, 3)]
    arguments["num_frames"] = 6
    assert sides(MViT(**arguments)) == [(3, 16, 10), (3, 8, 5), (3, 8, 5), (3, 8, 5), (3, 4, 3)]


def test_options_are_off_by_default() -> None:
    assert not [name for name in RevMViT(embed_dim=4).state_dict() if "rel_pos" in name]
    plain = random_model(RevMViT, **{**SMALL, "use_rel_pos": False}).eval()
    other = random_model(
        RevMViT, **{**SMALL, "use_rel_pos": False, "residual_pooling": False}
    ).eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert (plain(images) - other(images)).abs().max() > 0.01
