"""What can be known about the datasets of a run before it starts: a table, and what is broken."""

from __future__ import annotations

import difflib
import json
import logging
import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from backbones.common.errors import UserError, error_line
from backbones.common.images import read_image
from revdet.data.annotations import (
    BROKEN,
    NOTED,
    Findings,
    categories_in,
    note_crowd_only,
    read_coco,
    sound_annotations,
    sound_images,
)
from revdet.data.catalog import datasets_root
from revdet.data.own_data import class_counts, cleaned_file, dataset_names, original_file
from revdet.data.tables import class_rows, class_table, dataset_table, summarize

LISTED = 20  # lines of each kind that are printed; the report has all

logger = logging.getLogger("revdet")


@dataclass
class Examined:
    """A dataset that has been looked through: its content, and the same without what is broken."""

    path: Path
    content: dict[str, Any]
    cleaned: dict[str, Any]
    findings: Findings


def check_datasets(cfg: DictConfig, *, evaluation_only: bool = False) -> None:
    """Look through the datasets of a recipe: print what they hold, stop at what is broken.

    Everything that is found is written to ``OUTPUT_DIR/dataset/report.json``. With
    ``dataset.skip_broken`` the run goes on without what is broken: annotation files without it
    are written beside the report, where :func:`revdet.data.own_data.use_prepared_data` finds them.
    Fills in ``cfg.dataset.categories``.

    Args:
        cfg: the recipe, on which :func:`revdet.data.own_data.use_own_data` has been called.
        evaluation_only: leave the training set alone.

    Raises:
        UserError: a dataset is not registered, its annotation file is missing or not COCO JSON,
            it has another number of classes than the model, something in it is broken and is not
            to be skipped, or nothing is left.
    """
    masks = bool(OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask"))
    known: dict[tuple[Path, Path], Examined] = {}
    datasets: dict[str, Examined] = {}
    for name in dataset_names(cfg, evaluation_only=evaluation_only):
        metadata = _metadata(name)
        if not hasattr(metadata, "json_file"):
            continue
        files = _annotation_file(name), Path(metadata.image_root)
        if metadata.evaluator_type != "coco":
            continue  # LVIS, for example, which has a format of its own
        if files not in known:  # training and validation may be the same
            content = read_coco(files[0])
            _check_num_classes(cfg, name, content)
            progress = f"checking {name}" if cfg.train.check_data else None
            known[files] = _examine(content, *files, masks=masks, progress=progress)
        datasets[name] = known[files]
    if not datasets:
        return
    first = next(iter(datasets.values()))
    cfg.dataset.categories = categories_in(first.content)
    report = {
        name: summarize(data.path, data.content, data.cleaned, data.findings)
        for name, data in datasets.items()
    }
    classes = {name: class_rows(data.cleaned) for name, data in datasets.items()}
    logger.info("datasets:\n%s\n%s", dataset_table(report), class_table(classes))
    logger.info(
        f"the model learns {len(cfg.dataset.categories)} classes"
        f"{'' if masks else ', boxes only: no masks in the recipe or in the annotations'}"
    )
    file = _write_report(cfg, report)
    for data in known.values():
        names = [name for name, other in datasets.items() if other is data]
        _list_findings(" and ".join(names), data.findings.lines)
    _stop_or_go_on(cfg, report, file)
    for name, data in datasets.items():
        _write_cleaned(cleaned_file(cfg, name), data)


def dataset_facts(cfg: DictConfig) -> dict[str, Any]:
    """What the run's report says about each dataset, without the lines, for ``results.json``."""
    file = _report_file(cfg)
    report = json.loads(file.read_text()) if file.is_file() else {}
    return {
        name: {key: value for key, value in summary.items() if key != "lines"}
        for name, summary in report.items()
        if name in dataset_names(cfg)
    }


def _metadata(name: str) -> Any:
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"dataset {name!r} is not registered{hint}")
    return MetadataCatalog.get(name)


def _annotation_file(name: str) -> Path:
    path = Path(original_file(name))
    if not path.is_file():
        raise UserError(
            f"dataset {name!r} needs {path}, which does not exist: set the environment "
            f"variable DETECTRON2_DATASETS to the folder that holds your datasets "
            f"(now: {datasets_root().absolute()}); `make demo` builds those named demo_…"
        )
    return path


def _check_num_classes(cfg: DictConfig, name: str, content: dict[str, Any]) -> None:
    number = len(content["categories"])
    for path, section in class_counts(cfg.model):
        if section.num_classes != number:
            raise UserError(
                f"the model has {section.num_classes} classes, but dataset {name!r} has {number} "
                f"categories: set {'.'.join(filter(None, ('model', path, 'num_classes')))}={number}"
            )


def _examine(
    content: dict[str, Any], path: Path, folder: Path, *, masks: bool, progress: str | None
) -> Examined:
    findings = Findings()
    images = sound_images(content["images"], findings)
    images = _files_that_can_be_used(images, folder, findings, progress=progress)
    if findings.counts(BROKEN).get("missing_image") == len(content["images"]):
        raise UserError(
            f"no image of {path} is in {folder}: check the folder that its file names start from"
        )
    annotations = sound_annotations(content, images, findings, masks=masks)
    note_crowd_only(images, annotations, findings)
    cleaned = {**content, "images": images, "annotations": annotations}
    return Examined(path, content, cleaned, findings)


def _files_that_can_be_used(
    images: Sequence[dict[str, Any]], folder: Path, findings: Findings, *, progress: str | None
) -> list[dict[str, Any]]:
    """The images whose files are there and, if a progress bar is named, decode as training will."""

    def problem(image: dict[str, Any]) -> tuple[str, str]:
        path = folder / image["file_name"]
        if not path.is_file():
            return "missing_image", ""
        if progress is None:
            return "", ""
        try:
            width, height = read_image(path, upright=True).size
        except Exception as error:  # a damaged file fails in any way
            return "unreadable_image", f" ({error_line(error)})"
        if (width, height) != (image["width"], image["height"]):
            listed = f"{image['width']} x {image['height']}"
            return "wrong_image_size", f" ({width} x {height} px, listed as {listed})"
        return "", ""

    kept = []
    with ThreadPoolExecutor() as pool:
        problems = tqdm(
            pool.map(problem, images), total=len(images), desc=progress, disable=progress is None
        )
        for image, (kind, detail) in zip(images, problems, strict=True):
            if kind:
                findings.add(kind, f"image {image['id']} ({folder / image['file_name']}){detail}")
            else:
                kept.append(image)
    return kept


def _write_cleaned(file: Path, data: Examined) -> None:
    """Write what is left if anything was changed, else see that no older file is there."""
    same = all(
        len(data.content[key]) == len(data.cleaned[key])
        and all(map(operator.is_, data.content[key], data.cleaned[key]))
        for key in ("images", "annotations")
    )
    if same:
        file.unlink(missing_ok=True)
    else:
        _write_json(file, data.cleaned)


def _report_file(cfg: DictConfig) -> Path:
    return Path(cfg.train.output_dir) / "dataset" / "report.json"


def _write_report(cfg: DictConfig, report: dict[str, Any]) -> Path:
    file = _report_file(cfg)
    earlier = json.loads(file.read_text()) if file.is_file() else {}
    _write_json(file, {**earlier, **report}, indent=2)
    return file


def _write_json(file: Path, content: Any, indent: int | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=indent) + "\n")
    os.replace(partial, file)


def _list_findings(name: str, lines: dict[str, list[str]]) -> None:
    for kind, what in {**BROKEN, **NOTED}.items():
        if found := lines.get(kind):
            more = f"\n    and {len(found) - LISTED} more" if len(found) > LISTED else ""
            listing = "\n    ".join(found[:LISTED])
            logger.warning(f"{name}: {len(found)} {kind} ({what}):\n    {listing}{more}")


def _stop_or_go_on(cfg: DictConfig, report: dict[str, Any], file: Path) -> None:
    for name, summary in report.items():
        if broken := summary["broken"]:
            counts = ", ".join(f"{number} {kind}" for kind, number in broken.items())
            if not cfg.dataset.skip_broken:
                raise UserError(
                    f"dataset {name!r} is broken in {sum(broken.values())} places ({counts}), "
                    f"listed above and in {file}: correct them, or set dataset.skip_broken=true to "
                    "train without them"
                )
            logger.warning(
                f"{name}: left out {summary['left_out_images']} images and "
                f"{summary['left_out_annotations']} annotations ({counts}); {file} lists them"
            )
        if not summary["objects"]:
            if name == dataset_names(cfg)[0]:
                raise UserError(f"dataset {name!r} has no object to learn: check its annotations")
            logger.warning(f"{name} has no object: there will be no score")
