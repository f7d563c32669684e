"""What it costs to start a reversible net from a plain one, and what stays alive in training.

    python -m benchmarks.bench_rewire                # about ten minutes on one CPU core

A plain vision transformer learns to tell crops of photographs apart (those of the demo). Then the
same steps go on with it; with the reversible net that its branches make (`load_weights`); and with
that net from random weights. Test crops are of parts of the photographs that training never sees.
Beside it, of ViT-B at 224 pixels: bytes and speed of the plain net, stored and checkpointed, and of
the reversible one.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import create_model, load_weights, set_memory
from backbones.common.files import write_json
from benchmarks.measuring import RESULTS, Json, Trainer, alternate, facts, parser_of, say, slug
from demo.cutouts import BACKGROUNDS
from demo.folder import photograph

FILES = sorted(f"{BACKGROUNDS['train']} {BACKGROUNDS['val']} chelsea.png coins.png".split())
SIDE = 32  # pixels of a crop as the net sees it
SIZES = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 12, "num_heads": 2}
WARMUP, RATE = 20, 1e-3  # steps, and the learning rate after them, which falls as a cosine
# Each net's policy, as it would be trained.
NETS = {"plain": "store", "rewired": "reversible", "from scratch": "reversible"}


def crops(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Crops (count, 3, SIDE, SIDE) and the number of the photograph each is of.

    For training of the left 70 % of a photograph, for testing of the rest; flipped at random, with
    random scale, colours and contrast.
    """
    rng = np.random.default_rng([seed, split == "test"])
    images, labels = [], rng.integers(len(FILES), size=count)
    for label in labels:
        picture = photograph(FILES[label]).convert("RGB")
        border = int(0.7 * picture.width)
        left, right = (0, border) if split == "train" else (border, picture.width)
        side = int(rng.uniform(40, min(120, right - left, picture.height)))
        x = left + rng.integers(right - left - side + 1)
        y = rng.integers(picture.height - side + 1)
        small = picture.resize((SIDE, SIDE), box=(x, y, x + side, y + side))
        pixels = np.asarray(small, np.float32) / 128 - 1
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        images.append(pixels * rng.uniform(0.6, 1.4, 3) + rng.uniform(-0.3, 0.3, 3))
    found = torch.from_numpy(np.stack(images)).float()
    return found.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Percent of the test crops that are told apart."""
    model.eval()
    with torch.no_grad():
        right = [
            (model(x).argmax(1) == y).sum().item()
            for x, y in zip(*(part.split(100) for part in data), strict=True)
        ]
    model.train()
    return round(100 * sum(right) / len(data[1]), 1)


def train(
    model: nn.Module, data: Json, steps: int, seed: int, every: int
) -> list[tuple[int, float]]:
    """Train, and return the accuracy every so many steps, from step 0 on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    generator = torch.Generator().manual_seed(seed)
    images, labels = data["train"]
    points = [(0, accuracy(model, data["test"]))]
    for step in range(1, steps + 1):
        batch = torch.randint(len(labels), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        rate.step()
        if step % every == 0:
            points.append((step, accuracy(model, data["test"])))
    return points


def net(kind: str, file: Path) -> nn.Module:
    """One of :data:`NETS`, started from the plain net's file or from random weights."""
    name = "vit_tiny" if kind == "plain" else "rev_vit_tiny"
    model = create_model(name, num_classes=len(FILES), **SIZES)
    set_memory(model, NETS[kind])
    if kind != "from scratch":
        load_weights(model, file)
    return model


def run_seed(args: argparse.Namespace, seed: int) -> Json:
    """Accuracies of all nets over the steps of one seed."""
    torch.manual_seed(seed)
    counts = {"train": args.crops, "test": args.crops // 3}
    data = {split: crops(split, count, seed) for split, count in counts.items()}
    first = create_model("vit_tiny", num_classes=len(FILES), **SIZES)
    found: Json = {"first": train(first, data, args.first, seed, args.first)}
    say(f"  seed {seed}: the plain net {found['first'][-1][1]} % after {args.first} steps")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plain.pth")
        torch.save(first.state_dict(), file)
        for kind in NETS:
            torch.manual_seed(seed + 100)
            found[kind] = train(net(kind, file), data, args.steps, seed + 100, args.steps // 6)
            say(f"  seed {seed}: {kind} {found[kind][-1][1]} %")
    return found


def cost(depth: int, rounds: int) -> dict[str, Json]:
    """Bytes and speed of ViT-B, plain and reversible, by policy; two images of 224 pixels."""
    trainer = Trainer((2, 3, 224, 224), torch.device("cpu"), clock=time.process_time)
    models = {}
    for name, policy, keep in (
        ("vit_base", "store", ()),
        ("vit_base", "checkpoint", ()),
        ("rev_vit_base", "store", ()),
        ("rev_vit_base", "reversible", ()),
        ("rev_vit_base", "reversible", ("g.mlp.fc2",)),
    ):
        model = create_model(name, num_classes=0, depth=depth)
        set_memory(model, policy, keep=keep)
        models[f"{name}, {', '.join([policy, *keep])}"] = model.train()
    steps = {name: partial(trainer.seconds, model) for name, model in models.items()}
    found = alternate(steps, next(iter(steps)), rounds)
    for name, model in models.items():
        found[name]["held"] = trainer.held(model)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print a summary and write the JSON file."""
    parser = parser_of("bench_rewire", __doc__)
    add: Any = parser.add_argument
    add("--first", type=int, default=600, help="steps of the plain net before (600)")
    add("--steps", type=int, default=240, help="steps of each net after that (240)")
    add("--seeds", type=int, default=2, help="how many (2)")
    add(
        "--crops",
        type=int,
        default=6000,
        help="to train on; for tests a third as many (6000)",
    )
    add("--depth", type=int, default=12, help="blocks of the ViT-B whose cost is measured (12)")
    add("--rounds", type=int, default=4, help="turns of each in that (4)")
    device = torch.device("cpu")
    add("--output", type=Path, default=RESULTS / f"rewire_{slug(device)}.json", help="JSON file")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {key: getattr(args, key) for key in ("first", "steps", "crops", "depth")}
    results = {**facts("bench_rewire", argv, device), **settings, "photographs": len(FILES)}
    results["seeds"] = [run_seed(args, seed) for seed in range(args.seeds)]
    trainer = Trainer((64, 3, SIDE, SIDE), device)
    results["held"] = {}
    for kind, policy in NETS.items():
        model = create_model("vit_tiny" if kind == "plain" else "rev_vit_tiny", **SIZES).train()
        set_memory(model, policy)
        results["held"][kind] = trainer.held(model)
    results["contestants"] = cost(args.depth, args.rounds)
    torch.set_num_threads(threads)
    write_json(args.output, results)
    for kind in NETS:
        last = ", ".join(f"{found[kind][-1][1]} %" for found in results["seeds"])
        print(f"{kind:14} {last}; {results['held'][kind] / 1e6:.1f} MB held")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
