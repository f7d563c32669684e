"""Measure the numerical drift of a reversible model on random input: how far the rebuilt inputs
of each block, and the gradients made of them, are from those of stored activations.

examples:
  python -m backbones drift --model rev_vit_base --depth 48 --precision bf16
  python -m backbones drift --model rev_vit_small --weights REV_VIT_S.pyth

The exit status is 0 if every gradient is within the warning threshold, 1 if one is not, and 2 if
nothing could be measured.
"""

from __future__ import annotations

import argparse
import sys
from typing import get_args

import torch

from backbones.common.console import add_device, positive, try_device
from backbones.common.errors import UserError
from backbones.factory import create_model
from backbones.memory.drift import Precision, probe_drift
from backbones.registry import input_shape
from backbones.weights.loading import load_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="as python -m backbones zoo lists")
    add("--weights", metavar="FILE_OR_URL", help="of that model (default: random ones)")
    add("--depth", type=positive, metavar="N", help="number of blocks (default: the model's)")
    add("--img-size", type=positive, metavar="PIXELS", help="side of the input (default: likewise)")
    add("--batch-size", type=positive, default=1, metavar="N", help="default: %(default)s")
    add("--precision", choices=get_args(Precision), default="fp32", help="autocast (default: none)")
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    device = try_device(options.device)
    given = {"depth": options.depth, "img_size": options.img_size}
    overrides = {key: value for key, value in given.items() if value is not None}
    torch.manual_seed(0)
    model = create_model(options.model, **overrides)
    if options.weights:
        print(load_weights(model, options.weights), file=sys.stderr)
    x = torch.randn(options.batch_size, *input_shape(model))
    try:
        report = probe_drift(model.to(device), x.to(device), options.precision)
    except RuntimeError as error:  # an operation that the device lacks in this precision
        raise UserError(str(error)) from error
    print(report)
    return 0 if report.ok else 1
