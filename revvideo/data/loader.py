"""Which videos each process reads, in training and in testing.

torch's ``DistributedSampler`` repeats videos where they do not divide evenly among the processes,
and starts an interrupted epoch over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from backbones.common.errors import UserError
from backbones.common.seeds import seed_of

_File = TypeVar("_File")
_Made = TypeVar("_Made")


class ResumableSampler(Sampler[tuple[int, int]]):
    """Shuffled ``(index, position)`` for training, the same whenever they are asked for again.

    One endless sequence of permutations of the dataset is dealt out: position p goes to process
    ``p % world_size``. So each global batch is the same for any number of processes, and every
    video comes once before any comes again. An epoch of the trainer is ``steps_per_epoch`` global
    batches; videos beyond the last full batch of an epoch open the next one. A data set whose
    ``size`` does not fill one batch of ``batch_size`` on each process is a UserError.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or size < batch_size * world_size:
            batch = f"one batch of {batch_size} on each of {world_size} processes"
            remedy = "set a smaller optim.batch_size, or add videos"
            raise UserError(f"{size} readable training videos do not fill {batch}: {remedy}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = size // (batch_size * world_size)
        self.step = 0  # of all, from which the next iteration goes to the end of its epoch

    def __len__(self) -> int:
        """Videos of this process in a whole epoch."""
        return self.steps_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        global_batch, epoch = self.batch_size * self.world_size, self.step // self.steps_per_epoch
        start, stop = self.step * global_batch, (epoch + 1) * self.steps_per_epoch * global_batch
        permutation, order = -1, []
        for position in range(start + self.rank, stop, self.world_size):
            if position // self.size != permutation:
                permutation = position // self.size
                generator = torch.Generator().manual_seed(seed_of(self.seed, permutation))
                order = torch.randperm(self.size, generator=generator).tolist()
            yield order[position % self.size], position


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on behind so many ``steps`` of the optimizer, taken in earlier sessions.

    Lightning's count of epochs reaches a sampler only after the workers have started on the wrong
    one, and at the end of an epoch it gives no state back. Its ``sampler`` is a
    :class:`ResumableSampler`; ``batches_per_step`` are those of a step.
    """

    def __init__(
        self, *arguments: Any, batches_per_step: int, steps: int = 0, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.batches_per_step, self.batches = batches_per_step, steps * batches_per_step

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, ResumableSampler)
        sampler.step = self.batches // self.batches_per_step
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Nothing; by having this, Lightning knows a loader that can go on within an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing: ``steps`` say it."""


def batches_to_test(
    size: int, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> list[list[tuple[int, int]]]:
    """Batches of ``(index, index)`` for testing: every video once over all processes.

    Every process makes the same number of steps, as a sharded model needs; where it has fewer
    videos, its last batches are smaller or empty.
    """
    indices = [(index, index) for index in range(rank, size, world_size)]
    largest = -(-size // world_size)  # of all processes
    return [indices[start : start + batch_size] for start in range(0, largest, batch_size)]


def each_file(
    make: Callable[[_File], _Made],
    files: Sequence[_File],
    text: str,
    workers: int | None,
    least: int = 1,
) -> Iterable[_Made]:
    """What ``make`` makes of each file, in their order, below a progress bar.

    By ``workers`` processes, None for one per core, each of which gets ``least`` files or more.
    """
    workers = min((os.cpu_count() or 1) if workers is None else workers, len(files) // least)
    # Without a batch size, it is called for one file at a time.
    how: dict[str, Any] = {"batch_size": None, "collate_fn": make, "num_workers": workers}
    return tqdm(DataLoader(files, **how), desc=text, unit="file", disable=None)  # type: ignore[arg-type]
