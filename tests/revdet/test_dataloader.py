"""Order and augmentation are a function of the seed and the iteration."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from backbones.common.errors import UserError
from revdet.data.loader import ResumableBatchSampler, SeededDataset, build_train_loader

GROUPS = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0]


def batches(count: int, **kwargs) -> list[list[tuple[int, int]]]:
    return list(islice(ResumableBatchSampler(GROUPS, batch_size=3, **kwargs), count))


def test_resuming_continues_the_sequence():
    whole = batches(20)
    assert batches(13, start_step=7) == whole[7:]
    assert batches(20) == whole
    assert batches(20, seed=1) != whole


def test_a_batch_is_of_one_group_and_nothing_is_lost():
    seen = [index for batch in batches(50) for index, _ in batch]
    for batch in batches(50):
        assert len({GROUPS[index] for index, _ in batch}) == 1
    counts = np.bincount(seen, minlength=len(GROUPS))
    assert counts.max() - counts.min() <= 2


def test_processes_share_each_epoch():
    """In turn, so that two with two batches each have those of four, or of one."""
    alone = batches(20, accumulate=4)
    for world_size, accumulate in ((2, 2), (4, 1)):
        sizes = {"world_size": world_size, "accumulate": accumulate}
        each = [batches(5 * accumulate, rank=rank, **sizes) for rank in range(world_size)]
        assert [batch for turn in zip(*each, strict=True) for batch in turn] == alone


def test_augmentation_depends_on_the_position_alone():
    records = [{"file_name": str(index)} for index in range(3)]
    dataset = SeededDataset(records, lambda record: (record["file_name"], np.random.rand()), 5)
    first = dataset[1, 40]
    np.random.rand(7)
    assert dataset[1, 40] == first
    assert dataset[1, 41] != first


def test_workers_do_not_change_the_data():
    records = [{"file_name": str(i), "width": 3 + i % 2, "height": 3} for i in range(7)]

    def take(num_workers: int) -> list[list[float]]:
        loader = build_train_loader(records, _draw, 2, num_workers=num_workers, seed=3)
        return list(islice(loader, 6))

    assert take(0) == take(2)


def _draw(record: dict) -> tuple[str, float]:
    return record["file_name"], float(np.random.rand())


def test_an_empty_dataset_is_refused():
    with pytest.raises(UserError, match="no image"):
        build_train_loader([], _draw, 2)
