"""Pooled attention and the stage transition of multiscale vision transformers.

Pooling attention is that of MViT (Fan et al., ICCV 2021, arXiv 2104.11227, section 3.1), in the
form that Rev-MViT uses (Mangalam et al., CVPR 2022, arXiv 2302.04869, section 3.3; SlowFast,
``slowfast/models/attention.py`` and ``reversible_mvit.py``).
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from backbones.engine.policies import Block, add_branch
from backbones.models.attention import GridAttention
from backbones.models.layers import MLP, NORM_EPS, AttentionBranch, MLPBranch

# How two streams become one, by the names of the original configurations.
Fusion = Literal["avg", "concat", "concat_linear_2"]

# In time, height and width.
Triple = tuple[int, int, int]


class PooledAttention(GridAttention):
    """Multi-head attention whose keys and values, and at times queries, live on a coarser grid.

    Pooling is a depthwise convolution over the grid, with one kernel that all heads share, and a
    layer norm over the channels of a head.

    Args (the others as for :class:`backbones.MViT`):
        dim, dim_out: channels of a token at the input and at the output; the projection to q, k
            and v changes the width. A ValueError if ``dim_out`` is no multiple of ``num_heads``.
        kernel: size of every pooling kernel in (T, H, W), odd.
        kv_stride, q_stride: (T, H, W) strides of the pooling of keys and values, and of queries,
            which None leaves as they are.
        residual_pooling: as in MViTv2 (arXiv 2112.01526, section 4.1).
        rel_pos_grid: (T, H, W) of the input that tables of relative positions are made for, T = 0
            for images; None for no relative positions.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        kernel: Triple,
        kv_stride: Triple,
        q_stride: Triple | None = None,
        qkv_bias: bool = True,
        residual_pooling: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rel_pos_grid: Triple | None = None,
    ) -> None:
        if dim_out % num_heads:
            raise ValueError(f"width {dim_out} is not divisible by num_heads {num_heads}")
        sides = None
        if rel_pos_grid is not None:  # of the finer grid, of queries or of keys
            strides = map(min, kv_stride, q_stride or (1, 1, 1))
            t, h, w = (-(-side // step) for side, step in zip(rel_pos_grid, strides, strict=True))
            sides = (t, h, w)
        super().__init__(dim_out // num_heads, attn_drop, sides)
        self.dim, self.dim_out = dim, dim_out
        self.num_heads = num_heads
        self.residual_pooling = residual_pooling
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        # Present even where the stride is 1, as in the released models.
        self.pool_k, self.norm_k = self._make_pool(kernel, kv_stride)
        self.pool_v, self.norm_v = self._make_pool(kernel, kv_stride)
        self.pool_q: nn.Conv3d | None = None
        self.norm_q: nn.LayerNorm | None = None
        if q_stride is not None:
            self.pool_q, self.norm_q = self._make_pool(kernel, q_stride)
        self.proj = nn.Linear(dim_out, dim_out)
        self.proj_drop = nn.Dropout(proj_drop)

    def _make_pool(self, kernel: Triple, stride: Triple) -> tuple[nn.Conv3d, nn.LayerNorm]:
        channels, padding = self.head_dim, (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        conv = nn.Conv3d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
        return conv, nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, dim) -> (B, T', H', W', dim_out), on the grid of the queries."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        qkv = qkv.permute(4, 0, 5, 6, 1, 2, 3)  # (3, B, heads, head_dim, T, H, W)
        if self.pool_q is not None:
            # All three are copied for the convolutions anyway: at once, the original need not
            # stay until the last one is.
            qkv = qkv.contiguous()
        q, k, v = qkv.unbind(0)
        q = self._pool_q(q)
        k = _pool(k, self.pool_k, self.norm_k)
        v = _pool(v, self.pool_v, self.norm_v)
        out = self.attend(q, k, v)
        if self.residual_pooling:
            out = out + q.flatten(2, 4)
        # The grid is the convolution's own, so odd sides need no bookkeeping.
        out = out.transpose(1, 2).reshape(x.shape[0], *q.shape[2:5], self.dim_out)
        return cast(Tensor, self.proj_drop(self.proj(out)))

    def pool_like_queries(self, x: Tensor) -> Tensor:
        """(B, T, H, W, dim_out) -> (B, T', H', W', dim_out), through the pooling of the queries.

        For the residual path around this module, which shares ``pool_q`` and ``norm_q`` with it.
        """
        heads = x.unflatten(-1, (self.num_heads, self.head_dim)).permute(0, 4, 5, 1, 2, 3)
        return self._pool_q(heads).permute(0, 2, 3, 4, 1, 5).flatten(-2)

    def _pool_q(self, q: Tensor) -> Tensor:
        if self.pool_q is None or self.norm_q is None:
            return q.movedim(2, -1)
        return _pool(q, self.pool_q, self.norm_q)


def _pool(x: Tensor, conv: nn.Conv3d, norm: nn.LayerNorm) -> Tensor:
    """(B, heads, head_dim, T, H, W) -> (B, heads, T', H', W', head_dim), as ``conv`` strides.

    In ``x``'s dtype also where autocast has the norm make float32 of half precision.
    """
    # Contiguous with the channels first, although channels last would save a transposition with
    # one head: in that layout oneDNN's bfloat16 gradient of a depthwise kernel of 3 frames is
    # noise where the clip has 2 (torch 2.15 on a CPU with AMX).
    pooled = norm(conv(x.flatten(0, 1).contiguous()).movedim(1, -1))
    return cast(Tensor, pooled.to(x.dtype).unflatten(0, x.shape[:2]))


class PooledAttentionBranch(AttentionBranch):
    """F of the paper for multiscale models: layer norm, then pooled attention. No residual.

    Arguments as for :class:`PooledAttention`. (B, T, H, W, dim) -> (B, T', H', W', dim_out).
    """

    attention = PooledAttention
    attn: PooledAttention


class StageTransition(Block):
    """The block that opens a stage: fewer tokens, more channels, one stream out.

    With ``h`` the input, fused where it comes in two streams, ``r`` the same brought to the new
    width and grid, and the drop-path mask ``m``::

        u = r + m f(h)        out = u + m g(u)

    ``r`` runs through the query pooling of ``f`` itself, convolution and norm, so these weights
    get gradients from two paths. The block cannot be inverted: under the ``"reversible"`` memory
    policy it is checkpointed.

    Drop path acts on the two residual branches. The original implementation multiplies the whole
    output by the mask, so that a dropped sample becomes all zeros and, behind it, the image is
    lost; evaluation and training without drop path are the same in both.

    ``f`` pools its queries and maps the fused width to the new one, at which ``g`` is. ``fusion``
    ``"avg"`` takes the mean of two streams, ``"concat"`` puts them side by side,
    ``"concat_linear_2"`` adds an MLP of hidden ratio 2 to that; None is for one stream.
    """

    f: PooledAttentionBranch

    def __init__(
        self,
        f: PooledAttentionBranch,
        g: MLPBranch,
        fusion: Fusion | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(f, g, drop_path)
        dim, dim_out = f.attn.dim, f.attn.dim_out
        if fusion is not None:  # in a reversible model, whose policy is "reversible" at first
            self.memory_policy = "checkpoint"
        self.fusion = fusion
        self.fuse = MLP(dim, 2 * dim) if fusion == "concat_linear_2" else None
        self.res_proj = nn.Linear(dim, dim_out) if dim != dim_out else None
        # Saved optimizers know parameters by their number: the branches' come last.
        for name in ("f", "g"):
            self._modules[name] = self._modules.pop(name)

    def forward(self, *streams: Tensor) -> Tensor:
        """One stream or two, (B, T, H, W, C) each -> (B, T', H', W', C')."""
        mask = self.draw_mask(streams[0])
        # One after the other, so that with checkpoints the backward pass never has the activations
        # of both. The streams apart, because the block behind keeps these same two tensors: fused
        # out here they would be held a second time.
        x = self.run(self._add_attention, mask, *streams)
        return self.run(self._add_mlp, mask, x)

    def _add_attention(self, mask: Tensor | None, *streams: Tensor) -> Tensor:
        if self.fuse is None:
            h = self._fuse(*streams)
        else:  # once more on its own: its activations are large, and needed last
            h = self.run(self._fuse, *streams)
        r = h if self.res_proj is None else self.res_proj(h)
        return add_branch(self.f.attn.pool_like_queries(r), self.f(h), mask)

    def _add_mlp(self, mask: Tensor | None, x: Tensor) -> Tensor:
        return add_branch(x, self.g(x), mask)

    def _fuse(self, *streams: Tensor) -> Tensor:
        if self.fusion is None:
            (x,) = streams
            return x
        y1, y2 = streams
        if self.fusion == "avg":
            return (y1 + y2) / 2
        x = torch.cat((y1, y2), dim=-1)
        return x if self.fuse is None else x + self.fuse(x)

    def extra_repr(self) -> str:
        return f"fusion={self.fusion!r}, {super().extra_repr()}"
