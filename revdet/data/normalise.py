"""Datasets, normalised: read once, looked through by decoding, and written as the run reads them.

What is behind this, from the training loader to the pictures, knows only the files that are
written here, in ``OUTPUT_DIR/dataset``: ``NAME.json`` for each dataset, and ``report.json``.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from backbones.common.errors import UserError, error_line
from backbones.common.files import write_json
from backbones.common.images import header_size, read_image
from revdet.config import nodes_of, own_keys
from revdet.data import annotations as coco
from revdet.data import datasets
from revdet.data.annotations import BROKEN, NOTED, Coco, Entry, Findings
from revdet.data.classes import classes_of_run, describe_classes, fit_recipe, give_ids_of
from revdet.data.datasets import OWN, Source, file_of
from revdet.data.fields import shown
from revdet.data.tables import class_rows, class_table, dataset_table, summarize

LARGE = 2**23  # pixels: of larger images one is decoded at a time, of others as many as threads
LISTED = 20  # lines of each kind that are printed; the report has all

logger = logging.getLogger("revdet")

# Images that have been decoded: length and time of the file, width and height, by its path.
Checked = dict[str, list[int]]
Title = str | None  # of a progress bar; None for none

# What Detectron2 knows of a dataset that comes from the normalised file; colours, say, stay.
_REPLACED = {"name", "json_file", "image_root", "evaluator_type", "thing_classes"}
_REPLACED |= {"thing_dataset_id_to_contiguous_id"}
# Datasets that have been registered by use_normalised in this process, in all its runs.
_registered = itertools.count(1)


def normalise(cfg: DictConfig, *, evaluation_only: bool = False, weights: str = "") -> None:
    """Look through the datasets of a recipe and write them as :func:`use_normalised` takes them.

    Prints what they hold, and writes it with all that is found to ``report.json``. What is broken
    stops the run or, with ``dataset.skip_broken``, is left out. Makes the recipe for the classes
    of the datasets, as :func:`revdet.data.classes.fit_recipe` does. ``evaluation_only`` leaves the
    training set alone. If the checkpoint ``weights``, which is evaluated, resumed or started from,
    is of a run, its classes keep the ids that they have there, by their names.

    A UserError says that a dataset is not registered, that its annotation file is missing or not
    COCO JSON, that it has another number of classes than the model, what in it is broken and is
    not to be skipped, or that nothing is left.
    """
    contents: dict[Source, Coco] = {}
    names = defaultdict(list)  # training and validation may be the same
    for name, source in datasets.sources(cfg, evaluation_only=evaluation_only).items():
        contents[source] = contents.get(source) or _read(name, source)
        names[source].append(name)
    known = _known_classes(cfg, contents, weights, evaluation_only=evaluation_only)
    for source, content in contents.items() if known else ():
        give_ids_of(known, content, source.annotations)
    described = {name: describe_classes(contents[s]) for s in names for name in names[s]}
    earlier = datasets.read_report(cfg)
    fit_recipe(cfg, {**earlier, **described})
    masks = bool(OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask"))
    report, classes = {}, {}
    checked = _read_checked(cfg)
    for source, alike in names.items():
        content = contents.pop(source)  # COCO's fills the memory
        found: Findings = defaultdict(list)
        progress = f"checking {alike[0]}" if cfg.train.check_data else None
        cleaned = _cleaned(content, source, found, checked, masks=masks, progress=progress)
        facts, rows = summarize(source.annotations, content, cleaned, found), class_rows(cleaned)
        for name in alike:
            report[name] = {**facts, **described[name], "lines": found}
            classes[name] = rows
            if cfg.dataset.skip_broken or not facts["broken"]:
                coco.write_coco(file_of(cfg, name), cleaned)
    write_json(file_of(cfg, "checked"), checked, indent=None)
    known_now = {**earlier, **report}
    listed = [name for name in datasets.dataset_names(cfg) if name in known_now]
    write_json(file_of(cfg, "report"), {name: known_now[name] for name in listed})
    if report:
        logger.info("datasets:\n%s\n%s", dataset_table(report), class_table(classes))
        less = "" if masks else ", boxes only: no masks in the recipe or in the annotations"
        logger.info(f"the model learns {len(cfg.dataset.categories)} classes{less}")
    for alike in names.values():
        _list_findings(" and ".join(alike), report[alike[0]]["lines"])
    _stop_or_go_on(cfg, report)


def use_normalised(cfg: DictConfig, *, evaluation_only: bool = False) -> None:
    """Let a recipe read its datasets as :func:`normalise` has written them for this run.

    They are registered in this process under names of their own, which take the place of the user's
    in the recipe: save it before. A process that has not called :func:`normalise` itself learns
    from the report what the recipe is made for.
    """
    fit_recipe(cfg, datasets.read_report(cfg))
    renamed = {}
    for name, source in datasets.sources(cfg, evaluation_only=evaluation_only).items():
        known = MetadataCatalog.get(name).as_dict()
        metadata = {key: value for key, value in known.items() if key not in _REPLACED}
        renamed[name] = f"{name} (normalised, {next(_registered)})"
        file = file_of(cfg, name)
        register_coco_instances(renamed[name], metadata, str(file), str(source.images))
    for _, node in nodes_of(cfg.dataloader):  # the evaluator may name them too
        for key in own_keys(node):
            if isinstance(node[key], str):
                node[key] = renamed.get(node[key], node[key])


def _read_checked(cfg: DictConfig) -> Checked:
    """The images that an earlier session of the run has decoded; none if the file is damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(file_of(cfg, "checked").read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _known_classes(
    cfg: DictConfig, contents: dict[Source, Coco], weights: str, *, evaluation_only: bool
) -> list[Entry]:
    """The classes that all datasets must have, in the model's order; empty if any will do."""
    run = classes_of_run(weights)
    if evaluation_only:
        return run or [dict(category) for category in cfg.dataset.categories]
    if not contents:
        return []
    theirs = coco.categories_in(next(iter(contents.values())))
    others = {c["name"] for c in theirs} != {c["name"] for c in run}
    if others and weights == cfg.train.init_checkpoint:
        run = []  # fine-tuned on other classes
    return run or (theirs if cfg.dataset.train_json else [])


def _read(name: str, source: Source) -> Coco:
    if split := OWN.get(name):
        if not source.images.is_dir():
            raise UserError(f"dataset.{split}_images={source.images} is no folder: check the path")
    elif not source.annotations.is_file():
        wrong = f"dataset {name!r} needs {source.annotations}, which does not exist"
        root = f"the folder that holds your datasets (now: {datasets.datasets_root().absolute()})"
        remedy = f"set the environment variable DETECTRON2_DATASETS to {root}"
        raise UserError(f"{wrong}: {remedy}; `make demo` builds those named demo_…")
    return coco.read_coco(source.annotations)


def _cleaned(
    content: Coco, source: Source, found: Findings, checked: Checked, masks: bool, progress: Title
) -> Coco:
    """The content of an annotation file without what is broken, which is added to ``found``."""
    images = coco.sound_images(content["images"], found)
    images = _files_that_can_be_used(images, source.images, found, checked, progress)
    missing = found.get("missing_image", ())
    if missing and len(missing) == len(content["images"]):
        remedy = "check the folder that its file names start from"
        raise UserError(f"no image of {source.annotations} is in {source.images}: {remedy}")
    annotations = coco.sound_annotations(content, images, found, masks=masks)
    return {**content, "images": images, "annotations": annotations}


def _files_that_can_be_used(
    images: Sequence[Entry], folder: Path, findings: Findings, checked: Checked, progress: Title
) -> list[Entry]:
    """The images whose files are there and, if a progress bar is named, decode as training will.

    Those that ``checked`` knows with the same length and time are not decoded again; the others
    are added to it.
    """
    one_large = Lock()

    def problem(image: Entry) -> tuple[str, str]:
        path, facts = folder / image["file_name"], None
        with suppress(OSError, ValueError):  # such as a name of thousands of characters
            facts = path.stat() if path.is_file() else None
        if facts is None:
            return "missing_image", ""
        if progress is None:
            return "", ""
        state = [facts.st_size, facts.st_mtime_ns]
        try:
            known = checked.get(str(path), [])
            if known[:2] == state:
                width, height = known[2:]
            else:
                large = math.prod(header_size(path)) > LARGE
                with one_large if large else nullcontext():
                    width, height = read_image(path, upright=True).size
                checked[str(path)] = [*state, width, height]
        except Exception as error:  # a damaged file fails in any way
            return "unreadable_image", f" ({error_line(error)})"
        if (width, height) != (image["width"], image["height"]):
            listed = f"{image['width']} x {image['height']}"
            return "wrong_image_size", f" ({width} x {height} px, listed as {listed})"
        return "", ""

    kept = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        problems = tqdm(pool.map(problem, images), progress, len(images), disable=progress is None)
        for image, (kind, detail) in zip(images, problems, strict=True):
            if kind:
                file = shown(str(folder / image["file_name"]))
                findings[kind].append(f"image {image['id']} ({file}){detail}")
            else:
                kept.append(image)
    return kept


def _list_findings(name: str, lines: Findings) -> None:
    for kind, what in {**BROKEN, **NOTED}.items():
        if found := lines.get(kind):
            more = f"\n    and {len(found) - LISTED} more" if len(found) > LISTED else ""
            listing = "\n    ".join(found[:LISTED])
            logger.warning(f"{name}: {len(found)} {kind} ({what}):\n    {listing}{more}")


def _stop_or_go_on(cfg: DictConfig, report: dict[str, Any]) -> None:
    file = file_of(cfg, "report")
    for name, facts in report.items():
        if broken := facts["broken"]:
            counts = ", ".join(f"{number} {kind}" for kind, number in broken.items())
            if not cfg.dataset.skip_broken:
                remedy = "correct them, or set dataset.skip_broken=true to train without them"
                if not facts["objects"]:  # nothing would be left
                    kind = max(broken, key=broken.get)
                    remedy = f"correct the file; most are {kind}: {BROKEN[kind]}"
                places = f"{sum(broken.values())} places ({counts}), listed above and in {file}"
                raise UserError(f"dataset {name!r} is broken in {places}: {remedy}")
            left = f"{facts['left_out_images']} images, {facts['left_out_annotations']} annotations"
            logger.warning(f"{name}: left out {left} ({counts}); {file} lists them")
        if not facts["objects"]:
            if name == datasets.dataset_names(cfg)[0]:
                raise UserError(f"dataset {name!r} has no object to learn: check its annotations")
            logger.warning(f"{name} has no object: there will be no score")
