"""What a COCO-format annotation file holds: read, looked through, and cleaned."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as rle

from backbones.common.errors import UserError
from backbones.common.files import replacing

# What cannot be trained on: the run stops, or leaves it out and counts it.
BROKEN = {
    "missing_image": "image file does not exist",
    "unreadable_image": "image cannot be read",
    "wrong_image_size": "image has another size than the annotations say",
    "incomplete_image": "image lacks a whole id, a file_name, or a width and height in pixels",
    "repeated_image": "image id is used twice",
    "incomplete_annotation": "annotation lacks a whole id, image_id or category_id",
    "repeated_annotation": "annotation id is used twice",
    "unknown_image": "annotation is of an image that is not listed",
    "unknown_category": "annotation is of a category that is not listed",
    "bad_box": "bbox is not [x, y, width, height]",
    "box_outside_image": "less than half of the box is inside the image",
    "empty_mask": "segmentation is empty, or is no mask of this image",
    "ignored_annotation": "annotation is marked ignore, which Detectron2 does not take",
}
# What Detectron2 deals with by itself: counted only. COCO's own files have all three.
NOTED = {
    "crowd_only_image": "image has crowd regions only and trains as one without objects",
    "clipped_box": "box reaches over the border and is clipped",
    "empty_box": "box has no width or no height and is left out of training",
}
BORDER = 2.0  # px that a box may reach over the border before it is worth a word

# What is found in a dataset: for each kind of BROKEN and NOTED its lines; a defaultdict.
Findings = dict[str, list[str]]


def read_coco(path: Path) -> dict[str, Any]:
    """Read a COCO-format file, whose categories must be right for anything else to mean something.

    Returns:
        The file's content; ``images``, ``annotations`` and ``categories`` are lists of
        dictionaries, and each category has a number ``id`` of its own and a ``name``.

    Raises:
        UserError: no such file, or one that is not COCO JSON.
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} does not exist: check the path")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not COCO JSON ({error}): check the file") from error
    if isinstance(content, dict):
        content.setdefault("annotations", [])  # COCO's test sets have none
    for key in ("images", "annotations", "categories"):
        items = content.get(key) if isinstance(content, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{path} is not COCO JSON (no list {key!r} of objects): check the file")
    if not content["categories"]:
        raise UserError(f"{path} lists no category: add the classes under 'categories'")
    seen: set[int] = set()
    for category in content["categories"]:
        number = category.get("id")
        if not _is_int(number) or number in seen or not isinstance(category.get("name"), str):
            raise UserError(
                f"{path}: category {category} needs a number 'id' of its own and a 'name'"
            )
        seen.add(number)
    return content


def write_coco(path: Path, content: dict[str, Any]) -> None:
    """Write a COCO-format file, all of it or nothing; makes its folder.

    One entry at a time: as one text, COCO's own would take as much memory again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        others = {k: v for k, v in content.items() if k not in ("images", "annotations")}
        file.write(json.dumps(others).removesuffix("}"))
        for key in ("images", "annotations"):
            # Without the list, as COCO's test sets are, there will be no scores.
            if key == "images" or content[key]:
                file.write(f', "{key}": [')
                entries = map(json.dumps, content[key])
                file.write(next(entries, ""))
                file.writelines(f",\n{entry}" for entry in entries)
                file.write("]")
        file.write("}\n")


def categories_in(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Id and name of each category, by id: the order of Detectron2's classes."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return [{"id": category["id"], "name": category["name"]} for category in categories]


def has_masks(content: dict[str, Any]) -> bool:
    """Whether any object, crowd regions aside, has a segmentation."""
    return any(a.get("segmentation") and not a.get("iscrowd") for a in content["annotations"])


def sound_images(images: Sequence[dict[str, Any]], findings: Findings) -> list[dict[str, Any]]:
    """The images that can be identified; the others are added to the findings."""
    kept: dict[int, dict[str, Any]] = {}
    for number, image in enumerate(images):
        name = f"image {image.get('id', f'number {number} of the list')}"
        sizes: list[Any] = [image.get("width"), image.get("height")]
        if (
            not _is_int(image.get("id"))
            or not isinstance(image.get("file_name"), str)
            or not all(_is_int(size) and size > 0 for size in sizes)
        ):
            keys = {key: image.get(key) for key in ("id", "file_name", "width", "height")}
            findings["incomplete_image"].append(f"{name}: {keys}")
        elif image["id"] in kept:
            findings["repeated_image"].append(f"{name} ({image['file_name']})")
        else:
            kept[image["id"]] = image
    return list(kept.values())


def sound_annotations(
    content: dict[str, Any], images: Sequence[dict[str, Any]], findings: Findings, *, masks: bool
) -> list[dict[str, Any]]:
    """The annotations of ``images`` that can be trained on; the others are added to the findings.

    Those of images that are listed in ``content`` but not in ``images`` go without a word.
    ``area`` and ``iscrowd`` are added where they are missing, since COCO's metrics need them.
    With ``masks``, each object must have one.
    """
    kept_images = {image["id"]: image for image in images}
    # Ids may be anything here, a list too: nothing has been checked yet.
    listed = {repr(image.get("id")) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    seen: set[int] = set()
    kept = []
    for number, annotation in enumerate(content["annotations"]):
        name = f"annotation {annotation.get('id', f'number {number} of the list')}"
        image_id, category = annotation.get("image_id"), annotation.get("category_id")
        if not all(_is_int(value) for value in (annotation.get("id"), image_id, category)):
            keys = {key: annotation.get(key) for key in ("id", "image_id", "category_id")}
            findings["incomplete_annotation"].append(f"{name}: {keys}")
        elif repr(image_id) not in listed:
            findings["unknown_image"].append(f"{name}: image {image_id}")
        elif image_id in kept_images:
            image = kept_images[image_id]
            name += f" of {image['file_name']}"
            kind, detail = "", ""
            if annotation["id"] in seen:
                kind = "repeated_annotation"
            elif category not in categories:
                kind, detail = "unknown_category", f": category {category}"
            elif annotation.get("ignore"):
                kind = "ignored_annotation"
            else:
                kind, detail = _check_box(annotation, image)
                if kind not in BROKEN and masks and not _has_mask(annotation, image):
                    kind, detail = "empty_mask", ""
            if kind:
                findings[kind].append(name + detail)
            if kind not in BROKEN:
                seen.add(annotation["id"])
                kept.append(_completed(annotation, image))
    crowds = {annotation["image_id"] for annotation in kept if annotation["iscrowd"]}
    crowds -= {annotation["image_id"] for annotation in kept if not annotation["iscrowd"]}
    for image in images:
        if image["id"] in crowds:
            findings["crowd_only_image"].append(f"image {image['id']} ({image['file_name']})")
    return kept


def _check_box(annotation: dict[str, Any], image: dict[str, Any]) -> tuple[str, str]:
    """The kind of what is wrong with the box, and a word on it; two empty strings if nothing is."""
    box = annotation.get("bbox")
    detail = f": bbox {box} in an image of {image['width']} x {image['height']} px"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "bad_box", detail
    x, y, width, height = box
    if min(width, height) < 0:
        return "bad_box", detail
    if min(width, height) == 0:
        return "empty_box", detail
    inside_x = min(x + width, image["width"]) - max(x, 0)
    inside_y = min(y + height, image["height"]) - max(y, 0)
    if max(inside_x, 0) * max(inside_y, 0) < 0.5 * width * height:
        return "box_outside_image", detail
    if max(width - inside_x, height - inside_y) > BORDER:
        return "clipped_box", detail
    return "", ""


def _has_mask(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether Detectron2 can make a mask of this image's size from the segmentation."""
    mask = annotation.get("segmentation")
    try:
        if isinstance(mask, dict):
            size, counts = list(mask["size"]), mask["counts"]
            if isinstance(counts, list) and (min(counts) < 0 or sum(counts) != math.prod(size)):
                return False
            return size == [image["height"], image["width"]] and _mask_area(mask, *size) > 0
        # A sum is finite if every number is; a loop over all of COCO's corners takes long.
        finite = [math.isfinite(sum(corners)) for corners in mask or ()]
        drawable = [len(corners) >= 6 and len(corners) % 2 == 0 for corners in mask or ()]
        return all(finite) and any(drawable)
    except (KeyError, TypeError, ValueError):
        return False


def _mask_area(mask: Any, height: int, width: int) -> float:
    """Pixels of a COCO segmentation: polygons, or RLE with or without compression."""
    if isinstance(mask, list):
        drawable = [corners for corners in mask if len(corners) >= 6 and len(corners) % 2 == 0]
        mask = rle.merge(rle.frPyObjects(drawable, height, width))
    elif isinstance(mask["counts"], list):
        mask = rle.frPyObjects(mask, height, width)
    return float(rle.area(mask))


def _completed(annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    area = annotation.get("area")
    if _is_number(area) and "iscrowd" in annotation:
        return annotation
    if not _is_number(area):
        area = math.prod(annotation["bbox"][2:])
        if _has_mask(annotation, image):
            area = _mask_area(annotation["segmentation"], image["height"], image["width"])
    return {**annotation, "area": area, "iscrowd": annotation.get("iscrowd", 0)}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
