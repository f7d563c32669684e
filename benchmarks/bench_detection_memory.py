"""Training memory of a detector's trunk at 1024 pixels: reversible ones beside Detectron2's.

    python -m benchmarks.bench_detection_memory      # a minute or two; no GPU, hardly any memory

One image, bfloat16 autocast, on shape-only tensors: nothing of the size of the models is allocated,
and what is counted is what the code does, not a formula about it. Two numbers for each trunk, both
without parameters, without their gradients and without the image:

held   what is alive between the forward and the backward pass, apart from the feature maps
peak   the most that is alive at any moment of the two: what is held, the working set of the
       backward pass, and the gradients that arrive at the feature maps

Operators and autocast are those of the CPU, since shape-only tensors of a GPU would need one. Our
trunks run layer norm and drop path in float32 all the same, as autocast has it on a GPU.
Detectron2's do not, nor its softmax, which is to its favour: on a GPU it keeps the N x N weights in
float32 beside those in bfloat16. Fused attention counts as the CPU's kernel does, which keeps one
number per query beside its output, as the GPU's do. Scratch memory inside of kernels does not
count, on either side.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from backbones import MemoryPolicy, create_model, set_memory
from benchmarks.measuring import RESULTS, facts, parser_of, write

# Windows of 14 and four global blocks, as in ViTDet; its rates of drop path.
_WINDOWS = {"window_size": 14, "use_rel_pos": True}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "Rev-ViT-B": (
        "rev_vit_base",
        {**_WINDOWS, "global_attn_indexes": (2, 5, 8, 11), "drop_path_rate": 0.1},
    ),
    "Rev-ViT-L": (
        "rev_vit_large",
        {**_WINDOWS, "global_attn_indexes": (5, 11, 17, 23), "drop_path_rate": 0.4},
    ),
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


class LiveBytes(TorchDispatchMode):
    """Follows every storage that is made in the context, from its first to its last moment.

    Args:
        there_anyway: tensors that do not count.
        fake: the mode that makes shape-only tensors where an operator has no tensor to take after;
            None for tensors with data.

    Attributes:
        attention: the fused attention kernels that ran.
    """

    def __init__(self, there_anyway: Sequence[Tensor], fake: FakeTensorMode | None) -> None:
        super().__init__()
        self.attention: set[str] = set()
        self._fake = fake
        self._there_anyway = {tensor.untyped_storage()._cdata for tensor in there_anyway}
        self._numbers: dict[int, int] = {}  # of the storages alive, by address
        self._references: dict[int, Any] = {}
        self._not_counted: set[int] = set()
        self._events: list[tuple[int, int]] = []  # which storage, and how many bytes more or less

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        takes_tensors = any(isinstance(arg, Tensor) for arg in tree_leaves((args, kwargs)))
        if self._fake is None or takes_tensors:
            out = func(*args, **kwargs)
        else:
            with self._fake:
                out = func(*args, **kwargs)
        if "scaled_dot_product" in func.name():
            self.attention.add(func.name())
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._there_anyway or address in self._numbers:
            return
        number = self._numbers[address] = len(self._events)

        def end(_: object) -> None:
            del self._numbers[address], self._references[address]
            self._events.append((number, -size))

        self._references[address] = weakref.ref(storage, end)
        self._events.append((number, size))

    def leave_out(self, tensor: Tensor) -> None:
        """Let the storage of ``tensor`` not count, from its first moment on."""
        self._not_counted.add(self._numbers[tensor.untyped_storage()._cdata])

    def history(self) -> list[int]:
        """The bytes alive after each event so far."""
        live, history = 0, [0]
        for number, size in self._events:
            if number not in self._not_counted:
                live += size
            history.append(live)
        return history


class _Detector(torch.autograd.Function):
    """Stands for what consumes the feature maps: keeps none, and gives each a dense gradient."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.shapes = [(stage_map.shape, stage_map.dtype) for stage_map in maps]
        return maps[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)


@contextmanager
def _float32_as_on_a_gpu() -> Iterator[None]:
    """Two functions in float32 that the CPU's autocast leaves in half precision."""

    def in_float32(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return original(*args, **kwargs)

        return run

    with (
        mock.patch.object(F, "layer_norm", in_float32(F.layer_norm)),
        mock.patch.object(torch, "addcmul", in_float32(torch.addcmul)),
    ):
        yield


def count_bytes(
    trunk: nn.Module, images: Tensor, fake: FakeTensorMode | None = None
) -> dict[str, Any]:
    """Forward and backward pass of ``trunk`` under bfloat16 autocast.

    Args:
        trunk: one of ours; or one of Detectron2's, which gives its feature maps when called.
        images: (B, 3, H, W), on the CPU.
        fake: the mode that parameters and images were made in; None if they have data.

    Returns:
        the number of ``parameters``, bytes ``held`` and at the ``peak``, and the names of the
        ``attention`` kernels.
    """
    params = list(trunk.parameters())
    live = LiveBytes([*params, *trunk.buffers(), images], fake)
    for param in params:
        param.grad = None
        param.register_post_accumulate_grad_hook(lambda param: live.leave_out(param.grad))
    own = hasattr(trunk, "feature_maps")
    with _float32_as_on_a_gpu() if own else nullcontext(), live:
        with torch.autocast("cpu", torch.bfloat16):
            maps = trunk.feature_maps(images) if own else trunk(images).values()
            loss = _Detector.apply(*maps)
            del maps
        held = live.history()[-1]
        loss.backward()
        del loss
    return {
        "parameters": sum(param.numel() for param in params),
        "held": held,
        "peak": max(live.history()),
        "attention": sorted(live.attention),
    }


def count_shapes(
    build: Callable[[], nn.Module], policy: MemoryPolicy | None, size: int
) -> dict[str, Any]:
    """:func:`count_bytes` on shape-only tensors, for one image of ``size`` x ``size`` pixels."""
    # Detectron2 reads the rates of drop path from a tensor, which therefore needs its data.
    linspace = partial(torch.linspace, device="cpu")
    with torch.device("meta"), mock.patch.object(torch, "linspace", linspace):
        trunk = build().train()
    if policy is not None:
        set_memory(trunk, policy)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        trunk.to_empty(device="cpu")
        images = torch.empty(1, 3, size, size)
    return count_bytes(trunk, images, fake)


def measure(size: int) -> list[dict[str, Any]]:
    """One row for each trunk and policy, Detectron2's first."""
    todo: list[tuple[str, MemoryPolicy | None, Callable[[], nn.Module]]] = []
    try:
        todo += [(name, None, build) for name, build in detectron2_trunks(size).items()]
    except ImportError:
        print("Detectron2 is not installed: its trunks are left out", file=sys.stderr)
    for label, (name, options) in OURS.items():
        build = partial(create_model, name, num_classes=0, img_size=size, **options)
        todo += [(label, policy, build) for policy in POLICIES]
    return [
        {"trunk": name, "policy": policy or "Detectron2", **count_shapes(build, policy, size)}
        for name, policy, build in tqdm(todo, desc="trunks", disable=None)
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
        "unit": "bytes, without parameters, their gradients and the image",
        "trunks": rows,
    }
    write(results, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
