"""Fields of a COCO-format file, whatever a labelling tool has written there: numbers and masks."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import numpy as np
from detectron2.structures.masks import polygon_area
from pycocotools import mask as rle

FAR = 10.0  # times the image's longer side: corners farther out are no mistake of a pixel or two
SHOWN = 200  # characters of a value that a message has


def decoded(mask: Any, image: dict[str, Any]) -> tuple[Any, float, str]:
    """A segmentation as it shall be, its area in pixels, and the kind of what is wrong with it."""
    height, width = image["height"], image["width"]
    if is_nothing(mask):
        return None, 0.0, "no_mask"
    if isinstance(mask, dict):
        return _decoded_rle(mask, height, width)
    if not isinstance(mask, list) or not any(isinstance(part, list) for part in mask):
        mask = [mask]  # one polygon without the outer list, or none, which has no numbers
    polygons = [numbers(part) for part in mask]
    # Labelling tools leave points and lines beside the polygons; alone they are no mask.
    drawable = [corners for corners in polygons if len(corners) >= 6 and len(corners) % 2 == 0]
    if not drawable or any(part and not given for part, given in zip(mask, polygons, strict=True)):
        return None, 0.0, "bad_polygon"
    most = FAR * max(height, width)
    if any(min(corners) < -most or max(corners) > most for corners in drawable):
        return None, 0.0, "polygon_far_outside"
    sides = [(corners[::2], corners[1::2]) for corners in drawable]
    if not any(min(x) < width and max(x) > 0 and min(y) < height and max(y) > 0 for x, y in sides):
        return None, 0.0, "mask_outside_image"
    return drawable, float(sum(polygon_area(x, y) for x, y in sides)), ""


def _decoded_rle(mask: dict[str, Any], height: int, width: int) -> tuple[Any, float, str]:
    if numbers(mask.get("size")) != [height, width]:
        return None, 0.0, "mask_of_other_size"
    counts = mask.get("counts")
    runs = _uncompressed(counts) if isinstance(counts, str) else numbers(counts)
    whole = [*map(int, runs)]
    if whole != runs or min(whole, default=-1) < 0:
        return None, 0.0, "bad_rle"
    if sum(whole) != height * width:
        return None, 0.0, "wrong_rle_length"
    if not (area := float(sum(whole[1::2]))):
        return None, 0.0, "empty_mask"
    packed = rle.frPyObjects({"size": [height, width], "counts": whole}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode()}, area, ""


def _uncompressed(counts: str) -> list[float]:
    """The runs of COCO's compressed RLE, or none: five bits a character, lowest first, the sixth
    says that more follow, and from the fourth run on it is the difference to the last but one.

    pycocotools decodes any text, and reads behind its end.
    """
    if not re.fullmatch("(?:[P-o]{0,6}[0-O])+", counts):  # 35 bits: no image has more pixels
        return []
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes & 32 == 0)
    first = np.r_[0, last[:-1] + 1]
    lengths = last - first + 1
    shift = 5 * (np.arange(codes.size) - np.repeat(first, lengths))
    values = np.add.reduceat((codes & 31) << shift, first)
    values -= np.where(codes[last] & 16, 1 << 5 * lengths, 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()


def is_nothing(mask: Any) -> bool:
    """Whether a segmentation says that there is none: null, [], [[]] and the like."""
    return not mask or (isinstance(mask, list) and not any(p or p == 0 for p in mask))


def flag(value: Any) -> int | None:
    """0 or 1 for what means it; a key that is missing or null means 0."""
    if value is None or value == "":
        return 0
    whole = whole_number(int(value) if isinstance(value, bool) else value)
    return whole if whole in (0, 1) else None


def whole_number(value: Any) -> int | None:
    """The integer that a value is or, as a float or a text, stands for; None if it is none.

    Nothing beyond 2^53, which is no integer any more where JSON's numbers are floats.
    """
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        value = int(value) if digits.isascii() and digits.isdigit() and len(digits) < 17 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if -(2**53) <= value <= 2**53 and value == int(value) else None


def numbers(values: Any) -> list[float]:
    """A list of finite numbers of a size that arithmetic bears; empty if it is none."""
    if not isinstance(values, list):
        return []
    with suppress(ValueError):  # a text that is no number stays one, which is not sound
        values = [float(value) if isinstance(value, str) else value for value in values]
    sound = all(type(value) in (int, float) and -1e15 < value < 1e15 for value in values)
    return values if sound else []


def shown(value: Any) -> str:
    """A value of a file as a message can have it: short, and in characters that can be printed."""
    try:
        text = value if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"a {type(value).__name__}"
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return text if text.isprintable() else ascii(text)
