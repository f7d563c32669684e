"""The videos of a run and their loaders."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from backbones.common.errors import UserError
from backbones.common.paths import local_path
from revvideo.data.clips import ClipDataset, collate, opened_as, test_dataset, train_clips
from revvideo.data.layouts import Layout
from revvideo.data.loader import ResumableLoader, ResumableSampler, batches_to_test
from revvideo.data.manifest import VideoRecord, default_manifest, describe, load_manifest
from revvideo.data.scan import scan
from revvideo.data.transforms import TrainTransform
from revvideo.settings import Config, TestConfig

logger = logging.getLogger("revvideo")

NAMED = 20  # unreadable videos that are logged; the manifest has all


class VideoData(pl.LightningDataModule):
    """Training and validation videos as their manifests list them.

    The run keeps manifests of its own, beside its results. Those of ``python -m revvideo.scan``
    save it opening every video again. To ``resume`` takes the manifests of the run as they are, so
    that the order of the videos is the same as before.
    """

    def __init__(
        self,
        config: Config,
        *,
        train: bool = True,  # whether training videos are needed
        classes: Sequence[str] = (),  # that labels stand for; none: those of the training videos
        resume: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.train, self.resume = config, train, resume
        self.classes = list(classes)
        # The manifests lie in a folder that all machines share.
        self.prepare_data_per_node = False
        self._prepared = False

    def prepare_data(self) -> None:
        """Open the videos and write the manifests; on the first process only."""
        data = self.config.data
        root = self._root()
        if not data.root or not root.is_dir():
            problem = "there is no such folder" if data.root else "it is not set"
            raise UserError(f"data.root={data.root}: {problem}; give the one that holds the videos")
        classes = self.classes or None
        for split in [] if self._prepared else self._splits():
            path = self._manifest_path(split)
            if self.resume and path.is_file():
                continue
            scanned = default_manifest(local_path(data.manifests, "data.manifests") or root, split)
            if scanned.is_file() and not path.is_file():
                shutil.copyfile(scanned, path)
            listed = local_path(data.annotations.replace("{split}", split), "data.annotations")
            layout = cast(Layout, data.layout)
            manifest = scan(
                root, split, listed or None, layout=layout, classes=classes, manifest_path=path
            )
            classes = manifest.classes
            logger.info("%s (%s): %s", split, path, describe(manifest, most=NAMED))
        self._prepared = True

    def setup(self, stage: str) -> None:
        """Read the manifests, and check that batches come out even."""
        self._manifests = [load_manifest(self._manifest_path(split)) for split in self._splits()]
        root = self._root().absolute()
        if self.resume and (moved := {m.root for m in self._manifests} - {root}):
            logger.info("videos from %s, which were in %s", root, ", ".join(map(str, moved)))
            self._manifests = [replace(manifest, root=root) for manifest in self._manifests]
        self._train, self._val = self._manifests[0], self._manifests[-1]  # one, where not trained
        self.classes = self.classes or self._train.classes
        # How many videos the validation set should have, readable or not.
        self.val_total = sum(record.label >= 0 for record in self._val.records)
        if not self.val_records:
            split = self.config.data.val_split
            none = f"none of the {len(self._val.records)} videos of {split!r}"
            see = self._manifest_path(split)
            raise UserError(f"{none} can be read and has a label: see {see}")
        if self.train:
            size, seed = len(self._train.usable), self.config.train.seed
            videos = self.loader_batch_size * self.config.optim.accumulate
            self._sampler = ResumableSampler(size, videos, seed=seed, **self._process())
            self.steps_per_epoch = self._sampler.steps_per_epoch

    @property
    def val_records(self) -> list[VideoRecord]:
        """The validation videos that can be tested; an index of a batch is a place in this list."""
        return self._val.usable

    def unreadable(self) -> dict[str, str]:
        """The videos that the scan could not open, and why."""
        return {r.path: r.problem for manifest in self._manifests for r in manifest.unreadable}

    @property
    def loader_batch_size(self) -> int:
        """Videos in a training batch of one process, which is a part of a step if accumulating."""
        optim = self.config.optim
        processes = self._process()["world_size"]
        parts, given = processes * optim.accumulate, f"optim.batch_size={optim.batch_size}"
        shared = f"{processes} processes x optim.accumulate={optim.accumulate}"
        if optim.batch_size % parts:
            multiple = -(-optim.batch_size // parts) * parts
            raise UserError(f"{given} is no multiple of {shared}: use {multiple}")
        videos, augment = optim.batch_size // parts, self.config.augment
        if videos == 1 and (augment.mixup or augment.cutmix):
            alone = "is one video at a time, which has none to be mixed with"
            remedy = "lower optim.accumulate, or set augment.mixup=0 augment.cutmix=0"
            raise UserError(f"{given} over {shared} {alone}: {remedy}")
        return videos

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled clips; resumable in the middle of an epoch."""
        data, augment = self.config.data, self.config.augment
        dataset = ClipDataset(
            self._train.usable,
            self._train.root,
            train_clips(data, augment),
            TrainTransform(augment, data),
            short_side=data.decode_short_side or None,
            seed=self.config.train.seed,
            opened=opened_as(data),
        )
        return ResumableLoader(
            dataset,
            self.loader_batch_size,
            sampler=self._sampler,
            batches_per_step=self.config.optim.accumulate,
            steps=self.trainer.global_step if self.trainer else 0,
            **self._workers(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """One view of each video: the clip in the middle, cropped at the centre."""
        return self._test_loader(replace(self.config.test, views="even", clips=1, crops=1))

    def test_dataloader(self) -> DataLoader[Any]:
        """All views of each video."""
        return self._test_loader(self.config.test)

    def _test_loader(self, test: TestConfig) -> DataLoader[Any]:
        dataset = test_dataset(self._val.usable, self._val.root, self.config.data, test)
        batches = batches_to_test(len(dataset), test.batch_size, **self._process())
        return DataLoader(dataset, batch_sampler=batches, **self._workers())

    def _workers(self) -> dict[str, Any]:
        workers = self.config.data.workers
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        shared = {"num_workers": workers, "persistent_workers": workers > 0}
        return {**shared, "collate_fn": collate, "pin_memory": on_gpu}

    def _root(self) -> Path:
        return Path(local_path(self.config.data.root, "data.root"))

    def _splits(self) -> list[str]:
        """The training split first: its classes are those of the others."""
        data = self.config.data
        splits = [data.train_split, data.val_split] if self.train else [data.val_split]
        return list(dict.fromkeys(splits))

    def _manifest_path(self, split: str) -> Path:
        return default_manifest(self.config.train.output_dir, split)

    def _process(self) -> dict[str, int]:
        """The place of this one among all."""
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
