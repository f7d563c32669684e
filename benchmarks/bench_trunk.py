"""Memory against depth, and training speed, of a reversible trunk under each memory policy.

    python -m benchmarks.bench_trunk                  # about two minutes on two CPU cores
    python -m benchmarks.bench_trunk --device cuda --precision bfloat16 --batch 64

Memory: bytes per image that autograd holds between forward and backward pass, without the
parameters. Speed: training steps (forward, backward) of `store` and of a policy in turn, A B A B;
the result is the median of time(store) / time(policy) over the pairs, so that what else the
machine does weighs on both alike. On a CPU that others use too, `--threads 1` is steadier.

Writes a JSON file that names the hardware, and the plot that `benchmarks.plot_trunk` makes of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from backbones import MemoryPolicy, create_model, set_memory
from backbones.measure import saved_bytes

ROOT = Path(__file__).parents[1]
PLOT = ROOT / "docs" / "images" / "memory_depth.png"

# A label, and what `set_memory` is told for a model of so many blocks.
SETTINGS: dict[str, Callable[[int], tuple[MemoryPolicy, int]]] = {
    "store": lambda depth: ("store", 0),
    "reversible, half stored": lambda depth: ("reversible", depth // 2),
    "checkpoint": lambda depth: ("checkpoint", 0),
    "reversible": lambda depth: ("reversible", 0),
}


def device_name(device: torch.device) -> str:
    """The name of the hardware behind ``device``, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return found[1].strip()
    return platform.processor() or platform.machine()


def _build(args: argparse.Namespace, depth: int) -> nn.Module:
    overrides = {"embed_dim": args.embed_dim, "num_heads": args.num_heads}
    chosen = {name: value for name, value in overrides.items() if value is not None}
    model = create_model(args.model, img_size=args.img_size, depth=depth, **chosen)
    return model.to(args.device).train()


def _autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    if args.precision == "float32":
        return nullcontext()
    return torch.autocast(args.device.type, torch.bfloat16)


def _images(args: argparse.Namespace, batch: int) -> Tensor:
    return torch.randn(batch, 3, args.img_size, args.img_size, device=args.device)


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes per image held after the forward pass, for each setting a list over ``args.depths``.

    On CUDA also the peak of the allocator during the step, per image, above what parameters,
    gradients and images take.
    """
    held: dict[str, list[int]] = {name: [] for name in SETTINGS}
    peak: dict[str, list[int]] = {name: [] for name in SETTINGS}
    images = _images(args, args.batch)
    progress = tqdm(total=len(args.depths) * len(SETTINGS), desc="memory", disable=None)
    for depth in args.depths:
        model = _build(args, depth)
        for param in model.parameters():  # there before the step, so that they do not count
            param.grad = torch.zeros_like(param)
        for name, setting in SETTINGS.items():
            set_memory(model, *setting(depth))
            if args.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(args.device)
                resident = torch.cuda.memory_allocated(args.device)
            with saved_bytes(ignore=model) as saved, _autocast(args):
                loss = model(images).float().square().mean()
            held[name].append(saved.bytes // args.batch)
            loss.backward()
            if args.device.type == "cuda":
                highest = torch.cuda.max_memory_allocated(args.device)
                peak[name].append((highest - resident) // args.batch)
            progress.update()
    progress.close()
    result: dict[str, Any] = {"unit": "bytes per image", "depths": args.depths, "held": held}
    if args.device.type == "cuda":
        result["allocator_peak"] = peak
    return result


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one training step of each setting, and throughput relative to ``store``."""
    model = _build(args, args.speed_depth)
    images = _images(args, args.batch)

    def step(name: str) -> float:
        set_memory(model, *SETTINGS[name](args.speed_depth))
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with _autocast(args):
            loss = model(images).float().square().mean()
        loss.backward()
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        return time.perf_counter() - start

    for name in SETTINGS:
        step(name)  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    ratios: dict[str, list[float]] = {name: [] for name in SETTINGS if name != "store"}
    for _ in tqdm(range(args.rounds), desc="speed", disable=None):
        for name, of_policy in ratios.items():
            stored, saving = step("store"), step(name)
            seconds["store"].append(stored)
            seconds[name].append(saving)
            of_policy.append(stored / saving)
    return {
        "depth": args.speed_depth,
        "rounds": args.rounds,
        "median_seconds_per_step": {
            name: round(statistics.median(values), 4) for name, values in seconds.items()
        },
        "throughput_relative_to_store": {
            name: round(statistics.median(values), 3) for name, values in ratios.items()
        },
        "lowest_and_highest_ratio": {
            name: [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()
        },
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_trunk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    add("--model", default="rev_vit_small", help="a reversible model of backbones.list_models()")
    add("--embed-dim", type=int, help="width instead of the model's own")
    add("--num-heads", type=int, help="attention heads instead of the model's own")
    add("--img-size", type=int, default=224, help="side of the image in pixels (224)")
    add("--batch", type=int, default=4, help="images per step (4)")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="autocast dtype")
    add("--depths", type=int, nargs="+", default=[6, 12, 24, 48], help="blocks, for memory")
    add("--speed-depth", type=int, default=12, help="blocks, for speed (12)")
    add("--rounds", type=int, default=9, help="pairs of training steps (9)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (all cores)")
    add("--output", type=Path, help="JSON file (benchmarks/results/trunk_<device name>.json)")
    add("--plot", type=Path, default=PLOT, help="picture (docs/images/memory_depth.png)")
    args = parser.parse_args(argv)
    if args.output is None:
        slug = re.sub(r"[^a-z0-9]+", "_", device_name(args.device).lower()).strip("_")
        args.output = ROOT / "benchmarks" / "results" / f"trunk_{slug}.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file and the plot, and print the throughput of each policy."""
    args = parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    results = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.bench_trunk", *(sys.argv[1:] if argv is None else argv)]
        ),
        "device": args.device.type,
        "device_name": device_name(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "model": args.model,
        "embed_dim": _build(args, 1).pos_embed.weight.shape[-1],
        "img_size": args.img_size,
        "batch": args.batch,
        "precision": args.precision,
        "memory": measure_memory(args),
        "speed": measure_speed(args),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {args.output}")
    for name, ratio in results["speed"]["throughput_relative_to_store"].items():
        print(f"{name:24} {ratio:.2f} of the throughput of store")
    try:
        from benchmarks.plot_trunk import plot
    except ImportError:
        print("no plot: matplotlib is not installed")
    else:
        plot(results, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
