"""Throughput and memory where blocks keep the outputs of some of their layers.

    python -m benchmarks.bench_keep                  # about five minutes on one CPU core

Between reversed blocks, which keep nothing, and stored ones: chosen linear layers, all products,
half of the blocks stored, or what `fit_memory` chooses within half of the bytes; beside
torch's checkpointing of each block, plain and selective. All in turn on the same parameters and
images (see `benchmarks.measuring`), on one thread and by the clock of the processor, so that what
else the machine does counts little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from backbones import create_model
from backbones.common.files import write_json
from benchmarks.bench_speed import compare
from benchmarks.contestants import EAGER, KEEPING, Contestant, fitted, torch_checkpoint
from benchmarks.measuring import RESULTS, Json, Trainer, facts, parser_of, sharing, slug

CONTESTANTS: dict[str, Contestant] = {
    "store": EAGER["store"],
    **KEEPING,
    "half of the blocks stored": EAGER["reversible, half stored"],
    "torch's checkpoint": torch_checkpoint,
    "torch's selective checkpoint, products": EAGER["selective checkpoint"],
}


def run(args: argparse.Namespace) -> dict[str, Json]:
    """Throughput and held bytes of each contestant."""
    model = create_model(args.model, num_classes=0, depth=args.depth, img_size=args.img_size)
    shape = (args.batch, 3, args.img_size, args.img_size)
    trainer = Trainer(shape, torch.device("cpu"), clock=time.process_time)
    contestants = CONTESTANTS | {
        "fitted into half of the bytes": fitted(torch.zeros(8 * args.batch, *shape[1:]))
    }
    result = compare(model.train(), trainer, contestants, args.rounds)
    for name, apply in contestants.items():
        own = sharing(model)
        apply(own)
        result[name]["held"] = trainer.held(own)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the JSON file."""
    parser = parser_of("bench_keep", __doc__)
    add = parser.add_argument
    add("--model", default="rev_vit_base", help="a reversible vision transformer")
    add("--img-size", type=int, default=224, help="side of the image in pixels (224)")
    add("--depth", type=int, default=4, help="blocks (4)")
    add("--batch", type=int, default=4, help="images per step (4)")
    add("--rounds", type=int, default=7, help="turns of each contestant (7)")
    device = torch.device("cpu")
    add("--output", type=Path, default=RESULTS / f"keep_{slug(device)}.json", help="JSON file")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {
        key: getattr(args, key) for key in ("model", "img_size", "depth", "batch", "rounds")
    }
    about = {**facts("bench_keep", argv, device), **settings, "precision": "float32"}
    results = {**about, "contestants": run(args)}
    torch.set_num_threads(threads)
    write_json(args.output, results)
    for name, values in results["contestants"].items():
        print(f"{name:40} {values['throughput']:.3f} of store, {values['held'] / 1e6:.1f} MB held")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
