"""Output layers that know at the start that most of a picture is background.

Layers of Detectron2 start by calling every class equally likely. Training from scratch, the first
steps then teach the whole trunk to say "background", for which every feature map turns into one
constant vector, and it takes hundreds of steps to leave that. A bias that says so from the first
step on avoids it, as in section 3.3 of Lin et al., "Focal Loss for Dense Object Detection" (2017).
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers


class PriorRPNHead(StandardRPNHead):
    """``StandardRPNHead``, of whose anchors the share ``foreground``, in (0, 1), is objects."""

    def __init__(self, *, foreground: float = 0.03, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        torch.nn.init.constant_(self.objectness_logits.bias, log(foreground / (1 - foreground)))


class PriorOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` with its default, a softmax, of whose proposals the share
    ``foreground``, in (0, 1), is objects, of all classes alike."""

    def __init__(self, *, foreground: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with torch.no_grad():  # the last class is background
            self.cls_score.bias[-1] = log((1 - foreground) / foreground * self.num_classes)
