"""Rev-ViT (arXiv 2302.04869, section 3.2) and its non-reversible twin."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from backbones.layers import (
    NORM_EPS,
    AttentionBranch,
    MLPBranch,
    PatchEmbed,
    PositionEmbedding,
    ResidualBlock,
    drop_path_rates,
    init_weights,
)
from backbones.reversible import ReversibleBlock, ReversibleSequence

__all__ = ["RevViT", "ViT"]


class ViT(nn.Module):
    """Vision transformer without a class token: patches, blocks, norm, mean over tokens, head.

    Args:
        img_size: (H, W) or a side, in pixels, that the position embedding is made for. Any other
            size works at run time; the embedding is resized.
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for pooled features.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads; divides ``embed_dim``.
        mlp_ratio: hidden width of the MLP over ``embed_dim``.
        qkv_bias: whether q, k and v have a bias.
        drop_rate: dropout before the head.
        pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout after the position embedding, in
            the branches, and on the attention weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.

    Attributes:
        num_features: channels of the tokens after the final norm.
        feature_info: for each map of :meth:`feature_maps` its channels (``num_chs``) and its
            stride in pixels (``reduction``), as in timm.

    Raises:
        ValueError: ``img_size`` is no multiple of ``patch_size``, or ``embed_dim`` none of
            ``num_heads``.
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
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
        self.num_classes = num_classes
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = PositionEmbedding((height // patch_size, width // patch_size), embed_dim)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = self._stack(
            [
                {
                    "f": AttentionBranch(
                        embed_dim, num_heads, qkv_bias, attn_drop_rate, proj_drop_rate
                    ),
                    "g": MLPBranch(embed_dim, mlp_ratio, proj_drop_rate),
                    "drop_path": rate,
                }
                for rate in drop_path_rates(drop_path_rate, depth)
            ]
        )
        self.num_features = self._num_features(embed_dim)
        self.feature_info = [{"num_chs": self.num_features, "reduction": patch_size}]
        self.norm = nn.LayerNorm(self.num_features, eps=NORM_EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    def _stack(self, blocks: list[dict[str, Any]]) -> nn.Module:
        return nn.Sequential(*(ResidualBlock(**block) for block in blocks))

    def _num_features(self, embed_dim: int) -> int:
        return embed_dim

    def _run_blocks(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.blocks(x))

    def _forward_grid(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 1, H / patch, W / patch, num_features), after the norm."""
        x = self.pos_drop(self.pos_embed(self.patch_embed(x)))
        return cast(Tensor, self.norm(self._run_blocks(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens (B, N, num_features) after the final norm."""
        return self._forward_grid(x).flatten(1, 3)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) -> one map (B, num_features, H / patch, W / patch)."""
        return [self._forward_grid(x).squeeze(1).permute(0, 3, 1, 2)]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> raw logits (B, num_classes).

        With ``num_classes=0``: the mean of the tokens, (B, num_features).
        """
        pooled = self.forward_features(x).mean(dim=1)
        return cast(Tensor, self.head(self.head_drop(pooled)))


class RevViT(ViT):
    """Reversible vision transformer: two streams of ``embed_dim`` channels, rebuilt backwards.

    Arguments as for :class:`ViT`. The streams start as two copies of the embedded image and end
    side by side, so ``num_features`` is ``2 * embed_dim``. New models have the ``"reversible"``
    memory policy; :func:`backbones.set_memory` changes it.
    """

    def _stack(self, blocks: list[dict[str, Any]]) -> nn.Module:
        return ReversibleSequence(ReversibleBlock(**block) for block in blocks)

    def _num_features(self, embed_dim: int) -> int:
        return 2 * embed_dim

    def _run_blocks(self, x: Tensor) -> Tensor:
        return torch.cat(self.blocks(x, x), dim=-1)
