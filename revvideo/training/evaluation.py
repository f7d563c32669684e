"""Scores of videos, gathered from all processes, and the accuracy that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revvideo.models import TOP_K

Scores = tuple[Tensor, Tensor, Tensor]  # of videos: indices and labels (N,), scores (N, classes)


def gathered(own: Any) -> list[Any]:
    """What every process gives, in the order of the processes."""
    if not torch.distributed.is_initialized():
        return [own]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return parts


def join_scores(batches: Sequence[Scores]) -> Scores:
    """Those of all processes, by index, on the CPU; each gives a batch at least, perhaps empty."""
    own = [torch.cat(part).cpu() for part in zip(*batches, strict=True)]
    index, label, scores = (torch.cat(part) for part in zip(*gathered(own), strict=True))
    index, order = index.sort()
    if bool((index[1:] == index[:-1]).any()):
        raise RuntimeError("a video was tested twice")
    return index, label[order], scores[order]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy and what it was measured on."""

    top1: float  # in percent
    top5: float  # likewise; of as many classes as there are, if they are fewer
    videos: int  # how many were tested
    of: int  # how many the set should have
    what: str = "videos"  # or images

    def __str__(self) -> str:
        scores = f"{self.top1:.1f} top-1, {self.top5:.1f} top-5"
        return f"{scores} on {self.videos:,} of {self.of:,} {self.what}"


def accuracy(label: Tensor, scores: Tensor, of: int, what: str = "videos") -> Accuracy:
    """Of (N,) labels and (N, num_classes) scores. NaN where there is no video."""
    best = scores.topk(min(TOP_K, scores.shape[1])).indices == label[:, None]
    top1, top5 = (100 * hits.float().mean().item() for hits in (best[:, 0], best.any(dim=1)))
    return Accuracy(top1, top5, len(label), of, what)
