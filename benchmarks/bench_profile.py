"""Where the time of a training step goes, stored and reversed.

    python -m benchmarks.bench_profile               # half a minute on two CPU cores

One step each under torch's profiler: milliseconds by kind of operator, and of what runs in between
on the host. What "reversible" has more than "store" should be one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from backbones import MemoryPolicy, create_model, set_memory
from backbones.common.files import write_json
from benchmarks.measuring import RESULTS, Json, Trainer, facts, parser_of, say, slug

# The first kind whose part of a name occurs in the operator's.
KINDS = {
    "attention": ("attention", "fmha"),
    "matrix products": ("mm", "linear", "convolution"),
    "norms": ("layer_norm",),
    "GELU": ("gelu",),
    "copies and casts": ("copy", "clone", "cat", "fill", "zero"),
    "sums and products": ("add", "sub", "mul", "sum", "div"),
}
POLICIES: tuple[MemoryPolicy, ...] = ("store", "reversible")


def kind_of(operator: str) -> str:
    """The row of the table that an operator belongs to."""
    if not operator.startswith("aten::"):
        return "between operators"
    for kind, parts in KINDS.items():
        if any(part in operator for part in parts):
            return kind
    return "other"


def measure(
    model: str,
    depth: int,
    shape: Sequence[int],
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Json:
    """Milliseconds of one step by kind, and in all, for each policy."""
    trunk = create_model(model, num_classes=0, depth=depth, img_size=shape[-1]).to(device).train()
    trainer = Trainer(shape, device, autocast)
    found: Json = {}
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for policy in POLICIES:
        say(policy)
        set_memory(trunk, policy)
        for _ in range(2):
            trainer.seconds(trunk)
        wall = min(trainer.seconds(trunk) for _ in range(3))
        with profile(activities=activities) as profiled:
            trainer.seconds(trunk)
        kinds = dict.fromkeys([*KINDS, "other", "between operators"], 0.0)
        for event in profiled.key_averages():
            on_gpu = device.type == "cuda"
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            # On a GPU every kernel is in the list a second time, under its own name.
            if not on_gpu or event.key.startswith("aten::"):
                kinds[kind_of(event.key)] += time / 1000
        if device.type == "cuda":
            kinds["between operators"] = max(0.0, 1000 * wall - sum(kinds.values()))
        found[policy] = {
            "milliseconds": round(1000 * wall, 2),
            "by_kind": {kind: round(value, 2) for kind, value in kinds.items()},
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the JSON file."""
    parser = parser_of("bench_profile", __doc__)
    add = parser.add_argument
    add("--model", default="rev_vit_base", help="a reversible vision transformer")
    add("--img-size", type=int, default=224, help="side of the image in pixels (224)")
    add("--depth", type=int, default=12, help="blocks (12)")
    add("--batch", type=int, default=4, help="images per step (4)")
    device = torch.device("cpu")
    path = RESULTS / f"profile_{slug(device)}.json"
    add("--output", type=Path, default=path, help="JSON file (named after the CPU)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    shape = (args.batch, 3, args.img_size, args.img_size)
    results = {
        **facts("bench_profile", argv, device),
        "model": args.model,
        "depth": args.depth,
        "batch": args.batch,
        "img_size": args.img_size,
        "precision": "float32",
        "profile": measure(args.model, args.depth, shape, device),
    }
    write_json(args.output, results)
    for kind in results["profile"]["store"]["by_kind"]:
        times = (results["profile"][policy]["by_kind"][kind] for policy in POLICIES)
        print(f"{kind:18}", *(f"{time:9.1f} ms" for time in times))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
