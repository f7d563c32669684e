"""Bytes held for the backward pass against depth and against batch, under each memory policy.

    python -m benchmarks.bench_memory                # two minutes on two CPU cores

A vision transformer of ViT-B width on images of 224 pixels in float32. `held` is everything that is
alive between the forward and the backward pass apart from parameters and input, counted on
shape-only tensors, so that 96 stored blocks need no memory here either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from backbones import MemoryPolicy, create_model
from backbones.common.files import write_json
from backbones.memory.simulation import Simulation
from benchmarks.measuring import RESULTS, Json, facts, parser_of, say

# A label, the policy, and which share of the blocks stores.
SETTINGS: dict[str, tuple[MemoryPolicy, float]] = {
    "store": ("store", 0.0),
    "reversible, half stored": ("reversible", 0.5),
    "checkpoint": ("checkpoint", 0.0),
    "reversible": ("reversible", 0.0),
}


def count(model: str, depth: int, batch: int, size: int) -> dict[str, int]:
    """Bytes held of each setting, by shapes alone."""
    with torch.device("meta"):
        trunk = create_model(model, depth=depth, img_size=size, num_classes=0)
        images = torch.empty(batch, 3, size, size)
    simulation = Simulation(trunk, images, "cpu")
    return {
        name: simulation.held_bytes(policy, int(share * depth))
        for name, (policy, share) in SETTINGS.items()
    }


def run(args: argparse.Namespace) -> Json:
    """All of it."""
    by_depth, by_batch = [], []
    for depth in args.depths:
        say(f"{depth} blocks")
        by_depth.append(count(args.model, depth, args.batch, args.img_size))
    for batch in args.batches:
        say(f"batch {batch}")
        by_batch.append(count(args.model, args.depth, batch, args.img_size))
    return {
        "model": args.model,
        "img_size": args.img_size,
        "precision": "float32",
        "unit": "bytes",
        "depths": {
            "batch": args.batch,
            "depth": args.depths,
            "held": {name: [held[name] for held in by_depth] for name in SETTINGS},
        },
        "batches": {
            "depth": args.depth,
            "batch": args.batches,
            "held": {name: [held[name] for held in by_batch] for name in SETTINGS},
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the JSON file."""
    parser = parser_of("bench_memory", __doc__)
    add = parser.add_argument
    add("--model", default="rev_vit_base", help="a reversible vision transformer")
    add("--img-size", type=int, default=224, help="side of the image in pixels (224)")
    add("--depths", type=int, nargs="+", default=[6, 12, 24, 48, 96], help="blocks")
    add("--batch", type=int, default=4, help="images, for the depths (4)")
    add("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="images")
    add("--depth", type=int, default=24, help="blocks, for the batches (24)")
    add("--output", type=Path, default=RESULTS / "memory.json", help="JSON file")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    results = {**facts("bench_memory", argv, torch.device("cpu")), **run(args)}
    write_json(args.output, results)
    print("bytes held, MB, by depth:", *args.depths)
    for name, held in results["depths"]["held"].items():
        print(f"  {name:26}", *(f"{value / 1e6:8.1f}" for value in held))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
