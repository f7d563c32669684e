"""Training memory of a detector's trunk at 1024 pixels: reversible ones beside Detectron2's.

    python -m benchmarks.bench_detection_memory      # two minutes; no GPU, hardly any memory

One image under bfloat16 autocast, on shape-only tensors as on a GPU. Two numbers for each trunk,
both without parameters, the optimizer's state, gradients that are done, and the image:

held   what is alive between the forward and the backward pass, apart from the feature maps
peak   the most that is alive at any moment of the two: what is held, the working set of the
       backward pass, and the gradients that arrive at the feature maps

The softmax of Detectron2's attention is taken in bfloat16, which is to its favour: on a GPU it
keeps the N x N weights in float32 beside them. Scratch memory inside of kernels does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from backbones import MemoryPolicy, create_model
from backbones.common.files import write_json
from backbones.engine.policies import Block
from backbones.memory.simulation import Simulation
from benchmarks.measuring import RESULTS, Json, facts, parser_of

# Windows of 14 and four global blocks, as in ViTDet; its rates of drop path.
_WINDOWS = {"window_size": 14, "use_rel_pos": True}
_BASE = {**_WINDOWS, "global_attn_indexes": (2, 5, 8, 11), "drop_path_rate": 0.1}
_LARGE = {**_WINDOWS, "global_attn_indexes": (5, 11, 17, 23), "drop_path_rate": 0.4}
_TWIN = {"final_norm": False, "pretrain_img_size": 224}  # as the recipes of the twins
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "Rev-ViT-B": ("rev_vit_base", _BASE),
    "ViT-B": ("vit_base", _BASE | _TWIN),
    "Rev-ViT-L": ("rev_vit_large", _LARGE),
    "ViT-L": ("vit_large", _LARGE | _TWIN),
    "Rev-MViT-B": ("rev_mvit_base", {"drop_path_rate": 0.4}),
}
POLICIES: tuple[MemoryPolicy, ...] = ("store", "checkpoint", "reversible")


def detectron2_trunks(img_size: int) -> dict[str, Callable[[], nn.Module]]:
    """Its ViTDet and MViTv2 trunks, with the arguments of its own recipes."""
    from detectron2.modeling.backbone.mvit import MViT
    from detectron2.modeling.backbone.vit import ViT

    def vit(embed_dim: int, depth: int, num_heads: int, drop_path_rate: float) -> nn.Module:
        step = depth // 4
        return ViT(
            img_size=img_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path_rate=drop_path_rate,
            window_size=14,
            window_block_indexes=[i for i in range(depth) if i % step != step - 1],
            use_rel_pos=True,
        )

    return {
        "ViTDet-B": partial(vit, 768, 12, 12, 0.1),
        "ViTDet-L": partial(vit, 1024, 24, 16, 0.4),
        "MViTv2-B": partial(
            MViT,
            img_size=img_size,
            depth=24,
            last_block_indexes=(1, 4, 20, 23),
            drop_path_rate=0.4,
        ),
    }


class _Maps(torch.autograd.Function):
    """Stands for what consumes the feature maps: keeps none, and gives each a dense gradient."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.shapes = [(stage_map.shape, stage_map.dtype) for stage_map in maps]
        return maps[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)


class Ours(nn.Module):
    """A trunk of `backbones` and what consumes its feature maps."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return _Maps.apply(*self.trunk.feature_maps(images))


class Theirs(Block):
    """A trunk of Detectron2 and what consumes its feature maps, as one block: it stores."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__(trunk, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        return _Maps.apply(*self.f(images).values())


def ours(label: str, size: int, **changes: Any) -> nn.Module:
    """One of `OURS` at a size, with other arguments if wanted."""
    name, options = OURS[label]
    return Ours(create_model(name, num_classes=0, img_size=size, **{**options, **changes}))


def count(build: Callable[[], nn.Module], policy: MemoryPolicy, size: int) -> Json:
    """What one image of ``size`` x ``size`` pixels takes in a model built on the meta device."""
    # Detectron2 reads the rates of drop path from a tensor, which therefore needs its data.
    linspace = partial(torch.linspace, device="cpu")
    with torch.device("meta"), mock.patch.object(torch, "linspace", linspace):
        simulation = Simulation(build(), torch.empty(1, 3, size, size), "cuda", torch.bfloat16)

    def drop(param: Tensor) -> None:
        param.grad = None

    params = list(simulation.model.parameters())
    for param in params:
        param.register_post_accumulate_grad_hook(drop)
    step = simulation.step(policy)
    there = sum(step.peak[part] for part in ("parameters", "optimizer state", "input"))
    # Behind all products is the optimizer's step.
    passes = [size for operations, size in step.timeline if operations < step.operations]
    return {
        "parameters": sum(param.numel() for param in params),
        "held": step.held_bytes,
        "peak": max(passes) - there,
    }


def measure(size: int) -> list[Json]:
    """One row for each trunk and policy, Detectron2's first."""
    todo: list[tuple[str, str, MemoryPolicy, Callable[[], nn.Module]]] = []
    try:
        for name, build in detectron2_trunks(size).items():
            todo.append((name, "Detectron2", "store", partial(lambda make: Theirs(make()), build)))
    except ImportError:
        print("Detectron2 is not installed: its trunks are left out", file=sys.stderr)
    for label, policy in product(OURS, POLICIES):
        if policy != "reversible" or label.startswith("Rev-"):
            todo.append((label, policy, policy, partial(ours, label, size)))
    return [
        {"trunk": name, "policy": label, **count(build, policy, size)}
        for name, label, policy, build in tqdm(todo, desc="trunks", disable=None)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print a table and write the JSON file."""
    parser = parser_of("bench_detection_memory", __doc__)
    parser.add_argument("--size", type=int, default=1024, help="side of the image in pixels (1024)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "detection_memory.json", help="JSON file"
    )
    args = parser.parse_args(argv)
    rows = measure(args.size)
    print(f"{'trunk':12} {'':12} {'held, GiB':>10} {'peak, GiB':>10}")
    for row in rows:
        held, peak = (row[key] / 2**30 for key in ("held", "peak"))
        print(f"{row['trunk']:12} {row['policy']:12} {held:10.3f} {peak:10.3f}")
    results = {
        **facts("bench_detection_memory", argv, torch.device("cpu")),
        "device_name": "shape-only tensors",
        "img_size": args.size,
        "batch": 1,
        "precision": "bfloat16 autocast",
        "unit": "bytes, without parameters, gradients that are done, and the image",
        "trunks": rows,
    }
    write_json(args.output, results)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
