"""What one of the processes of test_ddp.py does. A module of its own, so that it can be imported
by a process that knows nothing of pytest."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbones import MemoryPolicy, set_memory
from tests.backbones.helpers import DIM, make_sequence

WORLD = 2
MICRO_BATCHES = 2
# The policy, stored blocks, what is kept, slices.
POLICIES: list[tuple[MemoryPolicy, int, tuple[str, ...], int]] = [
    ("store", 0, (), 1),
    ("checkpoint", 0, (), 1),
    ("checkpoint", 0, ("g.*",), 2),
    ("reversible", 0, (), 1),
    ("reversible", 2, ("g.*",), 1),
    ("reversible", 1, ("products",), 2),
]
MODES: dict[str, dict[str, object]] = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "no_sync": {},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "small_buckets": {"bucket_cap_mb": 0.001},
    "no_sync, gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "frozen": {},
}


class Net(nn.Module):
    """A trunk between two layers; one more layer that may stay out of the loss."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.trunk = make_sequence(4)
        self.stem = nn.Linear(DIM, DIM).double()
        self.head = nn.Linear(2 * DIM, 3).double()
        if mode == "find_unused_parameters":
            self.unused = nn.Linear(DIM, DIM).double()
        if mode == "frozen":
            self.trunk.blocks[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat(self.trunk(x, x), dim=-1))


def batch() -> Tensor:
    """(micro batches, processes, samples, tokens, channels)."""
    generator = torch.Generator().manual_seed(9)
    shape = (MICRO_BATCHES, WORLD, 2, 5, DIM)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().mean()


def grads_of(net: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def run(rank: int, folder: str) -> None:
    """Take the gradients in every mode under every policy, and save those of this process.

    The second micro batch of a mode follows the first: accumulated without synchronisation in
    the `no_sync` modes, otherwise as a second iteration, which static graphs need.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    results = {}
    for mode, arguments in MODES.items():
        for policy in POLICIES:
            net = Net(mode)
            set_memory(net, *policy)
            ddp = DistributedDataParallel(net, **arguments)
            for index, micro_batch in enumerate(batch()):
                accumulate = "no_sync" in mode and index == 0
                with ddp.no_sync() if accumulate else nullcontext():
                    loss_of(ddp(micro_batch[rank])).backward()
                if not accumulate:
                    results[mode, policy, index] = grads_of(net)
                    net.zero_grad(set_to_none="gradient_as_bucket_view" not in mode)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
