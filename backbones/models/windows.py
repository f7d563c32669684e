"""Square windows of a token grid, as ViTDet's attention uses them (arXiv 2203.16527)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["from_windows", "to_windows"]


def to_windows(x: Tensor, size: int) -> Tensor:
    """Cut a grid into windows that do not overlap.

    A grid whose sides are no multiples of ``size`` is padded with zeros below and on the right. As
    in ViTDet nothing tells these tokens from others afterwards.

    Args:
        x: (B, T, H, W, C).
        size: side of a window in tokens.

    Returns:
        (B ceil(H / size) ceil(W / size), T, size, size, C), row by row within each sample.
    """
    batch, time, height, width, channels = x.shape
    pad_h, pad_w = -height % size, -width % size
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    x = x.view(batch, time, (height + pad_h) // size, size, (width + pad_w) // size, size, channels)
    return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, time, size, size, channels)


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`to_windows`, the padding included.

    Args:
        windows: (B ceil(height / size) ceil(width / size), T, size, size, C).
        height, width: of the grid that was cut, in tokens.

    Returns:
        (B, T, height, width, C).
    """
    _, time, size, _, channels = windows.shape
    rows, columns = -(-height // size), -(-width // size)
    x = windows.reshape(-1, rows, columns, time, size, size, channels).permute(0, 3, 1, 4, 2, 5, 6)
    x = x.reshape(-1, time, rows * size, columns * size, channels)
    return x[:, :, :height, :width]
