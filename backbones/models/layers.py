"""Layers that every model of the package is built from.

Tokens travel as a grid, (B, T, H, W, C), row-major in time, height and width. Images have T = 1.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.engine.policies import Block, add_branch
from backbones.models.attention import Attention, GridAttention, differ, resize_table

# The released models use 1e-6 where torch defaults to 1e-5.
NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each to one token."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size, self.in_chans = patch_size, in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 1, ceil(H / patch), ceil(W / patch), embed_dim).

        An image whose sides are no multiple of the patch is padded with zeros on the right and at
        the bottom; what is no batch of images with ``in_chans`` channels is a ValueError.
        """
        _check_shape(x, self.in_chans, clips=False)
        height, width = x.shape[-2:]
        pad_h, pad_w = -height % self.patch_size, -width % self.patch_size
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        tokens: Tensor = self.proj(x)
        return tokens.permute(0, 2, 3, 1).unsqueeze(1)


class ConvEmbed(nn.Module):
    """Project overlapping patches of an image, or of a clip, to one token each.

    The stem of MViT (arXiv 2104.11227, section 3.2): patches of 7 pixels every 4, and in clips of 3
    frames every 2.
    """

    def __init__(self, in_chans: int, embed_dim: int, clips: bool = False) -> None:
        super().__init__()
        self.in_chans, self.clips = in_chans, clips
        self.proj: nn.Conv2d | nn.Conv3d
        if clips:
            self.proj = nn.Conv3d(in_chans, embed_dim, (3, 7, 7), (2, 4, 4), (1, 3, 3))
        else:
            self.proj = nn.Conv2d(in_chans, embed_dim, 7, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> (B, 1, ceil(H / 4), ceil(W / 4), embed_dim), or clips
        (B, in_chans, T, H, W) -> (B, ceil(T / 2), ceil(H / 4), ceil(W / 4), embed_dim).

        Anything else, or with another number of channels, is a ValueError.
        """
        _check_shape(x, self.in_chans, self.clips)
        tokens: Tensor = self.proj(x)
        return (tokens if self.clips else tokens.unsqueeze(2)).permute(0, 2, 3, 4, 1)


def _check_shape(x: Tensor, in_chans: int, clips: bool) -> None:
    what, axes = ("clips", "T, H, W") if clips else ("images", "H, W")
    if x.ndim != (5 if clips else 4) or x.shape[1] != in_chans:
        raise ValueError(f"expected {what} of shape (B, {in_chans}, {axes}), got {tuple(x.shape)}")


def resize_plane(weight: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Vectors of an (H, W) grid, (1, H W, C) -> (1, H' W', C), bicubically. Floating point."""
    if not differ(wanted, grid):
        return weight
    plane = weight.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(plane, size=wanted, mode="bicubic").flatten(2).transpose(1, 2)


class _Positions(nn.Module):
    """What adds learned vectors to tokens."""

    def reset_parameters(self) -> None:
        """Initialise as the original implementation does; modules inside do so themselves."""
        for vectors in self.parameters(recurse=False):
            nn.init.trunc_normal_(vectors, std=0.02)


class PrefixTokens(_Positions):
    """Learned tokens in front of those of the patches: a class token, and registers.

    A class token's own position is part of it: both are added anyway. Registers have none (DINOv2
    with registers, arXiv 2309.16588).
    """

    def __init__(self, embed_dim: int, class_token: bool, num_registers: int) -> None:
        super().__init__()
        for name, count in (("cls_token", int(class_token)), ("register_tokens", num_registers)):
            tokens = nn.Parameter(torch.zeros(1, count, embed_dim)) if count else None
            self.register_parameter(name, tokens)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """A grid (B, T, H, W, C) -> a row of tokens (B, 1, 1, prefix + T H W, C)."""
        prefix = [tokens.expand(x.shape[0], -1, -1) for tokens in self.parameters()]
        return torch.cat([*prefix, x.flatten(1, 3)], dim=1)[:, None, None]


class PositionEmbedding(_Positions):
    """One learned vector for each cell of a grid of tokens, (H, W)."""

    def __init__(self, grid: tuple[int, int], embed_dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.zeros(1, grid[0] * grid[1], embed_dim))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Add the embedding to (B, T, H, W, C), resized bicubically where the grid differs."""
        height, width = x.shape[2:4]
        weight = resize_plane(self.weight, self.grid, (height, width))
        return x + weight.view(1, 1, height, width, -1)


class SpaceTimePositionEmbedding(_Positions):
    """The sum of one learned vector for each place of a grid (T, H, W) and one for each time.

    Separable, as in MViT (arXiv 2104.11227): H W + T vectors instead of T H W.
    """

    def __init__(self, grid: tuple[int, int, int], embed_dim: int) -> None:
        super().__init__()
        self.spatial = PositionEmbedding(grid[1:], embed_dim)
        self.temporal = nn.Parameter(torch.zeros(1, grid[0], embed_dim))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Likewise, and resized linearly in time."""
        temporal = resize_table(self.temporal[0], x.shape[1])
        return cast(Tensor, self.spatial(x)) + temporal[:, None, None]


class LayerNorm(nn.LayerNorm):
    """The layer norm that a branch starts with, in the dtype that autocast wants behind it.

    Autocast computes it in float32, and the linear layer behind makes a copy in half precision.
    Made here, the copy is all that outlives this call; there, both would be alive as long as the
    branch runs.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        x = super().forward(x)
        device = x.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return x
        # Autocast leaves double precision alone.
        return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


class MLP(nn.Module):
    """Two linear layers with a GELU (the exact one, with erf) between them."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop1 = nn.Dropout(drop)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        x = self.drop1(self.act(self.fc1(x)))
        return cast(Tensor, self.drop2(self.fc2(x)))


class SwiGLU(nn.Module):
    """The gated MLP of the largest DINOv2 (arXiv 2002.05202): ``fc2(silu(a) b)``, (a, b) of fc1.

    Two thirds of ``hidden_dim``, rounded up to a multiple of 8, go into ``fc2``.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        hidden_dim = -(-int(hidden_dim * 2 / 3) // 8) * 8
        self.fc1 = nn.Linear(dim, 2 * hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return cast(Tensor, self.drop(self.fc2(F.silu(gate) * value)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch's output (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All factors as given."""
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        return x * self.gamma.to(x.dtype)


class AttentionBranch(nn.Module):
    """F of the paper: layer norm, then attention. Holds no residual connection.

    Arguments as for :class:`Attention`, of which ``dim`` is the first; ``layer_scale`` is where
    the factors of :class:`LayerScale` start, None for none.
    """

    attention: ClassVar[type[GridAttention]] = Attention

    def __init__(self, dim: int, *args: Any, layer_scale: float | None = None, **how: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.attn = self.attention(dim, *args, **how)
        self.ls = None if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, C) -> (B, …, C)."""
        x = self.attn(self.norm(x))
        return x if self.ls is None else cast(Tensor, self.ls(x))


class MLPBranch(nn.Module):
    """G of the paper: layer norm, then MLP. Holds no residual connection."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        swiglu: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.mlp = (SwiGLU if swiglu else MLP)(dim, int(dim * mlp_ratio), drop)
        self.ls = None if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, C) -> (B, …, C)."""
        x = self.mlp(self.norm(x))
        return x if self.ls is None else cast(Tensor, self.ls(x))


class ResidualBlock(Block):
    """The ordinary transformer block of one stream, ``x += m f(x); x += m g(x)``.

    The non-reversible twin of :class:`ReversibleBlock`: same branches, and one drop-path mask
    ``m`` for both, so that a comparison of the two isolates the coupling.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) -> (B, …)."""
        return self.run(self._add_branches, x, self.draw_mask(x))

    def _add_branches(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = add_branch(x, self.f(x), mask)
        return add_branch(x, self.g(x), mask)


def init_weights(module: nn.Module) -> None:
    """Initialise one layer as the original implementation does. For ``Module.apply``.

    Truncated normal of deviation 0.02 for weights; 0.02, not 0, for the biases of linear layers
    and norms; a convolution's bias stays at torch's default (SlowFast, ``MViT._init_weights``).
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.constant_(module.bias, 0.02)
    if isinstance(module, nn.LayerNorm):
        nn.init.constant_(module.bias, 0.02)
        nn.init.constant_(module.weight, 1.0)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """One rate for each of ``depth`` blocks, rising linearly from 0 to ``rate``."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]
