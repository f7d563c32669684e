"""Write the trunk and the pyramid of a trained detector as a graph that runs without this package.

    python -m revdet.export output/run --to trunk.onnx
    python -m revdet.export output/run --to trunk.pt2 --size 800 1344

From a batch of images, normalised and padded to the run's stride, to the maps of the pyramid,
finest first. Proposals, boxes and masks are not in the graph: their numbers differ from image to
image. A .pt2 file is torch.export's; .onnx needs the extra [export].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones.common.console import make_parser, positive, run_command
from backbones.common.errors import UserError
from backbones.weights.graph import FORMATS, Outputs, export_graph
from revdet.install import detection_extra


def main(argv: Sequence[str] | None = None) -> int:
    """Export, and print the input and how far the file is from the detector."""
    parser = make_parser("python -m revdet.export", __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="the output folder of a run")
    add("--to", metavar="FILE", type=Path, required=True, help="ending in .pt2 or .onnx")
    add("--checkpoint", default="", metavar="FILE", help="in the place of model_final.pth")
    add("--size", type=positive, nargs=2, metavar=("H", "W"), help="of the images, fixed (any)")
    return run_command(parser, _export, argv)


def _export(options: argparse.Namespace) -> None:
    if options.to.suffix not in FORMATS:
        raise UserError(f"--to {options.to} should end in {' or '.join(FORMATS)}")
    with detection_extra():
        from revdet.prediction.predictor import load

    backbone: Any = load(options.run, checkpoint=options.checkpoint, device="cpu").model.backbone
    shapes = backbone.output_shape()
    multiple = max(shape.stride for shape in shapes.values())
    side = backbone.padding_constraints.get("square_size") or 4 * multiple
    size, free = options.size or (side, side), None if options.size else multiple
    maps = Outputs(backbone, lambda backbone, images: backbone(images).values())
    graph = export_graph(maps.eval(), (3, *size), options.to, free)
    print(f"{graph}\noutputs: {', '.join(shapes)}")


if __name__ == "__main__":
    sys.exit(main())
