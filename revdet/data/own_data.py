"""Any COCO-format dataset under any recipe: ``dataset.train_json=… dataset.train_images=…``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from omegaconf import DictConfig, ListConfig, OmegaConf

from backbones.common.errors import UserError
from revdet.data.annotations import categories_in, has_masks, read_coco

NAMES = {"train": "own_train", "val": "own_val"}


def use_own_data(cfg: DictConfig) -> None:
    """Point a recipe at the files of its ``dataset`` section; does nothing if that names none.

    Sets the datasets of both loaders and the number of classes wherever the model has one, and
    takes the masks out of the recipe where the files have none. Registers ``own_train`` and
    ``own_val`` in this process.

    Args:
        cfg: the recipe, changed in place. Doing it twice changes nothing more.

    Raises:
        UserError: half of the files are given, one does not exist or is not COCO JSON, or the two
            differ in their categories.
    """
    contents = {}
    for split in NAMES:
        file, folder = cfg.dataset[f"{split}_json"], cfg.dataset[f"{split}_images"]
        if bool(file) != bool(folder):
            given, other = ("json", "images") if file else ("images", "json")
            raise UserError(
                f"dataset.{split}_{given} is set, but not dataset.{split}_{other}: set both"
            )
        if file:
            contents[split] = read_coco(Path(file))
            if not Path(folder).is_dir():
                raise UserError(f"dataset.{split}_images={folder} is no folder: check the path")
    if not contents:
        return
    if "val" not in contents:
        raise UserError(
            "dataset.train_json is set, but not dataset.val_json: set dataset.val_json and "
            "dataset.val_images too, to the training data if there is no other"
        )
    categories = {split: categories_in(content) for split, content in contents.items()}
    if categories.get("train", categories["val"]) != categories["val"]:
        train, val = ({c["id"]: c["name"] for c in categories[split]} for split in NAMES)
        differ = sorted(k for k in train.keys() | val.keys() if train.get(k) != val.get(k))
        raise UserError(
            f"dataset.train_json and dataset.val_json differ in their categories (ids {differ[:10]}"
            f"{' …' * (len(differ) > 10)}): give both files the same list of categories"
        )
    loaders = {"train": cfg.dataloader.train, "val": cfg.dataloader.test}
    for split in contents:
        loaders[split].dataset.names = NAMES[split]
    if "train" in contents:
        _set_num_classes(cfg.model, len(categories["val"]))
    if not all(map(has_masks, contents.values())):
        _boxes_only(cfg)
    _register_own(cfg)


def use_prepared_data(cfg: DictConfig) -> None:
    """Make the recipe's datasets known to Detectron2 in this process.

    Registers ``own_train`` and ``own_val``. Each dataset is read from the cleaned annotation file
    where :func:`revdet.data.checks.check_datasets` has written one for this run.
    """
    _register_own(cfg)
    for name in dataset_names(cfg):
        metadata = MetadataCatalog.get(name)
        if hasattr(metadata, "json_file"):
            cleaned, original = cleaned_file(cfg, name), original_file(name)
            file = str(cleaned) if cleaned.is_file() else original
            if file != metadata.json_file:
                _register(name, file, metadata.image_root, original_json=original)


def original_file(name: str) -> str:
    """The annotation file with which a dataset was registered first."""
    metadata = MetadataCatalog.get(name)
    return str(metadata.get("original_json", metadata.json_file))


def dataset_names(cfg: DictConfig, *, evaluation_only: bool = False) -> list[str]:
    """The datasets of both loaders, or of the test loader alone, each once."""
    given = [] if evaluation_only else [cfg.dataloader.train.dataset.names]
    given.append(cfg.dataloader.test.dataset.names)
    return list(dict.fromkeys(n for names in given for n in _listed(names)))


def cleaned_file(cfg: DictConfig, name: str) -> Path:
    """Where the annotations of a dataset are, without what was left out, if anything was."""
    return Path(cfg.train.output_dir) / "dataset" / f"{name}.json"


def categories_of(cfg: DictConfig) -> list[dict[str, Any]]:
    """Id and name of each class of a recipe, in the model's order.

    They are those that a run has saved in its config, or those of the dataset: its annotation file
    need not be there if Detectron2 knows its classes, as it knows COCO's.

    Args:
        cfg: the recipe. One that is to learn own data is changed as by :func:`use_own_data`.

    Raises:
        UserError: the classes cannot be found out, or the model has another number of them.
    """
    categories = [dict(category) for category in cfg.dataset.categories]
    if not categories:
        use_own_data(cfg)
        name = dataset_names(cfg)[0]
        metadata = MetadataCatalog.get(name)
        if "thing_dataset_id_to_contiguous_id" in metadata.as_dict():
            ids = sorted(metadata.thing_dataset_id_to_contiguous_id)
            names = metadata.thing_classes
            categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
        elif name in DatasetCatalog.list() and Path(metadata.get("json_file", "")).is_file():
            categories = categories_in(read_coco(Path(metadata.json_file)))
        else:
            raise UserError(
                f"the classes are not known, because dataset {name!r} is not here: give the "
                "config.yaml of the run as --config, or dataset.train_json and the others"
            )
    for _, section in class_counts(cfg.model):
        if section.num_classes != len(categories):
            raise UserError(
                f"the model has {section.num_classes} classes, but {len(categories)} are named in "
                "the dataset: use the config.yaml of the run that made the weights"
            )
    return categories


def class_counts(model: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Every place in a model's config, its trunk aside, that says how many classes there are.

    Yields:
        The path of the section below ``model`` and the section, which has ``num_classes``. What
        only refers to another place is left out: it follows.
    """

    def search(path: str, node: Any) -> Iterator[tuple[str, DictConfig]]:
        if isinstance(node, ListConfig):
            for index in range(len(node)):
                yield from search(f"{path}.{index}", node[index])
        elif isinstance(node, DictConfig):
            for key in node:
                if OmegaConf.is_interpolation(node, key) or (path == "" and key == "backbone"):
                    continue
                if key == "num_classes":
                    yield path.lstrip("."), node
                else:
                    yield from search(f"{path}.{key}", node[key])

    return search("", model)


def _listed(names: str | ListConfig) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _set_num_classes(model: DictConfig, number: int) -> None:
    for _, section in class_counts(model):
        section.num_classes = number


def _boxes_only(cfg: DictConfig) -> None:
    """Take the masks out of a recipe: head, ground truth and metric."""
    heads = cfg.model.get("roi_heads", {})
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        heads.pop(key, None)
    cfg.dataloader.train.mapper.update(use_instance_mask=False, recompute_boxes=False)
    cfg.dataloader.evaluator.tasks = ["bbox"]


def _register_own(cfg: DictConfig) -> None:
    for split, name in NAMES.items():
        if cfg.dataset[f"{split}_json"]:
            file = cfg.dataset[f"{split}_json"]
            _register(name, file, cfg.dataset[f"{split}_images"], original_json=file)


def _register(name: str, annotations: str, images: str, *, original_json: str) -> None:
    """Register a COCO-format dataset, in place of one of that name, whose metadata it keeps."""
    metadata: dict[str, Any] = {}
    if name in DatasetCatalog.list():
        if name not in NAMES.values():
            metadata = MetadataCatalog.get(name).as_dict()
        for key in ("name", "json_file", "image_root", "evaluator_type", "original_json"):
            metadata.pop(key, None)
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {**metadata, "original_json": original_json}, annotations, images)
