"""Rev-ViT (arXiv 2302.04869, section 3.2) and its non-reversible twin.

With windows and relative positions they are the trunks of ViTDet (arXiv 2203.16527).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from backbones.models.layers import (
    AttentionBranch,
    MLPBranch,
    PatchEmbed,
    PositionEmbedding,
    drop_path_rates,
)
from backbones.models.trunk import Trunk, join, run_blocks


class ViT(Trunk):
    """Vision transformer without a class token: patches, blocks, norm, mean over tokens, head.

    Args:
        img_size: (H, W) or a side, in pixels, that the position embedding and the tables of
            relative positions are made for. Any other size works at run time; they are resized.
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for pooled features.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads; divides ``embed_dim``.
        mlp_ratio: hidden width of the MLP over ``embed_dim``.
        qkv_bias: whether q, k and v have a bias.
        window_size: side in tokens of the windows within which blocks attend, 14 in ViTDet; 0 for
            attention over the whole image in every block. Any image size works: the grid is
            padded to whole windows with zeros behind the block's norm, and what is padded takes
            part, as in ViTDet.
        global_attn_indexes: the blocks, counted from 0, that attend over the whole image all the
            same: (2, 5, 8, 11) in ViTDet's base size, (5, 11, 17, 23) in its large one.
        use_rel_pos: decomposed relative positions in every block (see
            :mod:`backbones.models.attention`), all zeros at first.
        drop_rate: dropout before the head.
        pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout after the position embedding, in
            the branches, and on the attention weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.

    Raises:
        ValueError: ``img_size`` is no multiple of ``patch_size``, or ``embed_dim`` none of
            ``num_heads``; ``global_attn_indexes`` without windows, or of blocks that do not exist.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        window_size: int = 0,
        global_attn_indexes: Sequence[int] = (),
        use_rel_pos: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, clips=False)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
        _check_windows(window_size, global_attn_indexes, depth)
        grid = (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = PositionEmbedding(grid, embed_dim)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        blocks: list[tuple[nn.Module, nn.Module, float]] = []
        for index, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            window = 0 if index in global_attn_indexes else window_size
            attention = AttentionBranch(
                embed_dim,
                num_heads,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                window_size=window,
                rel_pos_sides=(0, window or grid[0], window or grid[1]) if use_rel_pos else None,
            )
            mlp = MLPBranch(embed_dim, mlp_ratio, proj_drop_rate)
            blocks.append((attention, mlp, rate))
        self.blocks = self._stack(blocks)
        channels = self.streams * embed_dim
        self._finish([{"num_chs": channels, "reduction": patch_size}], drop_rate)

    def _forward_grids(self, x: Tensor, every_stage: bool) -> list[Tensor]:
        x = self.pos_drop(self.pos_embed(self.patch_embed(x)))
        return [self.norm(join(run_blocks(self.blocks, x)))]


class RevViT(ViT):
    """Reversible vision transformer: two streams of ``embed_dim`` channels, rebuilt backwards.

    Arguments as for :class:`ViT`. The streams start as two copies of the embedded image and end
    side by side, so ``num_features`` is ``2 * embed_dim``. New models have the ``"reversible"``
    memory policy; :func:`backbones.set_memory` changes it.
    """

    streams = 2


def _check_windows(window_size: int, global_attn_indexes: Sequence[int], depth: int) -> None:
    if window_size < 0:
        raise ValueError(f"window_size must be 0 (no windows) or positive, got {window_size}")
    if not window_size and global_attn_indexes:
        raise ValueError(
            f"global_attn_indexes {tuple(global_attn_indexes)} without windows: every block "
            "attends over the whole image anyway; set window_size too"
        )
    for index in global_attn_indexes:
        if not 0 <= index < depth:
            raise ValueError(
                f"global_attn_indexes: there is no block {index}, only 0 … {depth - 1}"
            )
