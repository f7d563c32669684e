"""Training memory of every detection and every video recipe, and the largest batch of a card.

    python -m benchmarks.bench_recipes               # half an hour on two CPU cores; no GPU needed

The whole detector, or the whole classifier, at the recipe's size under bfloat16 autocast, on
shape-only tensors as on a GPU: forward, backward and a fused AdamW; stored, and reversed, or
checkpointed where the model is not reversible, which then means pyramid and heads too. `per_image`
is what each image or clip adds to the peak of forward and backward pass, from four to eight;
`peak_of_one` is the peak of a batch of one with everything in it, such as parameters, gradients and
the optimizer's state. `largest_batch` is for cards of so many GiB, of which 0.6 GB are CUDA's own
and a tenth of the rest is left for fragmentation. Of detectors, what depends on the ground truth is
not counted.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

from backbones import MemoryPolicy
from backbones.common.files import write_json
from backbones.memory.simulation import Simulation, StepMemory
from benchmarks.measuring import RESULTS, ROOT, Json, facts, parser_of, say

# The largest size of recipes that resize to many, padded; the others pad to a square of their own.
MULTISCALE_SIZE = (800, 1344)
CONFIGS = ROOT / "configs"
CARDS = (8, 12, 16, 24)  # GiB
CUDA_BYTES, FRAGMENTS = 600_000_000, 0.1


def detector(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """The model of a detection recipe and the shape of an image."""
    from detectron2.config import LazyConfig, instantiate

    from revdet.training.budget import ShapeOnlyDetector

    model = LazyConfig.load(str(path)).model
    square = model.backbone.get("square_pad", 0)
    size = (square, square) if square else MULTISCALE_SIZE
    return ShapeOnlyDetector(instantiate(model)), (3, *size)


def classifier(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """The model of a video recipe and the shape of a clip."""
    from revvideo.config import load_config
    from revvideo.models import build_model

    config = load_config(path)
    data = config.data
    shape = (3, data.num_frames, data.crop_size, data.crop_size)
    return build_model(config, config.model.num_classes), shape


def measure(path: Path) -> Json:
    """Bytes of one image or clip, and the peak of a batch of one, for each policy."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model, shape = (detector if path.suffix == ".py" else classifier)(path)
        batches = {batch: torch.empty(batch, *shape) for batch in (1, 4, 8)}
    slices = recipe_slices(path)
    steps = {
        batch: Simulation(model, x, "cuda", torch.bfloat16, fused=True)
        for batch, x in batches.items()
    }
    policies: list[MemoryPolicy] = ["store", steps[1].saving_policy]
    found = {}
    for policy in policies:
        one, four, eight = (steps[batch].step(policy, slices=slices) for batch in batches)
        each = (eight.passes_bytes - four.passes_bytes) // 4
        found[policy] = {
            "per_image": each,
            "peak_of_one": one.peak_bytes,
            "operations": eight.operations // 8,
            "largest_batch": {card: largest_batch(card, one, eight, each) for card in CARDS},
        }
    return {"shape": list(shape), "policies": found}


def recipe_slices(path: Path) -> int:
    """In how many slices of the batch the recipe runs its blocks."""
    if path.suffix != ".py":
        return 1
    from detectron2.config import LazyConfig

    return int(LazyConfig.load(str(path)).train.get("memory_slices", 1))


def largest_batch(card: int, one: StepMemory, eight: StepMemory, each: int) -> int:
    """Of a card of so many GiB; 0 where not even one fits."""
    usable = (1 - FRAGMENTS) * (card * 2**30 - CUDA_BYTES)
    if one.peak_bytes > usable:
        return 0
    return max(1, 8 + int((usable - eight.passes_bytes) // each))


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print a table and write the JSON file."""
    parser = parser_of("bench_recipes", __doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "recipes.json", help="JSON file")
    args = parser.parse_args(argv)
    paths = sorted(CONFIGS.glob("detection/coco/*.py")) + sorted(CONFIGS.glob("video/kinetics*/*"))
    recipes: Json = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=spawn) as pool:
        for path, found in zip(paths, pool.map(measure, paths), strict=True):
            name = str(path.relative_to(CONFIGS).with_suffix(""))
            recipes[name] = found
            say(name)
            for policy, values in found["policies"].items():
                each, peak = (values[key] / 1e9 for key in ("per_image", "peak_of_one"))
                batches = ", ".join(f"{n} on {card}" for card, n in values["largest_batch"].items())
                print(
                    f"  {policy:12} {each:6.2f} GB each, {peak:6.2f} GB for one in all; {batches}"
                )
    results = {
        **facts("bench_recipes", argv, torch.device("cpu")),
        "device_name": "shape-only tensors",
        "precision": "bfloat16 autocast",
        "unit": "bytes",
        "recipes": recipes,
    }
    write_json(args.output, results)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
