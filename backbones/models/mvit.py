"""Rev-MViT (arXiv 2302.04869, section 3.3) and its non-reversible twin, for images and clips.

A multiscale vision transformer (MViT, Fan et al., ICCV 2021, arXiv 2104.11227) starts with many
narrow tokens; each stage transition halves the sides of the grid and doubles the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import get_args

from torch import Tensor, nn

from backbones.models import layers
from backbones.models.layers import MLPBranch, drop_path_rates
from backbones.models.pooled_attention import Fusion, PooledAttentionBranch, StageTransition, Triple
from backbones.models.trunk import Fuse, Trunk, run_blocks

# Strides of the stem in time and in space.
_STEM_STRIDE = (2, 4)


class Stage(nn.Module):
    """A transition, except in the first stage, and the blocks behind it on one grid."""

    def __init__(self, transition: StageTransition | None, blocks: nn.Module) -> None:
        super().__init__()
        self.transition = transition
        self.blocks = blocks

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        """One stream or two, (B, T, H, W, C) each, to as many as the blocks have."""
        if self.transition is None:
            (x,) = streams
        else:
            x = self.transition(*streams)
        return run_blocks(self.blocks, x)


class MViT(Trunk):
    """Multiscale vision transformer without a class token: stem, stages, norm, mean, head.

    The twin of :class:`RevMViT`: one stream where that has two, as wide as one of the two
    (``embed_dim``, doubled by each transition), so that every block inside a stage has the same
    branches in both. Its transitions map ``C`` channels to ``2 C`` inside their attention, with a
    linear layer on the residual path, as the reversible ones with ``fusion="avg"`` do; so the two
    differ in the coupling, and in the final norm and the head, which see ``C`` instead of ``2 C``.

    At the default size this is MViT-B (96 channels and one head, both doubled at blocks 1, 3 and
    14 of 16), with the details of Rev-MViT: no class token, channels grow in the attention instead
    of in the MLP before, convolution instead of max pooling on the residual path. Hence released
    weights of MViT-B do not fit.

    Args:
        img_size: (H, W) or a side, in pixels, that the position embedding is made for. Any other
            size works at run time; the embedding is resized.
        num_frames: None for images; for clips, the length that the position embedding is made
            for. Any other length works at run time.
        embed_dim: channels of a token, of one stream, in the first stage.
        depth: number of blocks, transitions included.
        num_heads: attention heads in the first stage; divides ``embed_dim``.
        transitions: the indices of the blocks that open a new stage, from 1 on, rising.
        kv_stride: spatial stride of keys and values in the first stage. Each transition halves
            it along with the grid, so the number of keys stays the same until it is down to 1.
        use_rel_pos: decomposed relative positions in every block, in space and for clips in time
            (MViTv2, arXiv 2112.01526; see :mod:`backbones.models.attention`), all zeros at first.
        residual_pooling: whether the queries are added to the output of the attention (MViTv2).
        fusion: how a transition of :class:`RevMViT` makes one stream out of two: ``"avg"``,
            ``"concat"``, or ``"concat_linear_2"``, which is what None stands for.
        fuse: as for :class:`backbones.ViT`, of the features of every stage.
        in_chans, num_classes, mlp_ratio, qkv_bias, and the rates of dropout and stochastic depth:
            as for :class:`backbones.ViT`.

    Raises:
        ValueError: ``transitions`` that do not rise within 1 … ``depth - 1``; ``embed_dim`` no
            multiple of ``num_heads``; ``fusion`` for a model of one stream, or an unknown one.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_frames: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depth: int = 16,
        num_heads: int = 1,
        transitions: Sequence[int] = (1, 3, 14),
        kv_stride: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        residual_pooling: bool = False,
        fusion: Fusion | None = None,
        fuse: Fuse | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, clips=num_frames is not None, fuse=fuse)
        bounds = [0, *transitions, depth]
        if any(first >= following for first, following in pairwise(bounds)):
            given = f"{tuple(transitions)} for depth {depth}"
            raise ValueError(f"transitions must rise within 1 … depth - 1, got {given}")
        fusion = _choose_fusion(fusion, self.streams)
        grid = _stem_grid(img_size, num_frames)
        self.patch_embed = layers.ConvEmbed(in_chans, embed_dim, self.clips)
        self.pos_embed: nn.Module = (
            layers.SpaceTimePositionEmbedding(grid, embed_dim)
            if self.clips
            else layers.PositionEmbedding(grid[1:], embed_dim)
        )
        self.pos_drop = nn.Dropout(pos_drop_rate)

        rates = drop_path_rates(drop_path_rate, depth)
        stages: list[Stage] = []
        feature_info: list[dict[str, int]] = []
        rel_pos_grid = grid if use_rel_pos else None
        for index, (first, following) in enumerate(pairwise(bounds)):
            dim = embed_dim * 2**index
            stride = max(kv_stride // 2**index, 1)
            attention = partial(
                PooledAttentionBranch,
                num_heads=num_heads * 2**index,
                kernel=(3 if self.clips else 1, 3, 3),
                kv_stride=(1, stride, stride),
                qkv_bias=qkv_bias,
                residual_pooling=residual_pooling,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
            )
            mlp = partial(MLPBranch, dim, mlp_ratio, proj_drop_rate)
            transition = None
            if index > 0:
                # Side by side, two streams are as wide as one stream of this stage.
                dim_in = dim if fusion in ("concat", "concat_linear_2") else dim // 2
                f = attention(dim_in, dim, q_stride=(1, 2, 2), rel_pos_grid=rel_pos_grid)
                transition = StageTransition(f, mlp(), fusion, rates[first])
                first += 1
                grid = (grid[0], -(-grid[1] // 2), -(-grid[2] // 2))
                rel_pos_grid = grid if use_rel_pos else None
            blocks = [
                (attention(dim, dim, rel_pos_grid=rel_pos_grid), mlp(), rate)
                for rate in rates[first:following]
            ]
            stages.append(Stage(transition, self._stack(blocks)))
            reduction = _STEM_STRIDE[1] * 2**index
            feature_info.append({"num_chs": self.width * dim, "reduction": reduction})
        self.stages = nn.ModuleList(stages)
        self._finish(feature_info, drop_rate)

    def stage_streams(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """What each stage ends with, one or two grids (B, T, H, W, C), before any norm.

        For those who run what lies behind again, and keep it alone: :meth:`map_of` makes a map of
        :meth:`feature_maps` of each.
        """
        streams: tuple[Tensor, ...] = (self.pos_drop(self.pos_embed(self.patch_embed(x))),)
        return [streams := stage(*streams) for stage in self.stages]

    def map_of(self, index: int, streams: tuple[Tensor, ...]) -> Tensor:
        """The map of a stage, of what it ends with."""
        return self._as_map(self._grid_of(index, streams))

    def _grid_of(self, index: int, streams: tuple[Tensor, ...]) -> Tensor:
        grid = self.join(streams)
        return self.norm(grid) if index == len(self.stages) - 1 else grid

    def _forward_grids(self, x: Tensor, every_stage: bool) -> tuple[list[Tensor], Tensor]:
        ends = [*enumerate(self.stage_streams(x))]
        grids = [self._grid_of(*end) for end in (ends if every_stage else ends[-1:])]
        return grids, grids[-1].flatten(1, 3)


class RevMViT(MViT):
    """Reversible multiscale vision transformer: two streams, rebuilt backwards within each stage.

    Arguments as for :class:`MViT`. Each stage starts with two copies of one stream and ends with
    two, of ``embed_dim`` channels in the first stage and twice as many after each transition, so
    ``num_features`` is twice the width of the last stage. Transitions cannot be inverted: they are
    checkpointed under the ``"reversible"`` memory policy, which a new model has;
    :func:`backbones.set_memory` changes it, and counts transitions as blocks.

    The defaults are the released model for images. The one for clips of 16 frames has
    ``num_frames=16, num_classes=400, kv_stride=8, qkv_bias=False, fusion="avg"``.
    """

    streams = 2


def _choose_fusion(fusion: Fusion | None, streams: int) -> Fusion | None:
    if fusion is None:
        return "concat_linear_2" if streams == 2 else None
    if streams == 1:
        raise ValueError(f"MViT has one stream and nothing to fuse, got fusion {fusion!r}")
    if fusion not in get_args(Fusion):
        known = ", ".join(repr(name) for name in get_args(Fusion))
        raise ValueError(f"fusion {fusion!r} does not exist; choose one of {known}")
    return fusion


def _stem_grid(img_size: int | tuple[int, int], num_frames: int | None) -> Triple:
    """(T, H, W) of the tokens, rounded up as by the stem; T = 0 for images."""
    stride_t, stride = _STEM_STRIDE
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return -(-(num_frames or 0) // stride_t), -(-height // stride), -(-width // stride)
