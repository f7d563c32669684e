"""What can be known to be wrong with a COCO-format dataset before training starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tqdm import tqdm

from revdet.datasets import datasets_root
from revdet.errors import UserError


def check_dataset(name: str, *, num_classes: int | None = None, decode: bool = True) -> None:
    """Check that a registered dataset is complete and readable.

    Args:
        name: a name registered with Detectron2's ``DatasetCatalog``. Datasets that are not in
            COCO format are checked for being registered only.
        num_classes: how many categories the model tells apart; None if that is not known.
        decode: also decode every image (in threads, with a progress bar). Finds truncated files.

    Raises:
        UserError: unknown name; no annotation file (with a word on ``DETECTRON2_DATASETS``), or
            one that is not COCO JSON; another number of categories than classes; an annotation
            of an unknown category or image; an image file that is missing or does not decode.
    """
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"dataset {name!r} is not registered{hint}")
    metadata = MetadataCatalog.get(name)
    if not hasattr(metadata, "json_file"):
        return
    annotations, folder = Path(metadata.json_file), Path(metadata.image_root)
    if not annotations.is_file():
        raise UserError(
            f"dataset {name!r} needs {annotations}, which does not exist: set the environment "
            f"variable DETECTRON2_DATASETS to the folder that holds your datasets "
            f"(now: {datasets_root().absolute()}); `make demo` builds those named demo_…"
        )
    images, num_categories = _check_annotations(annotations)
    if num_classes is not None and num_classes != num_categories:
        raise UserError(
            f"the model has {num_classes} classes, but dataset {name!r} has {num_categories} "
            f"categories: set model.roi_heads.num_classes={num_categories}"
        )
    files = [folder / image["file_name"] for image in images]
    _report(
        [str(file) for file in files if not file.is_file()],
        f"image files listed in {annotations} are missing",
        "restore them, or take them out of the annotations",
    )
    if decode:
        broken = [problem for problem in _decode_all(files, name) if problem]
        _report(
            broken,
            f"image files of dataset {name!r} do not decode",
            "replace them, or take them out of the annotations",
        )


def _check_annotations(path: Path) -> tuple[list[dict[str, Any]], int]:
    try:
        content = json.loads(path.read_bytes())
        images, annotations = content["images"], content.get("annotations", [])
        categories = {category["id"] for category in content["categories"]}
        image_ids = {image["id"] for image in images if image["file_name"]}
        strays = [
            [
                f"annotation {a.get('id', 'without id')}: {a[key]}"
                for a in annotations
                if a[key] not in known
            ]
            for key, known in (("category_id", categories), ("image_id", image_ids))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not COCO JSON ({reason}): check the file") from error
    _report(
        strays[0],
        f"annotations in {path} have a category id outside its list {sorted(categories)[:20]}",
        "add the category, or correct the annotation",
    )
    _report(
        strays[1],
        f"annotations in {path} belong to an image that it does not list",
        "add the image, or remove the annotation",
    )
    return images, len(categories)


def _decode_all(files: Sequence[Path], name: str) -> Iterable[str | None]:
    def problem(path: Path) -> str | None:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # PIL raises whatever a format's plugin raises
            return f"{path} ({error})"
        return None

    with ThreadPoolExecutor() as pool:
        progress = tqdm(pool.map(problem, files), total=len(files), desc=f"checking {name}")
        yield from progress


def _report(found: Sequence[str], what: str, remedy: str) -> None:
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(f"{len(found)} {what}: {', '.join(found[:3])}{more}; {remedy}")
