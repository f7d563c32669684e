"""How far rebuilt activations and their gradients are off, against depth and precision.

    python -m benchmarks.bench_drift                 # half a minute on two CPU cores

`backbones.probe_drift` on fresh models: the largest relative error of a block's rebuilt inputs, and
of its gradient against stored activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from backbones import create_model, probe_drift
from backbones.common.files import write_json
from backbones.memory.drift import Precision
from benchmarks.measuring import RESULTS, Json, facts, parser_of, say, slug


def measure(
    model: str, depths: Sequence[int], batch: int, size: int, device: torch.device
) -> dict[str, Json]:
    """For each precision the errors by depth, if the device has the precision."""
    found: dict[str, Json] = {}
    for precision in get_args(Precision):
        reconstruction: list[float] = []
        gradient: list[float] = []
        for depth in depths:
            say(f"{precision}, {depth} blocks")
            torch.manual_seed(0)
            trunk = create_model(model, depth=depth, img_size=size).to(device)
            images = torch.randn(batch, 3, size, size, device=device)
            try:
                report = probe_drift(trunk, images, precision)
            except RuntimeError as error:
                if "does not run on" not in str(error):
                    raise
                say(str(error))
                break
            reconstruction.append(report.reconstruction)
            gradient.append(report.worst_gradient)
        else:
            found[precision] = {"reconstruction": reconstruction, "gradient": gradient}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the JSON file."""
    parser = parser_of("bench_drift", __doc__)
    add = parser.add_argument
    add("--model", default="rev_vit_tiny", help="a reversible vision transformer")
    add("--img-size", type=int, default=224, help="side of the image in pixels (224)")
    add("--depths", type=int, nargs="+", default=[6, 12, 24, 48, 96], help="blocks")
    add("--batch", type=int, default=1, help="images (1)")
    device = torch.device("cpu")
    path = RESULTS / f"drift_{slug(device)}.json"
    add("--output", type=Path, default=path, help="JSON file (named after the CPU)")
    args = parser.parse_args(argv)
    results = {
        **facts("bench_drift", argv, device),
        "model": args.model,
        "img_size": args.img_size,
        "batch": args.batch,
        "depths": args.depths,
        "drift": measure(args.model, args.depths, args.batch, args.img_size, device),
    }
    write_json(args.output, results)
    for precision, errors in results["drift"].items():
        print(precision, "gradient off by", *(f"{value:.1e}" for value in errors["gradient"]))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
