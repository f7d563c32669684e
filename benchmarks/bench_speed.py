"""Training speed of every way to save memory, against stored activations.

    python -m benchmarks.bench_speed                 # about seven minutes on two CPU cores

Three comparisons, each of contestants in turn on the same parameters and images (see
`benchmarks.measuring`): the ways in eager mode at 12 blocks of ViT-B width, among them the mixtures
from all blocks reversed to all stored; the compiled ones, at 4 blocks; and what a block costs
beside its arithmetic, on tensors so small that there is hardly any, which is what a GPU waits for
where the batch is small.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.utils import fresh_cache

from backbones import create_model, fit_memory, set_memory
from backbones.common.files import write_json
from backbones.memory.budget import free_bytes
from backbones.memory.simulation import Simulation
from benchmarks.contestants import COMPILED, EAGER, Contestant
from benchmarks.measuring import (
    RESULTS,
    Json,
    Trainer,
    alternate,
    facts,
    parser_of,
    say,
    sharing,
    slug,
)

FITTED = "fitted to free memory"


def compare(
    model: nn.Module, trainer: Trainer, contestants: Mapping[str, Contestant], rounds: int
) -> dict[str, Json]:
    """:func:`benchmarks.measuring.alternate` of the contestants; the baseline is the first."""
    steps = {}
    for name, apply in contestants.items():
        own = sharing(model)
        apply(own)
        steps[name] = partial(trainer.seconds, own)
    return alternate(steps, next(iter(steps)), rounds)


def compile_seconds(model: nn.Module, trainer: Trainer) -> float:
    """What the first step of reversed, compiled blocks takes beyond the next, nothing cached."""
    own = sharing(model)
    COMPILED["reversible, compiled"](own)
    torch._dynamo.reset()
    with fresh_cache():
        return round(trainer.seconds(own) - trainer.seconds(own), 1)


def mixtures(depth: int, steps: int = 4) -> dict[str, Contestant]:
    """From all blocks reversed to one part short of all stored."""

    def storing(blocks: int) -> Contestant:
        return lambda model: set_memory(model, "reversible", blocks)

    return {f"{k} of {depth} stored": storing(k) for k in range(0, depth, max(1, depth // steps))}


def eager(args: argparse.Namespace) -> Json:
    """The ways in eager mode."""
    model = create_model(args.model, num_classes=0, depth=args.depth, img_size=args.img_size)
    trainer = Trainer((args.batch, 3, args.img_size, args.img_size), torch.device("cpu"))
    contestants: dict[str, Any] = {
        name: EAGER[name] for name in ("store", "checkpoint", "selective checkpoint")
    }
    contestants |= mixtures(args.depth)
    free = free_bytes(trainer.device)
    contestants[FITTED] = lambda own: say(str(fit_memory(own, trainer.x, free)))
    result = compare(model.train(), trainer, contestants, args.rounds)
    simulation = Simulation(model, trainer.x, "cpu")
    stored = {name: int(name.split()[0]) for name in mixtures(args.depth)} | {"store": args.depth}
    for name, blocks in stored.items():
        result[name]["stored_blocks"] = blocks
        result[name]["held"] = simulation.step("reversible", blocks).held_bytes
    return {"depth": args.depth, "batch": args.batch, "contestants": result}


def compiled(args: argparse.Namespace) -> Json:
    """The compiled ways, and the two of eager mode beside which they stand."""
    depth = max(1, args.depth // 3)
    model = create_model(args.model, num_classes=0, depth=depth, img_size=args.img_size)
    trainer = Trainer((args.batch, 3, args.img_size, args.img_size), torch.device("cpu"))
    contestants = {name: EAGER[name] for name in ("store", "reversible")} | COMPILED
    compiling = compile_seconds(model.train(), trainer)
    return {
        "depth": depth,
        "batch": args.batch,
        "compile_seconds": compiling,
        "contestants": compare(model, trainer, contestants, args.rounds),
    }


def overhead(args: argparse.Namespace) -> Json:
    """Microseconds of a block in a training step on tensors of next to no size."""
    depth = 2 * args.depth
    model = create_model(
        args.model, num_classes=0, depth=depth, img_size=16, embed_dim=24, num_heads=3
    )
    trainer = Trainer((1, 3, 16, 16), torch.device("cpu"))
    contestants = {name: EAGER[name] for name in ("store", "checkpoint", "reversible")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = compare(model.train(), trainer, contestants, 10 * args.rounds)
    torch.set_num_threads(threads)
    return {
        "depth": depth,
        "microseconds_per_block": {
            name: round(1e6 * values["seconds"] / depth) for name, values in result.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the JSON file."""
    parser = parser_of("bench_speed", __doc__)
    add = parser.add_argument
    add("--model", default="rev_vit_base", help="a reversible vision transformer")
    add("--img-size", type=int, default=224, help="side of the image in pixels (224)")
    add("--depth", type=int, default=12, help="blocks (12)")
    add("--batch", type=int, default=4, help="images per step (4)")
    add("--rounds", type=int, default=5, help="turns of each contestant (5)")
    parts = {part.__name__: part for part in (eager, compiled, overhead)}
    add("--only", choices=parts, nargs="+", help="parts to run; needs --output")
    device = torch.device("cpu")
    path = RESULTS / f"speed_{slug(device)}.json"
    add("--output", type=Path, help="JSON file (named after the CPU)")
    args = parser.parse_args(argv)
    if args.only and not args.output:
        parser.error("--only needs --output, not to replace all by some parts")
    torch.manual_seed(0)
    results = {
        **facts("bench_speed", argv, device),
        "model": args.model,
        "img_size": args.img_size,
        "precision": "float32",
        "rounds": args.rounds,
    }
    for name in args.only or parts:
        say(f"{name}:")
        results[name] = parts[name](args)
    write_json(args.output or path, results)
    for part_name in ("eager", "compiled"):
        for name, values in results.get(part_name, {}).get("contestants", {}).items():
            low, high = values["quartiles"]
            print(f"{name:36} {values['throughput']:.3f} of store  ({low:.3f} … {high:.3f})")
    print(f"wrote {args.output or path}")


if __name__ == "__main__":
    main()
