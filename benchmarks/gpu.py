"""Every question about memory and speed, answered on one GPU in one call of under nine minutes.

    python -m benchmarks.gpu                         # writes benchmarks/results/gpu_<name>.json
    python -m benchmarks.gpu --only speed budgets    # some of the parts
    python -m benchmarks.gpu --rehearse              # every part at tiny sizes, on the CPU

Needs torch and `backbones`, nothing else and no network. The file is written after every part. A
part that the time does not suffice for is named in it, as is what did not fit the card.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from backbones import create_model, set_memory
from benchmarks import bench_drift, bench_profile
from benchmarks.bench_speed import compare
from benchmarks.contestants import ALL, EAGER, Contestant
from benchmarks.measuring import RESULTS, Json, Trainer, facts, parser_of, say, sharing, slug, write

SAVING = ("store", "checkpoint", "reversible")
BUDGETS_GB = (8, 16, 24, 40, 80)


@dataclass
class Scale:
    """How large everything is, and by when it has to end."""

    device: torch.device
    deadline: float = float("inf")
    autocast: torch.dtype | None = torch.bfloat16
    size: int = 224
    large: str = "large"
    sizes: tuple[tuple[str, int], ...] = (
        ("small", 12),
        ("base", 12),
        ("large", 24),
        ("base", 48),
        ("base", 80),
    )
    depths: tuple[int, ...] = (6, 12, 24, 48, 96)
    batch: int = 32
    largest_batch: int = 4096
    rounds: int = 8
    patience: float = 1.5  # seconds: a larger batch than that of such a step is not tried

    @property
    def in_time(self) -> bool:
        """Whether there is time for another case."""
        return time.monotonic() < self.deadline

    def model(self, name: str, depth: int | None = None) -> nn.Module:
        """A trunk without head in training mode, on the device."""
        depths = {} if depth is None else {"depth": depth}
        model = create_model(name, num_classes=0, img_size=self.size, **depths)
        return model.to(self.device).train()

    def trainer(self, batch: int) -> Trainer:
        """Training steps on so many images."""
        return Trainer((batch, 3, self.size, self.size), self.device, self.autocast)

    def peak(self, model: nn.Module, batch: int) -> int | None:
        """Bytes of a step above parameters, gradients and images; None: out of memory."""
        if self.device.type != "cuda":  # a rehearsal
            return 1_000_000 * batch
        model.zero_grad(set_to_none=True)
        try:
            return self.trainer(batch).peak(model)
        except torch.cuda.OutOfMemoryError:  # of the images
            return None


def rehearsal() -> Scale:
    """Everything at a size that a CPU gets through in a minute."""
    return Scale(
        device=torch.device("cpu"),
        size=32,
        large="tiny",
        sizes=(("tiny", 2), ("tiny", 3)),
        depths=(1, 2),
        batch=2,
        largest_batch=8,
        rounds=2,
        patience=1.0,
    )


def _contestants(model: nn.Module, which: Mapping[str, Contestant]) -> dict[str, nn.Module]:
    """For each name a model with the parameters of ``model``."""
    found = {}
    for name, apply in which.items():
        found[name] = sharing(model)
        apply(found[name])
    return found


def speed(scale: Scale, depth: int | None = None) -> Json:
    """Every contestant, eager and compiled, on the large size at equal batch; with peaks."""
    model = scale.model(f"rev_vit_{scale.large}", depth)
    result = compare(model, scale.trainer(scale.batch), ALL, scale.rounds)
    for name, own in _contestants(model, ALL).items():
        result[name]["peak"] = scale.peak(own, scale.batch)
    return {"model": f"rev_vit_{scale.large}", "batch": scale.batch, "contestants": result}


def slope(scale: Scale) -> Json:
    """Bytes per image: how the peak grows from a batch to twice that batch."""
    found = {}
    for name, policy in ((f"vit_{scale.large}", "store"), (f"rev_vit_{scale.large}", "reversible")):
        model = scale.model(name)
        set_memory(model, policy)
        peaks = [scale.peak(model, batch) for batch in (scale.batch // 2, scale.batch)]
        low, high = peaks
        each = None if low is None or high is None else (high - low) // (scale.batch // 2)
        found[f"{name}, {policy}"] = {"peaks": peaks, "bytes_per_image": each}
        del model
    stored, reversed_ = (values["bytes_per_image"] for values in found.values())
    return {
        "batches": [scale.batch // 2, scale.batch],
        "models": found,
        "ratio": round(stored / reversed_, 2) if stored and reversed_ else None,
    }


def depth(scale: Scale) -> Json:
    """The peak against the number of blocks."""
    peaks: dict[str, list[int | None]] = {name: [] for name in EAGER}
    for blocks in scale.depths:
        models = _contestants(scale.model(f"rev_vit_{scale.sizes[1][0]}", blocks), EAGER)
        for name, model in models.items():
            peaks[name].append(scale.peak(model, scale.batch // 2))
    return {
        "model": f"rev_vit_{scale.sizes[1][0]}",
        "batch": scale.batch // 2,
        "depth": list(scale.depths),
        "peak": peaks,
    }


def mixture(scale: Scale) -> Json:
    """From all blocks reversed to all stored: throughput and peak."""
    model = scale.model(f"rev_vit_{scale.large}")
    blocks = len(model.blocks.blocks)

    def storing(k: int) -> Contestant:
        return lambda own: set_memory(own, "reversible", k)

    # All stored first, because the first is what the others are relative to.
    which = {str(k): storing(k) for k in range(blocks, -1, -max(1, blocks // 8))}
    result = compare(model, scale.trainer(scale.batch), which, scale.rounds)
    for name, own in _contestants(model, which).items():
        result[name]["peak"] = scale.peak(own, scale.batch)
    return {
        "model": f"rev_vit_{scale.large}",
        "batch": scale.batch,
        "blocks": blocks,
        "stored_blocks": result,
    }


def _images_per_second(scale: Scale, model: nn.Module, batch: int) -> float | None:
    """The better of two steps, after one that does not count; None: out of memory."""
    try:
        trainer = scale.trainer(batch)
        trainer.seconds(model)
        return round(batch / min(trainer.seconds(model) for _ in range(2)), 2)
    except torch.cuda.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        return None


def batches(scale: Scale) -> Json:
    """Images per second against batch, each contestant up to what fits."""
    found: Json = {}
    for size, blocks in scale.sizes:
        model = scale.model(f"rev_vit_{size}", blocks)
        curves: Json = {}
        for name, own in _contestants(model, {name: EAGER[name] for name in SAVING}).items():
            curve: list[list[float]] = []
            batch, ended = 8 if scale.largest_batch > 8 else 2, "largest batch tried"
            while batch <= scale.largest_batch:
                if not scale.in_time:
                    ended = "out of time"
                    break
                throughput = _images_per_second(scale, own, batch)
                if throughput is None:
                    ended = "out of memory"
                    break
                curve.append([batch, throughput])
                if batch / throughput > scale.patience:
                    ended = "steps take too long"
                    break
                batch *= 2
            curves[name] = {"images_per_second": curve, "ended": ended}
        found[f"rev_vit_{size}, {blocks} blocks"] = curves
        del model
    return found


def budgets(scale: Scale) -> Json:
    """The largest batch within 8 to 80 GB, parameters and AdamW's state included, and its speed.

    Found from the peaks of two small batches, and then run with the allocator held to the budget.
    """
    size, blocks = scale.sizes[-1]
    model = scale.model(f"rev_vit_{size}", blocks)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    on_gpu = scale.device.type == "cuda"
    total = torch.cuda.mem_get_info(scale.device)[1] if on_gpu else 20 * 10**9
    # As AdamW keeps them: two numbers for each parameter.
    state = [torch.zeros_like(p) for p in model.parameters() for _ in range(2)]
    found: Json = {}
    for name, own in _contestants(model, {name: EAGER[name] for name in SAVING}).items():
        low, high = (scale.peak(own, batch) for batch in (scale.batch // 4, scale.batch // 2))
        if low is None or high is None:
            found[name] = None
            continue
        step = scale.batch // 2 - scale.batch // 4
        image = 4 * 3 * scale.size**2
        each = (high - low) / step + image
        fixed = high - (high - low) / step * (scale.batch // 2) + 4 * weights
        rows: Json = {}
        for budget in BUDGETS_GB:
            if budget * 10**9 > total or not scale.in_time:
                continue
            batch = int((0.97 * budget * 10**9 - fixed) / each)
            throughput = None
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(budget * 10**9 / total, scale.device)
            while batch > 0 and throughput is None:
                timed = min(batch, scale.largest_batch)
                throughput = _images_per_second(scale, own, timed)
                if throughput is None:
                    batch = int(0.95 * batch)
            rows[f"{budget} GB"] = {
                "largest_batch": max(batch, 0),
                "timed_batch": min(batch, scale.largest_batch) if throughput else None,
                "images_per_second": throughput,
            }
        found[name] = rows
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, scale.device)
    del state
    return {"model": f"rev_vit_{size}", "depth": blocks, "contestants": found}


def drift(scale: Scale) -> Json:
    """See `benchmarks.bench_drift`."""
    size = scale.sizes[0][0]
    found = bench_drift.measure(f"rev_vit_{size}", scale.depths, 2, scale.size, scale.device)
    return {"model": f"rev_vit_{size}", "depths": list(scale.depths), "drift": found}


def profile(scale: Scale) -> Json:
    """See `benchmarks.bench_profile`."""
    shape = (scale.batch, 3, scale.size, scale.size)
    size, blocks = scale.sizes[1]
    found = bench_profile.measure(f"rev_vit_{size}", blocks, shape, scale.device, scale.autocast)
    return {"model": f"rev_vit_{size}", "depth": blocks, "batch": scale.batch, "profile": found}


# In the order of what would be missed most.
PARTS: dict[str, Callable[[Scale], Json]] = {
    part.__name__: part for part in (slope, depth, mixture, budgets, speed, batches, drift, profile)
}


def run(scale: Scale, parts: Sequence[str], seconds: float, save: Callable[[Json], None]) -> Json:
    """Run the parts until the time is up; ``save`` is called after each."""
    start = time.monotonic()
    scale.deadline = start + seconds
    results: Json = {"seconds": {}, "left_out": []}
    for name in parts:
        spent = time.monotonic() - start
        # A part takes a minute or so, and what it has so far would be lost with the call.
        if spent > 0.8 * seconds:
            say(f"{name}: left out, {spent:.0f} of {seconds:.0f} s are spent")
            results["left_out"].append(name)
            continue
        say(f"{name} …")
        results[name] = PARTS[name](scale)
        if scale.device.type == "cuda":
            torch.cuda.empty_cache()
        results["seconds"][name] = round(time.monotonic() - start - spent, 1)
        save(results)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all, or say that there is no GPU."""
    parser = parser_of("gpu", __doc__)
    add = parser.add_argument
    add("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    add("--seconds", type=float, default=500, help="no part begins after 0.8 of these (500)")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU, nothing kept")
    add("--output", type=Path, help="JSON file (named after the GPU)")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("error: torch finds no GPU here; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    scale = rehearsal() if args.rehearse else Scale(torch.device("cuda"))
    torch.manual_seed(0)
    known = facts("gpu", argv, scale.device)
    known["precision"] = "bfloat16 autocast"
    path = args.output
    if path is None and not args.rehearse:
        path = RESULTS / f"gpu_{slug(scale.device)}.json"
    save = partial(_save, known, path)
    results = run(scale, args.only, args.seconds, save)
    print(f"{', '.join(results['seconds'])}: {sum(results['seconds'].values()):.0f} s")
    if path is not None:
        print(f"wrote {path}")
    return 0


def _save(known: Json, path: Path | None, results: Json) -> None:
    if path is not None:
        write({**known, **results}, path)


if __name__ == "__main__":
    sys.exit(main())
