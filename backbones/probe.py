"""``python -m backbones.probe --model NAME``: the numerical drift of a named model, as a table.

Beside :mod:`backbones.drift`, because a module that the package imports itself should not be run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

import torch

from backbones.drift import (
    WARNING_THRESHOLD,
    BlockDrift,
    DriftReport,
    Precision,
    probe_drift,
)
from backbones.models import create_model
from backbones.weights import load_weights
from backbones.zoo import input_shape

__all__ = ["WARNING_THRESHOLD", "BlockDrift", "DriftReport", "Precision", "probe_drift"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe a named model; return 0 if the report is ok, 1 if it warns, 2 if nothing could run."""
    parser = argparse.ArgumentParser(
        prog="python -m backbones.probe",
        description="Measure the numerical drift of a reversible model on random input. "
        "Exit status 1 if a gradient drifts beyond the warning threshold.",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="as python -m backbones has")
    parser.add_argument("--weights", metavar="FILE", help="without it, random ones")
    parser.add_argument("--depth", type=int, help="number of blocks")
    parser.add_argument("--img-size", type=int, help="side in pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    given = {"depth": options.depth, "img_size": options.img_size}
    overrides = {key: value for key, value in given.items() if value is not None}
    torch.manual_seed(0)
    try:
        model = create_model(options.model, **overrides)
        if options.weights:
            load_weights(model, options.weights)
        x = torch.randn(options.batch_size, *input_shape(model)).to(options.device)
        report = probe_drift(model.to(options.device), x, options.precision)
    except (RuntimeError, ValueError) as error:
        parser.error((str(error).splitlines() or [type(error).__name__])[0])
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
