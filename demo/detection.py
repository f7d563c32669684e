"""Make a small COCO dataset: cats, coins, cups, motorcycles and rockets in other photographs.

    python -m demo.detection --output datasets/demo

Objects cut out of photographs (see `demo.cutouts`) are pasted at random scale, angle and lighting
onto crops of others, so that every visible pixel of every object is known. The result has what a
real dataset has: polygons and RLE masks, crowd regions, images without objects and of different
sizes, objects cut by the border or hidden in part, and category ids with gaps. It has the layout of
COCO: OUTPUT/annotations/instances_train.json, OUTPUT/train/000000.jpg ..., and the same for val.

Training and validation share the objects, but no background: the score says how well known objects
are found in unseen scenes. An image depends on its number only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from PIL import Image, ImageFilter
from pycocotools import mask as rle
from tqdm import tqdm

from backbones.common.files import write_json
from demo.cutouts import random_background, random_object, random_pile
from demo.folder import command, make_once

IMAGE_SIDE = (112, 168)  # px, both ends included
EMPTY_SHARE = 0.08
CROWD_SHARE = 0.06
MIN_VISIBLE_SHARE = 0.4
MIN_VISIBLE_PIXELS = 60
POLYGON_SHARE = 0.75  # of the objects; the others have RLE masks, as those with holes and crowds
# Name: (COCO id, share of the objects, longer side in px, largest tilt in degrees).
# The ids have gaps, as COCO's own have, so that code which forgets to map them fails here.
CATEGORIES: dict[str, tuple[int, float, tuple[int, int], float]] = {
    "cat": (1, 0.19, (36, 96), 25),
    "coin": (3, 0.24, (26, 56), 180),
    "cup": (7, 0.19, (34, 94), 25),
    "motorcycle": (11, 0.19, (48, 100), 20),
    "rocket": (12, 0.19, (46, 100), 40),
}


@dataclass
class Instance:
    """An object, or a crowd: where it can be seen, (H, W) bool, and how many pixels have to be."""

    category: str
    is_crowd: bool
    mask: np.ndarray
    least: float


def compose(rng: np.random.Generator, split: str) -> tuple[Image.Image, list[Instance]]:
    """An RGB image and what is in it.

    Later objects hide earlier ones. One that would hardly be seen, or hide another so far, is
    placed anew, and left out after ten tries: whatever is in the picture is annotated.
    """
    width, height = (int(side) for side in rng.integers(*IMAGE_SIDE, size=2, endpoint=True))
    canvas = random_background(rng, split, width, height)
    light = [rng.uniform(-0.06, 0.06), rng.uniform(0.02, 0.08)]
    instances: list[Instance] = []
    for name in _wanted(rng):
        category, is_crowd = ("coin", True) if name == "pile" else (name, False)
        for _ in range(10):
            _, _, side, tilt = CATEGORIES[category]
            thing = random_pile(rng) if is_crowd else random_object(rng, category, side, tilt)
            layer = _place(rng, thing, width, height)
            mask = np.asarray(layer)[..., 3] > 127
            whole_area = (np.asarray(thing)[..., 3] > 127).sum()
            least = max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * whole_area)
            hidden = any((old.mask & ~mask).sum() < old.least for old in instances)
            if mask.sum() >= least and not hidden:
                for old in instances:
                    old.mask &= ~mask
                instances.append(Instance(category, is_crowd, mask, least))
                _paste(canvas, layer, light, extent=float(np.sqrt(mask.sum())))
                break
    return canvas, instances


def _wanted(rng: np.random.Generator) -> list[str]:
    """The names of the objects in an image, ``"pile"`` for a crowd of coins."""
    kind = rng.random()
    if kind < EMPTY_SHARE:
        return []
    has_crowd = kind < EMPTY_SHARE + CROWD_SHARE
    count = rng.choice(3 if has_crowd else np.arange(1, 6))
    shares = [category[1] for category in CATEGORIES.values()]
    wanted = [str(name) for name in rng.choice(list(CATEGORIES), size=count, p=shares)]
    if has_crowd:
        wanted.insert(int(rng.integers(len(wanted) + 1)), "pile")
    return wanted


def _place(rng: np.random.Generator, thing: Image.Image, width: int, height: int) -> Image.Image:
    """An RGBA image somewhere on an otherwise transparent layer of that size in px."""
    if rng.random() < 0.8 and thing.width < width and thing.height < height:
        x, y = rng.integers(width - thing.width), rng.integers(height - thing.height)
    else:  # centred anywhere, so that the border may cut it
        x, y = rng.integers(width) - thing.width // 2, rng.integers(height) - thing.height // 2
    layer = Image.new("RGBA", (width, height))
    layer.paste(thing, (int(x), int(y)))
    return layer


def _paste(canvas: Image.Image, layer: Image.Image, light: list[float], extent: float) -> None:
    """Put an RGBA layer on the canvas, with a soft shadow, ``light`` times ``extent`` px away."""
    shade = layer.getchannel("A").point(lambda alpha: 0.4 * alpha)
    shade = shade.filter(ImageFilter.GaussianBlur(0.05 * extent))
    canvas.paste("black", (round(light[0] * extent), round(light[1] * extent)), mask=shade)
    canvas.paste(layer, mask=layer)


def outline(mask: np.ndarray) -> list[list[int]] | None:
    """Polygons ``[x1, y1, x2, y2, ...]`` along the pixel borders of a boolean (H, W) mask.

    One for each piece, so that rasterising gives the mask back exactly; None if the mask has a
    hole, which a list of polygons cannot say.
    """
    y, x = np.nonzero(mask)
    pieces = shapely.coverage_union_all(shapely.box(x, y, x + 1, y + 1)).simplify(0)
    polygons = shapely.get_parts(pieces)
    if any(polygon.interiors for polygon in polygons):
        return None
    return [shapely.get_coordinates(p)[:-1].astype(int).ravel().tolist() for p in polygons]


def annotation(instance: Instance, as_polygon: bool) -> dict[str, Any]:
    """The COCO annotation of an instance, without its ids."""
    encoded = rle.encode(np.asfortranarray(instance.mask, np.uint8))
    as_rle = {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
    return {
        "category_id": CATEGORIES[instance.category][0],
        "iscrowd": int(instance.is_crowd),
        "area": int(rle.area(encoded)),
        "bbox": rle.toBbox(encoded).astype(int).tolist(),
        "segmentation": (outline(instance.mask) if as_polygon else None) or as_rle,
    }


def build(output: Path, train_images: int = 400, val_images: int = 60) -> Path:
    """Make the dataset, so many images, in a folder; see `demo.folder.make_once`."""
    counts = {"train": train_images, "val": val_images}

    def write(folder: Path) -> None:
        for place, (split, count) in enumerate(counts.items()):
            (folder / split).mkdir()
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for index in tqdm(range(count), desc=split, unit="image", disable=None):
                rng = np.random.default_rng([0, place, index])
                image, instances = compose(rng, split)
                file = f"{index:06d}.jpg"
                image.save(folder / split / file, quality=92)
                size = {"width": image.width, "height": image.height}
                images.append({"id": index + 1, "file_name": file, **size})
                for instance in instances:
                    as_polygon = not instance.is_crowd and rng.random() < POLYGON_SHARE
                    # Ids start at 1: some evaluators take id 0 for "no match".
                    ids = {"id": len(annotations) + 1, "image_id": index + 1}
                    annotations.append(ids | annotation(instance, as_polygon))
            content = {
                "info": {"description": "Objects pasted onto photographs of scikit-image"},
                "images": images,
                "annotations": annotations,
                "categories": [{"id": row[0], "name": name} for name, row in CATEGORIES.items()],
            }
            write_json(folder / "annotations" / f"instances_{split}.json", content, indent=None)

    return make_once(output, f"demo.detection 3, {counts}", write)


if __name__ == "__main__":
    sys.exit(command("detection", __doc__, build))
