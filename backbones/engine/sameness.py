"""Whether a second run computes what the first one did, where its code may use what nobody can see.

A counter in a closure, a scale in a module outside, random numbers from the system: no list of
such things is complete. So a few numbers of the first output are kept and compared, unless all
code of a branch is known to use nothing but its own parts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NUMBERS = 4  # along each dimension, or up to twice as many, are compared

# Far above what rebuilding and other kernels do to numbers of a type; relative.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}
_OF_HALF = 0.25


def sample(out: Tensor) -> Tensor | None:
    """A few numbers from all over a tensor; None of one that has none, or only shapes."""
    if not out.is_floating_point() or out.is_meta or not out.numel():
        return None
    if type(out) not in (Tensor, nn.Parameter):  # fake, or in parts elsewhere
        return None
    places = tuple(slice(None, None, max(1, size // _NUMBERS)) for size in out.shape)
    return out.detach()[places].clone()


def mark(tensor: Tensor) -> tuple[int, int]:
    """What another value shows in: one written into the tensor, or given it as ``tensor.data``."""
    plain = type(tensor) in (Tensor, nn.Parameter)  # of others, memory comes and goes
    return tensor._version, tensor.untyped_storage()._cdata if plain else 0


def is_near(out: Tensor, before: Tensor, half: bool) -> bool:
    """Whether a tensor has the numbers that a :func:`sample` of another had.

    ``half``: whether parts of the computation are in half precision, as under autocast.
    """
    now = sample(out)
    if now is None or now.shape != before.shape or now.dtype != before.dtype:
        return False
    tolerance = _OF_HALF if half else _TOLERANCE.get(now.dtype, _OF_HALF)
    wide = before.double() if now.device.type != "mps" else before.float()
    error = (now.to(wide.dtype) - wide).norm()
    # Behind a ReLU, rounding alone may make a number of a zero.
    rounding = torch.finfo(now.dtype).eps * now.numel() ** 0.5
    # Where there are infinities or no numbers, nothing is known.
    return not bool(error > tolerance * wide.norm() + rounding)
