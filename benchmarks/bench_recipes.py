"""Training memory per image or clip of every detection and every video recipe.

    python -m benchmarks.bench_recipes               # three minutes on two CPU cores; no GPU needed

The whole detector, or the whole classifier, at the recipe's size under bfloat16 autocast, on
shape-only tensors as on a GPU: forward, backward and AdamW; stored, and reversed where the recipe's
model is reversible. `peak_of_one` is the peak of a batch of one with everything in it, such as
parameters, gradients and the optimizer's state; `per_image` is what each image or clip adds to the
peak from there to a batch of eight. Of detectors, what depends on the ground truth is not counted.
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
from backbones.memory.simulation import Simulation
from benchmarks.measuring import RESULTS, ROOT, Json, facts, parser_of, say

# The largest size of recipes that resize to many, padded; the others pad to a square of their own.
MULTISCALE_SIZE = (800, 1344)
CONFIGS = ROOT / "configs"


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
        batches = [torch.empty(batch, *shape) for batch in (1, 8)]
    one, eight = (Simulation(model, batch, "cuda", torch.bfloat16) for batch in batches)
    policies: list[MemoryPolicy] = ["store"]
    if one.saving_policy == "reversible":  # twins store
        policies.append("reversible")
    found = {}
    for policy in policies:
        peak = one.step(policy).peak_bytes
        each = (eight.step(policy).peak_bytes - peak) // 7
        found[policy] = {"per_image": each, "peak_of_one": peak}
    return {"shape": list(shape), "policies": found}


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
                print(f"  {policy:12} {each:6.2f} GB each, {peak:6.2f} GB for one in all")
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
