"""Output layers for training from scratch start by calling most of a picture background."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform

from revdet.priors import PriorOutputLayers, PriorRPNHead


def test_proposals_start_as_background():
    torch.manual_seed(0)
    layers = PriorOutputLayers(
        foreground=0.25,
        input_shape=ShapeSpec(channels=16),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=80,
    )
    probabilities = layers(torch.randn(50, 16))[0].softmax(dim=1).mean(dim=0)
    assert probabilities[-1].item() == pytest.approx(0.75, abs=0.02)
    assert probabilities[:-1].detach().numpy() == pytest.approx(0.25 / 80, rel=0.1)


def test_anchors_start_as_background():
    torch.manual_seed(0)
    head = PriorRPNHead(foreground=0.05, in_channels=8, num_anchors=3)
    (logits,), (deltas,) = head([torch.randn(1, 8, 6, 6)])
    assert logits.sigmoid().mean().item() == pytest.approx(0.05, abs=0.005)
    assert deltas.abs().max() < 0.5
