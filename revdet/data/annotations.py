"""What a COCO-format annotation file holds: read, and every field made what it must be.

What leaves this module has whole ids, numbers that are finite and not huge, and masks that have
been decoded once: behind it, nobody need look again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones.common.errors import UserError
from backbones.common.files import replacing
from revdet.data.fields import decoded, flag, numbers, shown, whole_number

# A picture with a longer side is a line, of which resizing would leave nothing.
LINE = 100

# What cannot be trained on: the run stops, or leaves it out and counts it.
BROKEN = {
    "missing_image": "image file does not exist",
    "unreadable_image": "image cannot be read",
    "wrong_image_size": "image has another size than the annotations say",
    "line_image": f"image is more than {LINE} times as long as wide: cut it into pieces",
    "incomplete_image": "image lacks a whole id, a file_name, or a width and height in pixels",
    "repeated_image": "image id is used twice",
    "incomplete_annotation": "annotation lacks a whole id, image_id or category_id",
    "repeated_annotation": "annotation id is used twice",
    "unknown_image": "annotation is of an image that is not listed",
    "unknown_category": "annotation is of a category that is not listed",
    "bad_iscrowd": "iscrowd is neither 0 nor 1",
    "bad_box": "bbox is not [x, y, width, height]",
    "relative_box": "bbox is in fractions of the image: multiply it by the image's size",
    "box_outside_image": "less than half of the box is inside the image",
    "no_mask": "segmentation is missing, while others have one: draw it, or take out all of them",
    "bad_polygon": "a polygon is not [x1, y1, x2, y2, …] of at least three corners, in numbers",
    "polygon_far_outside": "a polygon has corners far outside the image",
    "mask_outside_image": "all of the segmentation is outside the image",
    "mask_of_other_size": "the RLE of the segmentation is not of the image's size",
    "bad_rle": "the RLE of the segmentation cannot be decoded",
    "wrong_rle_length": "the RLE of the segmentation is too long or too short for the image",
    "empty_mask": "segmentation covers no pixel",
    "ignored_annotation": "annotation is marked ignore, which Detectron2 does not take",
}
# What Detectron2 deals with by itself: counted only. COCO's own files have all three.
NOTED = {
    "crowd_only_image": "image has crowd regions only and trains as one without objects",
    "clipped_box": "box reaches over the border and is clipped",
    "empty_box": "box has no width or no height and is left out of training",
}
NAME_LENGTH = 200  # characters of a class name, at most
BORDER = 2.0  # px that a box may reach over the border before it is worth a word

# What is found in a dataset: for each kind of BROKEN and NOTED its lines; a defaultdict.
Findings = dict[str, list[str]]
Entry = dict[str, Any]  # an image, an annotation or a category
Coco = dict[str, Any]  # a file: "images", "annotations", "categories", each of Entry, and more


def read_coco(path: Path) -> Coco:
    """Read a COCO-format file, whose categories must be right for anything else to mean something.

    UTF-8, UTF-16 and UTF-32 are taken, with a byte order mark or without. The three lists are
    there, and each category has a whole ``id`` and a ``name`` of its own. A UserError says that
    there is no such file, or that it is not COCO JSON.
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} does not exist: check the path")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not COCO JSON ({reason}): check the file") from error
    # COCO's test sets have no annotations.
    content = {"annotations": [], **content} if isinstance(content, dict) else {}
    for key in ("images", "annotations", "categories"):
        items = content.get(key)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{path} is not COCO JSON (no list {key!r} of objects): check the file")
    if any("segments_info" in annotation for annotation in content["annotations"][:1]):
        remedy = "give that of the instances, such as instances_train2017.json"
        raise UserError(f"{path} is a panoptic file (segments_info): {remedy}")
    if not content["categories"]:
        raise UserError(f"{path} lists no category: add the classes under 'categories'")
    content["categories"] = _categories(content["categories"], path)
    return content


def _categories(given: list[Entry], path: Path) -> list[Entry]:
    categories: list[Entry] = []
    for category in given:
        number, name = whole_number(category.get("id")), category.get("name")
        if number is None or not isinstance(name, str) or not name.strip():
            needs = f"category {shown(category)} needs a number 'id' of its own and a 'name'"
            raise UserError(f"{path}: {needs}")
        if len(name) > NAME_LENGTH or not name.isprintable():
            wrong = f"is longer than {NAME_LENGTH} characters, or has some that cannot be printed"
            raise UserError(f"{path}: the name of category {number} {wrong}: {shown(name)}")
        for other in categories:
            if number == other["id"] or name == other["name"]:
                both = f"categories {shown(other)} and {shown(category)}"
                raise UserError(f"{path}: {both} have one id or one name: give each its own")
        categories.append({**category, "id": number, "name": name})
    return categories


def write_coco(path: Path, content: Coco) -> None:
    """Write a COCO-format file, all of it or nothing; makes its folder."""
    # One entry at a time: as one text, COCO's own would take as much memory again.
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"categories": categories_in(content)}).removesuffix("}"))
        for key in ("images", "annotations"):
            # Without the list, as COCO's test sets are, there will be no scores.
            if key == "images" or content[key]:
                file.write(f', "{key}": [')
                entries = map(json.dumps, content[key])
                file.write(next(entries, ""))
                file.writelines(f",\n{entry}" for entry in entries)
                file.write("]")
        file.write("}\n")


def categories_in(content: Coco) -> list[Entry]:
    """Id and name of each category, by id: the order of Detectron2's classes."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return [{"id": category["id"], "name": category["name"]} for category in categories]


def sound_images(images: Sequence[Entry], findings: Findings) -> list[Entry]:
    """The images that can be identified, with the keys that count; others go to the findings."""
    kept: list[Entry] = []
    seen: set[int] = set()
    for number, image in enumerate(images):
        name = f"image {shown(image.get('id', f'number {number} of the list'))}"
        whole, file = whole_number(image.get("id")), image.get("file_name")
        width, height = (whole_number(image.get(side)) or 0 for side in ("width", "height"))
        if whole is None or not isinstance(file, str) or not 0 < min(width, height) < 2**24:
            keys = {key: image.get(key) for key in ("id", "file_name", "width", "height")}
            findings["incomplete_image"].append(f"{name}: {shown(keys)}")
        elif whole in seen:
            findings["repeated_image"].append(f"{name} ({shown(file)})")
        else:
            seen.add(whole)
            if max(width, height) > LINE * min(width, height):
                findings["line_image"].append(f"{name} ({shown(file)}): {width} x {height} px")
            else:
                kept.append({"id": whole, "file_name": file, "width": width, "height": height})
    return kept


def sound_annotations(
    content: Coco, images: Sequence[Entry], findings: Findings, *, masks: bool
) -> list[Entry]:
    """The annotations of ``images`` that can be trained on; the others are added to the findings.

    Each has the keys that count, as COCO's metrics and Detectron2 need them: whole ids from 1 on
    (0 and less mean "not found" to COCO's metrics, and are renumbered), ``iscrowd`` 0 or 1, a
    ``bbox``, an ``area``, and with ``masks`` a ``segmentation`` of polygons or compressed RLE,
    which each object must have. Those of images that are listed in ``content`` but not in
    ``images`` go without a word.
    """
    kept_images = {image["id"]: image for image in images}
    listed = {whole_number(image.get("id")) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    seen, kept = set(), []
    for number, annotation in enumerate(content["annotations"]):
        name = f"annotation {shown(annotation.get('id', f'number {number} of the list'))}"
        given = {key: annotation.get(key) for key in ("id", "image_id", "category_id")}
        ids = {key: whole_number(value) for key, value in given.items()}
        own, image_id, category = ids.values()
        if own is None or image_id is None or category is None:
            findings["incomplete_annotation"].append(f"{name}: {shown(given)}")
        elif image_id not in listed:
            findings["unknown_image"].append(f"{name}: image {image_id}")
        elif image_id in kept_images:
            image = kept_images[image_id]
            name += f" of {shown(image['file_name'])}"
            kind, detail = "", ""
            crowd = flag(annotation.get("iscrowd"))
            box, mask, area = numbers(annotation.get("bbox")), None, 0.0
            if own in seen:
                kind = "repeated_annotation"
            elif category not in categories:
                kind, detail = "unknown_category", f": category {category}"
            elif annotation.get("ignore"):
                kind = "ignored_annotation"
            elif crowd is None:
                kind, detail = "bad_iscrowd", f": iscrowd {shown(annotation['iscrowd'])}"
            else:
                kind = _check_box(box, image)
                if kind:
                    size = f"{image['width']} x {image['height']}"
                    detail = f": bbox {shown(annotation.get('bbox'))} in an image of {size} px"
                if kind not in BROKEN and masks:
                    mask, area, bad = decoded(annotation.get("segmentation"), image)
                    kind, detail = (bad, "") if bad else (kind, detail)
            if kind:
                findings[kind].append(name + detail)
            if kind not in BROKEN:
                seen.add(own)
                stated = [value for value in numbers([annotation.get("area")]) if value >= 0]
                area = stated[0] if stated else area or math.prod(box[2:])
                entry: Entry = {**ids, "bbox": box, "area": area, "iscrowd": crowd}
                kept.append({**entry, "segmentation": mask} if mask else entry)
    free = (n for n in range(1, len(kept) + len(seen) + 1) if n not in seen)
    for entry in kept:
        entry["id"] = entry["id"] if entry["id"] > 0 else next(free)
    crowds = {annotation["image_id"] for annotation in kept if annotation["iscrowd"]}
    crowds -= {annotation["image_id"] for annotation in kept if not annotation["iscrowd"]}
    for image in images:
        if image["id"] in crowds:
            findings["crowd_only_image"].append(f"image {image['id']} ({image['file_name']})")
    return kept


def _check_box(box: list[float], image: Entry) -> str:
    """The kind of what is wrong with the box; empty if nothing is."""
    if len(box) != 4 or min(box[2:]) < 0:
        return "bad_box"
    x, y, width, height = box
    if min(width, height) == 0:
        return "empty_box"
    if max(box) <= 1 < min(image["width"], image["height"]) and min(box) >= 0:
        return "relative_box"
    inside_x = min(x + width, image["width"]) - max(x, 0)
    inside_y = min(y + height, image["height"]) - max(y, 0)
    if max(inside_x, 0) * max(inside_y, 0) < 0.5 * width * height:
        return "box_outside_image"
    return "clipped_box" if max(width - inside_x, height - inside_y) > BORDER else ""
