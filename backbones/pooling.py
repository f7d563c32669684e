"""Pooled attention and the stage transition of multiscale vision transformers.

Pooling attention is that of MViT (Fan et al., ICCV 2021, arXiv 2104.11227, section 3.1), in the
form that Rev-MViT uses (Mangalam et al., CVPR 2022, arXiv 2302.04869, section 3.3; SlowFast,
``slowfast/models/attention.py`` and ``reversible_mvit.py``).
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.layers import MLP, NORM_EPS, MLPBranch
from backbones.memory import MemoryManaged
from backbones.reversible import add_branch, drop_path_mask

__all__ = ["Fusion", "PooledAttention", "PooledAttentionBranch", "StageTransition"]

# How two streams become one, by the names of the original configurations.
Fusion = Literal["avg", "concat", "concat_linear_2"]

Triple = tuple[int, int, int]


class PooledAttention(nn.Module):
    """Multi-head attention whose keys and values, and at times queries, live on a coarser grid.

    Pooling is a depthwise convolution over the grid, with one kernel that all heads share, and a
    layer norm over the channels of a head.

    Args:
        dim: channels of a token at the input.
        dim_out: channels of a token at the output; the projection to q, k and v changes the width.
        num_heads: heads; divides ``dim_out``.
        kernel: size of every pooling kernel in (T, H, W), odd.
        kv_stride: (T, H, W) strides of the pooling of keys and values.
        q_stride: (T, H, W) strides of the pooling of queries; None leaves them as they are.
        qkv_bias: whether the projections to q, k and v have a bias.
        attn_drop: dropout on the attention weights.
        proj_drop: dropout on the output.

    Raises:
        ValueError: ``dim_out`` is no multiple of ``num_heads``.
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
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim_out % num_heads:
            raise ValueError(f"width {dim_out} is not divisible by num_heads {num_heads}")
        self.dim, self.dim_out = dim, dim_out
        self.num_heads = num_heads
        self.head_dim = dim_out // num_heads
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        # Present even where the stride is 1, as in the released models.
        self.pool_k, self.norm_k = self._make_pool(kernel, kv_stride)
        self.pool_v, self.norm_v = self._make_pool(kernel, kv_stride)
        self.pool_q: nn.Conv3d | None = None
        self.norm_q: nn.LayerNorm | None = None
        if q_stride is not None:
            self.pool_q, self.norm_q = self._make_pool(kernel, q_stride)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim_out, dim_out)
        self.proj_drop = nn.Dropout(proj_drop)

    def _make_pool(self, kernel: Triple, stride: Triple) -> tuple[nn.Conv3d, nn.LayerNorm]:
        channels = self.head_dim
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        conv = nn.Conv3d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
        return conv, nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, dim) -> (B, T', H', W', dim_out), on the grid of the queries."""
        qkv = self.qkv(x).view(*x.shape[:-1], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(4, 0, 5, 1, 2, 3, 6).unbind(0)  # (B, heads, T, H, W, head_dim)
        q = self._pool_heads(q)
        k = _pool(k, self.pool_k, self.norm_k)
        v = _pool(v, self.pool_v, self.norm_v)
        out = F.scaled_dot_product_attention(
            q.flatten(2, 4),
            k.flatten(2, 4),
            v.flatten(2, 4),
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        # The grid is the convolution's own, so odd sides need no bookkeeping.
        out = out.transpose(1, 2).reshape(x.shape[0], *q.shape[2:5], self.dim_out)
        return cast(Tensor, self.proj_drop(self.proj(out)))

    def pool_like_queries(self, x: Tensor) -> Tensor:
        """(B, T, H, W, dim_out) -> (B, T', H', W', dim_out), through the pooling of the queries.

        For the residual path around this module, which shares ``pool_q`` and ``norm_q`` with it.
        """
        heads = x.view(*x.shape[:-1], self.num_heads, self.head_dim).permute(0, 4, 1, 2, 3, 5)
        return self._pool_heads(heads).permute(0, 2, 3, 4, 1, 5).flatten(-2)

    def _pool_heads(self, q: Tensor) -> Tensor:
        if self.pool_q is None or self.norm_q is None:
            return q
        return _pool(q, self.pool_q, self.norm_q)


def _pool(x: Tensor, conv: nn.Conv3d, norm: nn.LayerNorm) -> Tensor:
    """(B, heads, T, H, W, head_dim) -> the same on the grid that the strides of ``conv`` leave."""
    # Contiguous with the channels first, although channels last would save a transposition with
    # one head: in that layout oneDNN's bfloat16 gradient of a depthwise kernel of 3 frames is
    # noise where the clip has 2 (torch 2.15 on a CPU with AMX).
    channels_first = x.permute(0, 1, 5, 2, 3, 4).flatten(0, 1).contiguous()
    pooled = norm(conv(channels_first).movedim(1, -1))
    return cast(Tensor, pooled.view(*x.shape[:2], *pooled.shape[1:]))


class PooledAttentionBranch(nn.Module):
    """F of the paper for multiscale models: layer norm, then pooled attention. No residual.

    Arguments as for :class:`PooledAttention`.
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
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = PooledAttention(
            dim, dim_out, num_heads, kernel, kv_stride, q_stride, qkv_bias, attn_drop, proj_drop
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, dim) -> (B, T', H', W', dim_out)."""
        return cast(Tensor, self.attn(self.norm(x)))


class StageTransition(MemoryManaged):
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

    Args:
        f: attention that pools its queries and maps the fused width to the new one.
        g: the MLP at the new width.
        fusion: ``"avg"`` takes the mean of two streams, ``"concat"`` puts them side by side,
            ``"concat_linear_2"`` adds an MLP of hidden ratio 2 to that; None for one stream.
        drop_path: the probability that a sample skips both branches in training, in [0, 1).

    Attributes:
        memory_policy: until :func:`backbones.set_memory` says otherwise, ``"checkpoint"`` between
            two streams, ``"store"`` in one.

    Raises:
        ValueError: ``drop_path`` outside [0, 1).
    """

    def __init__(
        self,
        f: PooledAttentionBranch,
        g: MLPBranch,
        fusion: Fusion | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        dim, dim_out = f.attn.dim, f.attn.dim_out
        if fusion is not None:  # in a reversible model, whose policy is "reversible" at first
            self.memory_policy = "checkpoint"
        self.fusion = fusion
        self.fuse = MLP(dim, 2 * dim) if fusion == "concat_linear_2" else None
        self.res_proj = nn.Linear(dim, dim_out) if dim != dim_out else None
        self.f = f
        self.g = g
        self.drop_path = float(drop_path)

    def forward(self, *streams: Tensor) -> Tensor:
        """One stream or two, (B, T, H, W, C) each -> (B, T', H', W', C')."""
        mask = drop_path_mask(streams[0], self.drop_path, self.training)
        if self.memory_policy == "checkpoint" and torch.is_grad_enabled():
            # The streams apart, because the block behind keeps these same two tensors: fused out
            # here they would be held a second time.
            return checkpoint(self._cross, mask, *streams, use_reentrant=False)
        return self._cross(mask, *streams)

    def _cross(self, mask: Tensor | None, *streams: Tensor) -> Tensor:
        h = self._fuse(*streams)
        r = h if self.res_proj is None else self.res_proj(h)
        x = add_branch(self.f.attn.pool_like_queries(r), self.f(h), mask)
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
        return (
            f"fusion={self.fusion!r}, drop_path={self.drop_path}, "
            f"memory_policy={self.memory_policy!r}"
        )
