"""Rev-ViT (arXiv 2302.04869, section 3.2) and its non-reversible twin.

With windows and relative positions they are the trunks of ViTDet (arXiv 2203.16527).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from backbones.models import layers
from backbones.models.layers import NORM_EPS, AttentionBranch, MLPBranch, drop_path_rates
from backbones.models.trunk import Fuse, Trunk, run_blocks


class ViT(Trunk):
    """Vision transformer: patches, blocks, norm, mean over tokens, head. No class token by default.

    Args:
        img_size: (H, W) or a side, in pixels, that the position embedding and the tables of
            relative positions are made for. Any other size works at run time; they are resized.
        pretrain_img_size: likewise, of the position embedding alone where it differs, as in
            ViTDet, whose positions stay those of the pretraining.
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
        class_token: whether a learned token stands in front of the patches' (timm, DeiT).
        num_registers: how many more do, as in DINOv2 with registers (arXiv 2309.16588).
        global_pool: what the head reads: ``"avg"``, the mean of the patches' tokens, or
            ``"token"``, the class token. None: the class token where there is one.
        layer_scale: where learned factors on the branches' outputs start (DINOv2: 1e-5); None for
            no such factors.
        final_norm: whether there is a norm behind the blocks (ViTDet: none).
        fc_norm: whether this norm comes behind the pooling instead of before it (MAE).
        norm_eps: of all norms; Hugging Face's ViT has 1e-12 where all others have 1e-6.
        swiglu: gated MLPs, as in the largest DINOv2.
        fuse: in a reversible model, whether its two streams end side by side (``"concat"``, which
            None stands for) or as their mean (``"mean"``), no wider than one.
        drop_rate: dropout before the head.
        pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout after the position embedding, in
            the branches, and on the attention weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.

    Raises:
        ValueError: ``img_size`` is no multiple of ``patch_size``, or ``embed_dim`` none of
            ``num_heads``; ``global_attn_indexes`` without windows, or of blocks that do not exist;
            windows or relative positions beside tokens that have no place in the image;
            ``global_pool`` unknown, or ``"token"`` without a class token; ``fuse`` unknown, or in a
            model of one stream.
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
        class_token: bool = False,
        num_registers: int = 0,
        pretrain_img_size: int | tuple[int, int] | None = None,
        global_pool: Literal["avg", "token"] | None = None,
        layer_scale: float | None = None,
        final_norm: bool = True,
        fc_norm: bool = False,
        norm_eps: float = NORM_EPS,
        swiglu: bool = False,
        fuse: Fuse | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, clips=False, fuse=fuse)
        grid = _grid(img_size, patch_size)
        _check_windows(window_size, global_attn_indexes, depth)
        self.num_prefix_tokens = int(class_token) + num_registers
        if self.num_prefix_tokens and (window_size or use_rel_pos):
            raise ValueError(
                "a class token and registers have no place in windows or relative positions: use "
                "class_token=False, num_registers=0 (load_weights leaves those of a file out)"
            )
        self.global_pool = global_pool or ("token" if class_token else "avg")
        if self.global_pool not in ("avg", "token") or (global_pool == "token" and not class_token):
            choices = "choose 'avg', or 'token' with class_token=True"
            raise ValueError(f"global_pool {global_pool!r}: {choices}")
        self.patch_embed = layers.PatchEmbed(patch_size, in_chans, embed_dim)
        positions = _grid(pretrain_img_size or img_size, patch_size)
        self.pos_embed = layers.PositionEmbedding(positions, embed_dim)
        self.prefix: nn.Module | None = None
        if self.num_prefix_tokens:
            self.prefix = layers.PrefixTokens(embed_dim, class_token, num_registers)
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
                layer_scale=layer_scale,
            )
            mlp = MLPBranch(embed_dim, mlp_ratio, proj_drop_rate, swiglu, layer_scale)
            blocks.append((attention, mlp, rate))
        self.blocks = self._stack(blocks)
        info = {"num_chs": self.width * embed_dim, "reduction": patch_size}
        self._finish([info], drop_rate, final_norm, fc_norm)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps

    def _forward_grids(self, x: Tensor, every_stage: bool) -> tuple[list[Tensor], Tensor]:
        x = self.pos_embed(self.patch_embed(x))
        grid = x.shape[1:4]
        # Tokens in front of the grid's make a row of it all.
        x = self.pos_drop(x if self.prefix is None else self.prefix(x))
        tokens = self.norm(self.join(run_blocks(self.blocks, x))).flatten(1, 3)
        return [tokens[:, self.num_prefix_tokens :].unflatten(1, grid)], tokens


class RevViT(ViT):
    """Reversible vision transformer: two streams of ``embed_dim`` channels, rebuilt backwards.

    Arguments as for :class:`ViT`. The streams start as two copies of the embedded image and end
    side by side, so ``num_features`` is ``2 * embed_dim``, unless ``fuse`` says otherwise. New
    models have the ``"reversible"`` memory policy; :func:`backbones.set_memory` changes it.
    """

    streams = 2


def _grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"img_size {img_size} is not divisible by patch_size {patch_size}")
    return height // patch_size, width // patch_size


def _check_windows(window_size: int, global_attn_indexes: Sequence[int], depth: int) -> None:
    if window_size < 0:
        raise ValueError(f"window_size must be 0 (no windows) or positive, got {window_size}")
    if not window_size and global_attn_indexes:
        raise ValueError(
            f"global_attn_indexes {tuple(global_attn_indexes)} without windows: every block "
            "attends over the whole image anyway; set window_size too"
        )
    if beyond := set(global_attn_indexes) - set(range(depth)):
        names = f"no block {min(beyond)}, only 0 … {depth - 1}"
        raise ValueError(f"global_attn_indexes: there is {names}")
