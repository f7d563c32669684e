"""Training memory per image or clip of every detection and every video recipe.

    python -m benchmarks.bench_recipes               # three minutes; no GPU needed

The whole detector, or the whole classifier, at the recipe's size under bfloat16 autocast, on
shape-only tensors as on a GPU: forward, backward and AdamW. `per_image` is what one image or clip
more adds to the peak; `peak_of_one` is the peak of a batch of one with everything in it, such as
parameters, gradients and the optimizer's state. Of detectors, what depends on the ground truth is
not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from backbones import MemoryPolicy
from backbones.simulate import Simulation
from benchmarks.measuring import RESULTS, ROOT, Json, facts, parser_of, say, write

# The largest size of recipes that resize to many, padded; the others pad to a square of their own.
MULTISCALE_SIZE = (800, 1344)
POLICIES: tuple[MemoryPolicy, ...] = ("store", "checkpoint", "reversible")

Case = tuple[str, Callable[[], nn.Module], tuple[int, ...]]


def detection() -> Iterator[Case]:
    """Each recipe with its model and the shape of an image."""
    from detectron2.config import LazyConfig, instantiate

    from revdet.memory import ShapeOnlyDetector

    for path in sorted((ROOT / "configs" / "detection" / "coco").glob("*.py")):
        model = LazyConfig.load(str(path)).model
        square = model.backbone.get("square_pad", 0)
        size = (square, square) if square else MULTISCALE_SIZE
        build = partial(lambda model: ShapeOnlyDetector(instantiate(model)), model)
        yield f"detection/coco/{path.stem}", build, (3, *size)


def video() -> Iterator[Case]:
    """Each recipe with its model and the shape of a clip."""
    from revvideo.config import load_config
    from revvideo.models import build_model

    for path in sorted((ROOT / "configs" / "video").glob("kinetics*/*.yaml")):
        config = load_config(path)
        data = config.data
        shape = (3, data.num_frames, data.crop_size, data.crop_size)
        build = partial(build_model, config, config.model.num_classes)
        yield f"video/{path.parent.name}/{path.stem}", build, shape


def measure(build: Callable[[], nn.Module], shape: Sequence[int]) -> dict[str, dict[str, int]]:
    """Bytes of one image or clip, and the peak of a batch of one, for each policy."""
    with torch.device("meta"):
        model = build()
        batches = [torch.empty(batch, *shape) for batch in (1, 2)]
    one, two = (Simulation(model, batch, "cuda", torch.bfloat16) for batch in batches)
    # Twins have no reversible blocks.
    policies = POLICIES if one.saving_policy == "reversible" else POLICIES[:2]
    found = {}
    for policy in policies:
        peak = one.step(policy).peak_bytes
        each = two.step(policy).peak_bytes - peak
        found[policy] = {"per_image": each, "peak_of_one": peak}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print a table and write the JSON file."""
    parser = parser_of("bench_recipes", __doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "recipes.json", help="JSON file")
    args = parser.parse_args(argv)
    recipes: Json = {}
    for cases in (detection, video):
        for name, build, shape in cases():
            say(name)
            recipes[name] = {"shape": list(shape), "policies": measure(build, shape)}
            for policy, found in recipes[name]["policies"].items():
                each, peak = (found[key] / 1e9 for key in ("per_image", "peak_of_one"))
                print(f"  {policy:12} {each:6.2f} GB each, {peak:6.2f} GB for one in all")
    results = {
        **facts("bench_recipes", argv, torch.device("cpu")),
        "device_name": "none: shape-only tensors",
        "precision": "bfloat16 autocast",
        "unit": "bytes",
        "recipes": recipes,
    }
    write(results, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
