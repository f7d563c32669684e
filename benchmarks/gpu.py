"""Every question about memory and speed, answered on one GPU in one call of under nine minutes.

    python -m benchmarks.gpu                         # writes benchmarks/results/gpu_<name>.json
    python -m benchmarks.gpu --only speed --output speed.json
    python -m benchmarks.gpu --rehearse              # every part at tiny sizes, on the CPU

Needs torch and `backbones`, nothing else and no network. The file is written after every part. A
part that the time or the card does not suffice for is named in it; on a small card the model and
the batch that contestants are compared with are smaller.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from backbones import create_model, set_memory
from backbones.common.files import write_json
from benchmarks import bench_drift, bench_profile
from benchmarks.bench_speed import compare, compile_seconds
from benchmarks.contestants import ALL, EAGER, Contestant
from benchmarks.measuring import RESULTS, Json, Trainer, facts, parser_of, say, sharing, slug

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
    largest_batch: int = 2048
    rounds: int = 8
    patience: float = 1.5  # seconds: a larger batch than that of such a step is not tried

    @property
    def in_time(self) -> bool:
        """Whether there is time for another case."""
        return time.monotonic() < self.deadline

    def tidy(self) -> None:
        """Give back what is not in use; compiled and wrapped blocks are cycles."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fit(self) -> None:
        """Take the largest model and batch of which a stored step fits this card."""
        for size in ("large", "base", "small") if self.large == "large" else ():
            model = self.model(f"rev_vit_{size}")
            set_memory(model, "store")
            for batch in (32, 16, 8):
                if self.peak(model, batch) is not None:
                    self.large, self.batch = size, batch
                    return
            del model
            self.tidy()

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
        except torch.OutOfMemoryError:  # of the images
            return None
        finally:
            model.zero_grad(set_to_none=True)


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


def speed(scale: Scale) -> Json:
    """Every contestant, eager and compiled, on the large size at equal batch; with peaks."""
    model = scale.model(f"rev_vit_{scale.large}")
    trainer = scale.trainer(scale.batch)
    compiling = compile_seconds(model, trainer)
    result = compare(model, trainer, ALL, scale.rounds)
    for name, own in _contestants(model, ALL).items():
        result[name]["peak"] = scale.peak(own, scale.batch)
    return {
        "model": f"rev_vit_{scale.large}",
        "batch": scale.batch,
        "compile_seconds": compiling,
        "contestants": result,
    }


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
        try:
            models = _contestants(scale.model(f"rev_vit_{scale.sizes[1][0]}", blocks), EAGER)
        except torch.OutOfMemoryError:
            models = {}
        for name in EAGER:
            own = models.get(name)
            peaks[name].append(None if own is None else scale.peak(own, scale.batch // 2))
        own = models = None
        scale.tidy()
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
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)


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
        own = model = None
        scale.tidy()
    return found


def _largest_batch(scale: Scale, model: nn.Module, room: int) -> int:
    """The largest batch, to within a twentieth, that trains with the allocator as it is held.

    Doubled until it does not fit, or until it is the largest that is tried; then by bisection.
    """
    fits, too_many = 0, scale.largest_batch + 1
    while fits < scale.largest_batch and too_many - fits > max(1, fits // 20) and scale.in_time:
        batch = (fits + too_many) // 2 if too_many <= scale.largest_batch else max(1, 2 * fits)
        batch = min(batch, scale.largest_batch)
        # A rehearsal has no allocator: 1 MB for each image.
        fitting = batch * 10**6 <= room
        if scale.device.type == "cuda":
            model.zero_grad(set_to_none=True)
            try:
                scale.trainer(batch).seconds(model)
                fitting = True
            except torch.OutOfMemoryError:
                fitting = False
            scale.tidy()
        fits, too_many = (batch, too_many) if fitting else (fits, batch)
    model.zero_grad(set_to_none=True)
    return fits


def budgets(scale: Scale) -> Json:
    """The largest batch within 8 to 80 GB, parameters and AdamW's state included, and its speed."""
    size, blocks = scale.sizes[-1]
    on_gpu = scale.device.type == "cuda"
    total = torch.cuda.mem_get_info(scale.device)[1] if on_gpu else 20 * 10**9
    model = scale.model(f"rev_vit_{size}", blocks)
    # As AdamW keeps them: two numbers for each parameter.
    state = [torch.zeros_like(p) for p in model.parameters() for _ in range(2)]
    found: Json = {}
    try:
        for name, own in _contestants(model, {name: EAGER[name] for name in SAVING}).items():
            rows: Json = {}
            for budget in BUDGETS_GB:
                if budget * 10**9 > total:
                    break
                if not scale.in_time:
                    rows[f"{budget} GB"] = "out of time"
                    continue
                scale.tidy()
                if on_gpu:
                    share = budget * 10**9 / total
                    torch.cuda.set_per_process_memory_fraction(share, scale.device)
                batch = _largest_batch(scale, own, budget * 10**9)
                speed = _images_per_second(scale, own, batch) if batch else None
                rows[f"{budget} GB"] = {"largest_batch": batch, "images_per_second": speed}
                if batch == scale.largest_batch:
                    break  # with more memory it is the same
            found[name] = rows
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, scale.device)
    del state
    return {
        "model": f"rev_vit_{size}",
        "depth": blocks,
        "largest_batch_tried": scale.largest_batch,
        "contestants": found,
    }


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


# In the order of what would be missed most; the last two take what time is left.
PARTS: dict[str, Callable[[Scale], Json]] = {
    part.__name__: part for part in (slope, mixture, speed, depth, profile, drift, budgets, batches)
}


def run(scale: Scale, parts: Sequence[str], seconds: float, save: Callable[[Json], None]) -> Json:
    """Run the parts until the time is up; ``save`` is called after each."""
    start = time.monotonic()
    scale.deadline = start + seconds
    scale.fit()
    results: Json = {"seconds": {}, "out_of_time": [], "out_of_memory": []}
    for name in parts:
        begun = time.monotonic()
        # Each part but the last two takes up to a minute; those two look at the clock themselves.
        if begun + (60 if seconds > 60 else 0) > scale.deadline:
            say(f"{name}: left out, {begun - start:.0f} of {seconds:.0f} s are spent")
            results["out_of_time"].append(name)
            continue
        say(f"{name} …")
        try:
            results[name] = PARTS[name](scale)
        except torch.OutOfMemoryError as error:
            say(f"{name}: {error}")
            results["out_of_memory"].append(name)
        torch._dynamo.reset()
        scale.tidy()
        results["seconds"][name] = round(time.monotonic() - begun, 1)
        save(results)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all, or say that there is no GPU."""
    parser = parser_of("gpu", __doc__)
    add = parser.add_argument
    add("--only", choices=PARTS, nargs="+", help="parts to run; needs --output")
    add("--seconds", type=float, default=480, help="end after about so many (480)")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU, nothing kept")
    add("--output", type=Path, help="JSON file (named after the GPU)")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("error: torch finds no GPU here; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    if args.only and not args.output and not args.rehearse:
        print("error: --only needs --output, not to replace all by some parts", file=sys.stderr)
        return 2
    if args.rehearse:
        scale = rehearsal()
    else:
        scale = Scale(torch.device("cuda", torch.cuda.current_device()))
    torch.manual_seed(0)
    known = {**facts("gpu", argv, scale.device), "precision": "bfloat16 autocast"}
    path = args.output
    if path is None and not args.rehearse:
        path = RESULTS / f"gpu_{slug(scale.device)}.json"

    def save(results: Json) -> None:
        if path is not None:
            write_json(path, {**known, **results})

    results = run(scale, args.only or list(PARTS), args.seconds, save)
    print(f"{', '.join(results['seconds'])}: {sum(results['seconds'].values()):.0f} s")
    if path is not None:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
