"""Who reads which video: equal steps, none lost, none twice, and the same again after a resume."""

from __future__ import annotations

import math
from itertools import chain

import pytest
from torch.utils.data import DataLoader

from backbones.common.errors import UserError
from backbones.common.seeds import seed_of
from revvideo.data.loader import ResumableSampler, TestBatches

Keys = list[tuple[int, int]]


def of_epochs(sampler: ResumableSampler, epochs: int) -> Keys:
    keys: Keys = []
    for epoch in range(epochs):
        sampler.epoch = epoch
        keys += sampler
    return keys


@pytest.mark.parametrize("size, batch", [(24, 4), (23, 4), (10, 3), (7, 7)])
def test_every_video_once_before_any_comes_again(size, batch):
    keys = of_epochs(ResumableSampler(size, batch), 12)
    assert [position for _, position in keys] == list(range(len(keys)))
    indices = [index for index, _ in keys]
    passes = [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)]
    assert len(passes) >= 8
    for of_pass in passes:
        assert sorted(of_pass) == list(range(size))
    assert len(set(map(tuple, passes))) == len(passes)  # shuffled anew each time


def test_an_epoch_is_whole_batches():
    sampler = ResumableSampler(23, 4)
    assert sampler.steps_per_epoch == 5 and len(sampler) == 20
    for epoch in range(3):
        sampler.epoch = epoch
        assert len(list(sampler)) == len(sampler)
    assert len(DataLoader(range(23), batch_size=4, sampler=sampler)) == 5


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_processes(world):
    one = of_epochs(ResumableSampler(50, 6, seed=3), 4)
    shards = [
        of_epochs(ResumableSampler(50, 6 // world, seed=3, rank=rank, world_size=world), 4)
        for rank in range(world)
    ]
    assert len({len(shard) for shard in shards}) == 1
    local = 6 // world
    for step in range(len(one) // 6):
        together = chain.from_iterable(shard[step * local : (step + 1) * local] for shard in shards)
        assert sorted(together) == sorted(one[step * 6 : (step + 1) * 6])


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_resumes_in_the_middle_of_an_epoch(rank, world):
    whole = of_epochs(ResumableSampler(47, 4, seed=1, rank=rank, world_size=world), 4)
    per_epoch = len(whole) // 4
    resumed = ResumableSampler(47, 4, seed=1, rank=rank, world_size=world)
    resumed.epoch = 2
    resumed.start_step = 3
    assert list(resumed) == whole[2 * per_epoch + 12 : 3 * per_epoch]
    resumed.epoch = 3
    assert list(resumed) == whole[3 * per_epoch :]  # it applies once
    assert len(resumed) == per_epoch


def test_seeds():
    first, again, other = (list(ResumableSampler(40, 4, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900


@pytest.mark.parametrize("size, batch, world", [(7, 4, 2), (0, 1, 1), (8, 0, 1)])
def test_too_few_videos(size, batch, world):
    with pytest.raises(UserError, match=f"{size} readable .* batch of {batch} on each of {world}"):
        ResumableSampler(size, batch, world_size=world)


@pytest.mark.parametrize("size", [0, 1, 2, 9, 10, 11])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_every_video_is_tested_once_in_equally_many_steps(size, world, batch):
    samplers = [TestBatches(size, batch, rank=rank, world_size=world) for rank in range(world)]
    shards = [list(sampler) for sampler in samplers]
    steps = math.ceil(math.ceil(size / world) / batch)
    assert {len(sampler) for sampler in samplers} == {len(shard) for shard in shards} == {steps}
    sizes = [sum(map(len, shard)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    batches = list(chain.from_iterable(shards))
    assert all(len(keys) <= batch for keys in batches)
    assert sorted(chain.from_iterable(batches)) == [(i, i) for i in range(size)]
