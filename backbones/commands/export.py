"""Write a model as a graph that runs without this package, for any batch and image size.

examples:
  python -m backbones export --model rev_vit_small --pretrained --to rev_vit_small.onnx
  python -m backbones export --weights mine.safetensors --to mine.pt2 --fixed-size
  python -m backbones export --model vit_base --weights mae_vit_base --to trunk.onnx --maps

A file of .pt2 is torch.export's, read by torch.export.load; .onnx needs the extra [export]. Sides
may be any multiples of the model's stride, and position embeddings are resized in the graph, unless
--fixed-size. The file is run at two sizes and compared with the model before it has its name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from backbones.commands.image_models import add_model, chosen_model
from backbones.common.errors import UserError
from backbones.registry import input_shape
from backbones.weights.graph import FORMATS, Outputs, export_graph


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add("--to", metavar="FILE", type=Path, required=True, help=f"ending in {' or '.join(FORMATS)}")
    add("--fixed-size", action="store_true", help="images of that size alone")
    add("--maps", action="store_true", help="the maps of every stage, in place of the classes")


def run(options: argparse.Namespace) -> None:
    if options.to.suffix not in FORMATS:
        raise UserError(f"--to {options.to} should end in {' or '.join(FORMATS)}")
    if not options.to.parent.is_dir():
        raise UserError(f"--to {options.to}: there is no folder {options.to.parent}")
    model = chosen_model(options)
    channels, *frames, height, width = input_shape(model)
    if options.img_size:
        height = width = options.img_size
    multiple = None if options.fixed_size else model.feature_info[-1]["reduction"]
    wanted = Outputs(model, lambda trunk, x: trunk.feature_maps(x)) if options.maps else model
    print(export_graph(wanted.eval(), (channels, *frames, height, width), options.to, multiple))
