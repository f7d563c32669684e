"""The classes of the datasets of a recipe, and a model for just these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig

from backbones.common.errors import UserError, some_of
from revdet.config import nodes_of, own_keys, read_yaml
from revdet.data.annotations import Coco, Entry, categories_in, read_coco
from revdet.data.datasets import OWN, dataset_names, register_datasets
from revdet.data.fields import flag, is_nothing, whole_number


def describe_classes(content: Coco) -> dict[str, Any]:
    """What :func:`fit_recipe` must know of a dataset, which its report has too: the classes, and
    whether any object, crowd regions aside, has a segmentation."""
    objects = (a for a in content["annotations"] if not flag(a.get("iscrowd")))
    masks = any(not is_nothing(a.get("segmentation")) for a in objects)
    return {"classes": categories_in(content), "masks": masks}


def fit_recipe(cfg: DictConfig, described: Mapping[str, Mapping[str, Any]]) -> None:
    """Make a recipe for the classes of its datasets, which are filled into ``dataset.categories``.

    For the user's own training data, the number of classes is set wherever the model has one; for
    registered datasets it must be right. Masks go where the user's own data have none. The recipe
    is changed in place; doing it twice changes nothing more. ``described`` has what
    :func:`describe_classes` says about datasets, as reports have it but those of earlier versions.
    A UserError says that the user's own files differ in their categories, or that a dataset has
    another number of them than the model.
    """
    names = dataset_names(cfg)
    described = {name: described[name] for name in names if "classes" in described.get(name, ())}
    own = [described[name] for name in OWN if name in described]
    if len(own) == 2 and own[0]["classes"] != own[1]["classes"]:
        train, val = ({c["id"]: c["name"] for c in facts["classes"]} for facts in own)
        differ = sorted(k for k in train.keys() | val.keys() if train.get(k) != val.get(k))
        ids = f"ids {differ[:10]}{' …' * (len(differ) > 10)}"
        wrong = f"dataset.train_json and dataset.val_json differ in their categories ({ids})"
        raise UserError(f"{wrong}: give both files the same list of categories")
    for name, facts in described.items():
        number = len(facts["classes"])
        for path, section in class_counts(cfg.model):
            if name in OWN and cfg.dataset.train_json:
                section.num_classes = number
            elif section.num_classes != number:
                key = ".".join(filter(None, ("model", path, "num_classes")))
                model = f"the model has {section.num_classes} classes"
                data = f"dataset {name!r} has {number} categories"
                raise UserError(f"{model}, but {data}: set {key}={number}")
    if not all(facts["masks"] for facts in own):
        heads = cfg.model.get("roi_heads", {})
        for key in ("mask_in_features", "mask_pooler", "mask_head"):
            heads.pop(key, None)
        cfg.dataloader.train.mapper.update(use_instance_mask=False, recompute_boxes=False)
        cfg.dataloader.evaluator.tasks = ["bbox"]
    if described:
        cfg.dataset.categories = next(iter(described.values()))["classes"]


def classes_of_run(weights: str) -> list[Entry]:
    """Id and name of each class of the run that has saved a checkpoint; empty if it is of none."""
    try:
        cfg = read_yaml(str(Path(weights).with_name("config.yaml")))
        return [dict(category) for category in cfg.dataset.categories]
    except Exception:  # no file, or none that a run has saved
        return []


def give_ids_of(known: list[Entry], content: Coco, where: Path) -> None:
    """Give the classes of an annotation file the ids that a model knows them by, by their names.

    ``known`` has id and name of each class of the model, ``content`` is that of the file ``where``,
    and is changed. A UserError says that it has classes that the model does not have.
    """
    if categories_in(content) == known:
        return
    ids = {category["name"]: category["id"] for category in known}
    if others := [c["name"] for c in content["categories"] if c["name"] not in ids]:
        wrong = f"{where} has classes that the run has not learnt ({some_of(others)})"
        raise UserError(f"{wrong}: it knows {some_of([*ids])}; name them alike, or train anew")
    new = {category["id"]: ids[category["name"]] for category in content["categories"]}
    for annotation in content["annotations"]:
        number = whole_number(annotation.get("category_id"))
        if number in new or number in ids.values():
            annotation["category_id"] = new.get(number)
    content["categories"] = known


def categories_of(cfg: DictConfig, weights: str = "") -> list[Entry]:
    """Id and name of each class of a recipe, in the model's order.

    They are those that a run has saved in its config, or those of the dataset: its annotation file
    need not be there if Detectron2 knows its classes, as it knows COCO's. If the checkpoint
    ``weights`` is of a run, the order is that of the run's classes. A recipe that is to learn own
    data is changed as by :func:`fit_recipe`. A UserError says that the classes cannot be found
    out, or that the model has another number of them.
    """
    name = dataset_names(cfg)[0]
    files = {own: cfg.dataset[f"{split}_json"] for own, split in OWN.items()}
    if any(files.values()) and not cfg.dataset.categories:
        known = {own: describe_classes(read_coco(Path(f))) for own, f in files.items() if f}
    else:
        classes = list(cfg.dataset.categories) or _registered_classes(name)
        known = {name: {"classes": classes, "masks": True}}
    fit_recipe(cfg, known)
    if trained := classes_of_run(weights):
        names = {category["name"] for category in trained}
        if others := [c["name"] for c in cfg.dataset.categories if c["name"] not in names]:
            wrong = f"{weights} has not learnt classes of the config ({some_of(others)})"
            raise UserError(f"{wrong}: give the config.yaml beside it")
        cfg.dataset.categories = trained
    return [dict(category) for category in cfg.dataset.categories]


def _registered_classes(name: str) -> list[Entry]:
    register_datasets()
    metadata = MetadataCatalog.get(name)
    if "thing_dataset_id_to_contiguous_id" in metadata.as_dict():
        ids = sorted(metadata.thing_dataset_id_to_contiguous_id)
        names = metadata.thing_classes
        return [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    if name in DatasetCatalog.list() and Path(metadata.get("json_file", "")).is_file():
        return categories_in(read_coco(Path(metadata.json_file)))
    wrong = f"the classes are not known, because dataset {name!r} is not here"
    remedy = "give the config.yaml of the run as --config, or dataset.train_json and the others"
    raise UserError(f"{wrong}: {remedy}")


def class_counts(model: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Each section of a model, its trunk aside, that sets ``num_classes`` itself, with its path."""
    for path, node in nodes_of(model):
        if path.partition(".")[0] != "backbone" and "num_classes" in own_keys(node):
            yield path, node
