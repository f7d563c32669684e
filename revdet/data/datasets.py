"""Which datasets a recipe names: in Detectron2's catalog, or as files of the user's own."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from omegaconf import DictConfig

from backbones.common.errors import UserError, did_you_mean
from backbones.common.files import write_json
from backbones.common.paths import local_path
from revdet.data.annotations import read_coco
from revdet.data.fields import whole_number

# What the user's own data are called, in loaders and in results: dataset.train_json and val_json.
OWN = {"own_train": "train", "own_val": "val"}

# What the report says about a dataset that is not for results.json.
NOT_FACTS = ("classes", "masks", "lines")


class Source(NamedTuple):
    """A COCO-format dataset as the user has it: its annotation file, and where its images are."""

    annotations: Path
    images: Path


def datasets_root() -> Path:
    """Where datasets are looked for: ``$DETECTRON2_DATASETS``, or ``./datasets``."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def register_datasets() -> None:
    """Register ``demo_train`` and ``demo_val``. Detectron2 registers COCO and others itself."""
    root = datasets_root() / "demo"
    for split in ("train", "val"):
        name, file = f"demo_{split}", str(root / "annotations" / f"instances_{split}.json")
        if name in DatasetCatalog.list() and MetadataCatalog.get(name).json_file != file:
            DatasetCatalog.remove(name)  # of another DETECTRON2_DATASETS
            MetadataCatalog.remove(name)
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, file, str(root / split))


def name_own_data(cfg: DictConfig) -> None:
    """Let the loaders name the files of the ``dataset`` section; a UserError if one is missing."""
    given = cfg.dataset
    for name, loader in (("own_train", cfg.dataloader.train), ("own_val", cfg.dataloader.test)):
        keys = f"{OWN[name]}_json", f"{OWN[name]}_images"
        for one, other in (keys, keys[::-1]):
            if given[one] and not given[other]:
                raise UserError(f"dataset.{one} is set, but not dataset.{other}: set both")
        if given[keys[0]]:
            loader.dataset.names = name
    if given.val_fraction and (given.val_json or not given.train_json):
        wrong = f"dataset.val_fraction={given.val_fraction} splits dataset.train_json"
        raise UserError(f"{wrong}: set that, and not dataset.val_json")
    if given.val_fraction:
        cfg.dataloader.test.dataset.names = "own_val"
    elif given.train_json and not given.val_json:
        wrong = "dataset.train_json is set, but not dataset.val_json"
        remedy = "set dataset.val_json and dataset.val_images too"
        raise UserError(f"{wrong}: {remedy}, to the training data if there is no other")


def dataset_names(cfg: DictConfig, *, evaluation_only: bool = False) -> list[str]:
    """The datasets of both loaders, or of the test loader alone, each once."""
    given = [] if evaluation_only else [cfg.dataloader.train.dataset.names]
    given.append(cfg.dataloader.test.dataset.names)
    listed = [[names] if isinstance(names, str) else names for names in given]
    return list(dict.fromkeys(name for names in listed for name in names))


def sources(cfg: DictConfig, *, evaluation_only: bool = False) -> dict[str, Source]:
    """The datasets of a recipe in COCO format, by name; one that is not registered: a UserError."""
    register_datasets()
    found = {}
    for name in dataset_names(cfg, evaluation_only=evaluation_only):
        if name in OWN and cfg.dataset.val_fraction:
            folder = local_path(cfg.dataset.train_images, "dataset.train_images")
            files: tuple[str, ...] = (str(split_of(cfg, name)), folder)
        elif split := OWN.get(name):
            keys = f"{split}_json", f"{split}_images"
            files = tuple(local_path(cfg.dataset[key], f"dataset.{key}") for key in keys)
        elif name in DatasetCatalog.list():
            metadata = MetadataCatalog.get(name)
            if metadata.get("evaluator_type") != "coco" or "json_file" not in metadata.as_dict():
                continue  # such as LVIS, which stays as it is
            files = metadata.json_file, metadata.image_root
        else:
            hint = did_you_mean(name, DatasetCatalog.list())
            raise UserError(f"dataset {name!r} is not registered{hint}")
        found[name] = Source(*map(Path, files))
    return found


def split_of(cfg: DictConfig, name: str) -> Path:
    """The images of ``dataset.train_json`` that are ``own_train`` or ``own_val``, written once."""
    given, folder = cfg.dataset, Path(cfg.train.output_dir) / "dataset"
    file = folder / f"split_{OWN[name]}.json"
    if not file.is_file():
        content = read_coco(Path(local_path(given.train_json, "dataset.train_json")))
        order = sorted(range(len(content["images"])))
        random.Random(cfg.train.seed).shuffle(order)
        count = max(1, round(given.val_fraction * len(order)))
        if count >= len(order):
            raise UserError(f"dataset.val_fraction={given.val_fraction}: no image is left to train")
        parts = {"own_val": sorted(order[:count]), "own_train": sorted(order[count:])}
        for part, numbers in parts.items():
            images = [content["images"][number] for number in numbers]
            ids = {whole_number(image.get("id")) for image in images}
            kept = [a for a in content["annotations"] if whole_number(a.get("image_id")) in ids]
            new = {**content, "images": images, "annotations": kept}
            write_json(folder / f"split_{OWN[part]}.json", new, indent=None)
    return file


def file_of(cfg: DictConfig, name: str) -> Path:
    """Where a run has a dataset as it reads it, and ``"report"``, what all of them hold."""
    return Path(cfg.train.output_dir) / "dataset" / f"{name}.json"


def read_report(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """What the report of a run says about each dataset of its recipe; empty if there is none."""
    file = file_of(cfg, "report")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def dataset_facts(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The report of a run for ``results.json``: in numbers."""
    report = read_report(cfg)
    return {name: {k: v for k, v in report[name].items() if k not in NOT_FACTS} for name in report}
