"""Scores of videos, gathered from all processes, and the accuracy that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.utilities import dim_zero_cat

TOP_K = 5


class VideoScores(Metric):
    """The scores of every video, from all processes, in the order of the manifest.

    Call :meth:`update` at least once on each process, if need be with no video.
    """

    full_state_update = False
    index: list[Tensor]
    label: list[Tensor]
    scores: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("index", "label", "scores"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, index: Tensor, label: Tensor, scores: Tensor) -> None:
        """Add videos: their (N,) indices and labels, and scores (N, num_classes)."""
        self.index.append(index)
        self.label.append(label)
        self.scores.append(scores)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Indices and labels (N,) and scores (N, num_classes) of all videos, by index."""
        index, order = dim_zero_cat(self.index).sort()
        if len(index) > 1 and bool((index[1:] == index[:-1]).any()):
            raise RuntimeError("a video was tested twice")
        return index, dim_zero_cat(self.label)[order], dim_zero_cat(self.scores)[order]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy and what it was measured on.

    Attributes:
        top1, top5: in percent; top5 is of as many classes as there are, if they are fewer.
        videos: how many were tested.
        of: how many the set should have.
    """

    top1: float
    top5: float
    videos: int
    of: int

    def __str__(self) -> str:
        return (
            f"{self.top1:.1f} top-1, {self.top5:.1f} top-5 on {self.videos:,} of {self.of:,} videos"
        )


def accuracy(label: Tensor, scores: Tensor, of: int) -> Accuracy:
    """Of (N,) labels and (N, num_classes) scores. NaN where there is no video."""
    if not len(label):
        return Accuracy(float("nan"), float("nan"), 0, of)
    classes = scores.shape[1]
    tops = [
        multiclass_accuracy(scores, label, classes, average="micro", top_k=min(k, classes))
        for k in (1, TOP_K)
    ]
    top1, top5 = (100 * torch.stack(tops)).tolist()
    return Accuracy(top1, top5, len(label), of)
