"""One of the processes of ``test_datasets``: reads its shard of a set in which files are broken."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader

from revvideo.datasets import ClipDataset, UniformClips, collate
from revvideo.manifest import load_manifest
from revvideo.sampler import ShardSampler

WORLD = 2


def clip_mean(clip: torch.Tensor) -> torch.Tensor:
    """The smallest transform: float (3, T, 1, 1)."""
    return clip.float().mean((2, 3), keepdim=True).transpose(0, 1)


def read(manifest_path: Path, rank: int, world: int) -> tuple[list[tuple[str, float]], list[str]]:
    """(path, a score) of each video of a shard, and the paths of those that broke."""
    manifest = load_manifest(manifest_path)
    records = manifest.readable
    loader = DataLoader(
        ClipDataset(records, manifest.root, UniformClips(4, 2, clips=2), clip_mean),
        batch_size=2,
        sampler=ShardSampler(len(records), rank=rank, world_size=world),
        collate_fn=collate,
        num_workers=1,
    )
    scores, broken = [], []
    for batch in loader:
        means = batch["video"].flatten(1).mean(1).tolist() if len(batch["video"]) else []
        scores += [
            (records[index].path, mean)
            for index, mean in zip(batch["index"].tolist(), means, strict=True)
        ]
        broken += [path for path, _ in batch["problems"]]
    return scores, broken


def run(rank: int, folder: str) -> None:
    """Read the shard, gather what all have read, and save it."""
    distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    gathered: list = [None] * WORLD
    distributed.all_gather_object(gathered, read(Path(folder) / "manifest.csv", rank, WORLD))
    torch.save(gathered, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
