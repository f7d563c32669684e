"""A training loader whose order and augmentations are a function of the seed and the iteration.

Detectron2's own starts its sampler over and draws other augmentations after a resume.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError, annotations_to_instances
from detectron2.structures import BitMasks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import DataLoader, Dataset, Sampler

from backbones.common.errors import UserError
from backbones.common.seeds import seed_of

Record = dict[str, Any]
Mapper = Callable[[Record], Any]  # may draw from the global generators


@dataclass(eq=False)
class ResumableBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of ``(index, position)``, the same whenever they are asked for again.

    Every epoch is a permutation of the dataset. Images of one group are put into one iteration, so
    that little is padded. Which these are depends on how many there are in an iteration, and not on
    the processes or on ``accumulate``; nor do the batches, where there are as many. The processes
    take them in turn.
    """

    groups: Sequence[int]  # that of each image, for example whether it is wider than high
    batch_size: int  # of one process
    seed: int = 0  # of the permutations
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1  # batches of one process in an iteration
    start_step: int = 0  # iterations to pass over: the one at which training resumes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in itertools.islice(self._steps(), self.start_step, None):
            for batch in range(self.rank, self.world_size * self.accumulate, self.world_size):
                first = batch * self.batch_size
                yield step[first : first + self.batch_size]

    def _steps(self) -> Iterator[list[tuple[int, int]]]:
        """All samples of each iteration."""
        size = self.batch_size * self.accumulate * self.world_size
        waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)
        generator, count = torch.Generator().manual_seed(self.seed), len(self.groups)
        epochs = (torch.randperm(count, generator=generator).tolist() for _ in itertools.count())
        for position, index in enumerate(itertools.chain.from_iterable(epochs)):
            group = self.groups[index]
            waiting[group].append((index, position))
            if len(waiting[group]) == size:
                yield waiting.pop(group)


class TrainMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, also for images on which no object is left; with the
    ``instance_mask_format="bitmask"`` of recipes it takes RLE too."""

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        if any(not annotation.get("iscrowd", 0) for annotation in dataset_dict["annotations"]):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        dataset_dict.pop("annotations")
        nothing = annotations_to_instances([], image_shape)
        nothing.gt_masks = BitMasks(torch.zeros(0, *image_shape, dtype=torch.bool))
        dataset_dict["instances"] = nothing


class SeededDataset(Dataset[Any]):
    """Detectron2's records through a mapper, each under a seed of its own."""

    def __init__(self, records: Sequence[Record], mapper: Mapper, seed: int) -> None:
        # Serialised into one array, which worker processes share instead of copying.
        self.records = DatasetFromList(list(records), copy=False)
        self.mapper, self.seed = mapper, seed

    def __getitem__(self, sample: tuple[int, int]) -> Any:
        index, position = sample
        seed_all_rng(seed_of(self.seed, position))
        record = self.records[index]
        try:
            return self.mapper(record)
        except (OSError, SizeMismatchError) as error:
            wrong = f"image {record['file_name']} cannot be used ({error})"
            remedy = "replace it, or set dataset.skip_broken=true train.check_data=true"
            raise UserError(f"{wrong}: {remedy}") from error


def build_train_loader(
    dataset: Sequence[Record],
    mapper: Mapper,
    total_batch_size: int,
    num_workers: int = 4,
    seed: int = 0,
    accumulate: int = 1,
) -> DataLoader[Any]:
    """The training loader of a recipe. Endless; one batch is a list of mapped records.

    ``dataset`` are those of ``get_detection_dataset_dicts``, ``mapper`` is a ``DatasetMapper`` or
    one like it. An iteration has ``total_batch_size`` images, over all processes and the
    ``accumulate`` batches of each: a UserError if it is no multiple of their number, or if there is
    no image. Each process has ``num_workers`` of its own, which do not change the data. ``seed`` is
    that of order and augmentation.
    """
    world_size = comm.get_world_size()
    batches = world_size * accumulate
    if total_batch_size <= 0 or total_batch_size % batches:
        wrong = f"dataloader.train.total_batch_size={total_batch_size} is no positive multiple"
        product = f"{world_size} processes × train.accumulate={accumulate}"
        raise UserError(f"{wrong} of {batches}: {product}")
    if not dataset:
        raise UserError("the training dataset holds no image: check its annotations")
    groups = [int(record["width"] > record["height"]) for record in dataset]
    size, rank = total_batch_size // batches, comm.get_rank()
    sampler = ResumableBatchSampler(groups, size, seed, rank, world_size, accumulate)
    samples = SeededDataset(dataset, mapper, seed)
    return DataLoader(samples, batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
