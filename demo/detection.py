"""Build the demo detection dataset: real photographs, known masks, seconds, no download.

Objects cut out of photographs (see `demo.cutouts`) are pasted at random scale, angle and
lighting onto crops of other photographs, so that every visible pixel of every object is known. The
result is a COCO dataset with what a real one has: polygons and RLE masks, crowd regions, images
without objects, images of different sizes, objects cut by the border or hidden in part, and
category ids with gaps::

    OUTPUT/annotations/instances_train.json    OUTPUT/train/000000.jpg ...
    OUTPUT/annotations/instances_val.json      OUTPUT/val/000000.jpg ...
    OUTPUT/preview.png                         training images with their annotations drawn

Training and validation share the photographs of the objects, but neither placements nor background
photographs: the validation score says how well a model finds known objects in unseen scenes. Each
image record names its background photograph in the field ``background``.

The same arguments give the same bytes. Image number i of a split depends on the seed and on i only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as rle
from tqdm import tqdm

from demo.cutouts import random_background, random_object, random_pile

# Raise by one with each change that changes what is built, so that old copies get rebuilt.
RECIPE = 2
SPLITS = ("train", "val")
IMAGE_SIDE = (112, 168)  # px, both ends included
EMPTY_SHARE = 0.08
CROWD_SHARE = 0.06
MIN_VISIBLE_SHARE = 0.4
MIN_VISIBLE_PIXELS = 60
# Name: (COCO id, supercategory, share of the objects, longer side in px, largest tilt in degrees).
# The ids have gaps, as COCO's own have, so that code which forgets to map them fails here.
CATEGORIES: dict[str, tuple[int, str, float, tuple[int, int], float]] = {
    "cat": (1, "animal", 0.19, (36, 96), 25),
    "coin": (3, "object", 0.24, (26, 56), 180),
    "cup": (7, "object", 0.19, (34, 94), 25),
    "motorcycle": (11, "vehicle", 0.19, (48, 100), 20),
    "rocket": (12, "vehicle", 0.19, (46, 100), 40),
}


@dataclass
class Instance:
    """One annotated object, or a crowd: its category and where it can be seen."""

    category: str
    is_crowd: bool
    whole_area: int  # px, what is hidden or outside the image included
    mask: np.ndarray  # (H, W) bool, visible pixels


@dataclass
class Scene:
    """One RGB image, its background photograph's file name and its objects."""

    image: Image.Image
    background: str
    instances: list[Instance]


def compose(seed: int, split: str, index: int) -> tuple[Scene, np.random.Generator]:
    """Compose image ``index`` of ``split``; also gives the generator, for the choices that follow.

    Later objects hide earlier ones. An object that would be seen by less than
    ``MIN_VISIBLE_SHARE`` or ``MIN_VISIBLE_PIXELS``, or leave so little of another, is placed anew,
    and left out after ten tries: whatever is in the picture is annotated.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    width, height = (int(side) for side in rng.integers(*IMAGE_SIDE, size=2, endpoint=True))
    background, canvas = random_background(rng, split, width, height)
    instances: list[Instance] = []
    light = rng.uniform(-0.06, 0.06), rng.uniform(0.02, 0.08)

    kind = rng.random()
    has_crowd = EMPTY_SHARE <= kind < EMPTY_SHARE + CROWD_SHARE
    if kind < EMPTY_SHARE:
        wanted = []
    else:
        count = rng.choice(3 if has_crowd else np.arange(1, 6))
        shares = [category[2] for category in CATEGORIES.values()]
        wanted = [str(name) for name in rng.choice(list(CATEGORIES), size=count, p=shares)]
        if has_crowd:
            wanted.insert(int(rng.integers(len(wanted) + 1)), "pile")

    for name in wanted:
        for _ in range(10):
            if is_pile := name == "pile":
                thing = random_pile(rng)
            else:
                thing = random_object(rng, name, *CATEGORIES[name][3:])
            layer = _place(rng, thing, width, height)
            mask = _solid(layer)
            new = Instance("coin" if is_pile else name, is_pile, int(_solid(thing).sum()), mask)
            if not _is_visible(new, mask):
                continue
            if all(_is_visible(old, old.mask & ~mask) for old in instances):
                for old in instances:
                    old.mask = old.mask & ~mask
                instances.append(new)
                _paste(canvas, layer, light)
                break
    return Scene(canvas, background, instances), rng


def _solid(layer: Image.Image) -> np.ndarray:
    """The (H, W) bool mask of the pixels that an RGBA image covers by more than half."""
    return np.asarray(layer.getchannel("A")) > 127


def _is_visible(instance: Instance, mask: np.ndarray) -> bool:
    seen = int(mask.sum())
    return seen >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * instance.whole_area)


def _place(rng: np.random.Generator, thing: Image.Image, width: int, height: int) -> Image.Image:
    """An RGBA image somewhere on an otherwise transparent layer of the given size in px."""
    if rng.random() < 0.8 and thing.width < width and thing.height < height:
        x, y = rng.integers(width - thing.width), rng.integers(height - thing.height)
    else:  # centred anywhere, so that the border may cut it
        x, y = rng.integers(width) - thing.width // 2, rng.integers(height) - thing.height // 2
    layer = Image.new("RGBA", (width, height))
    layer.paste(thing, (int(x), int(y)))
    return layer


def _paste(canvas: Image.Image, layer: Image.Image, light: tuple[float, float]) -> None:
    """Put an RGBA layer and its soft shadow on the RGB canvas of the same size.

    ``light`` is the shadow's offset (x, y) as a fraction of the object's extent.
    """
    extent = float(np.sqrt(_solid(layer).sum()))
    shade = layer.getchannel("A").point(lambda alpha: 0.4 * alpha)
    shade = shade.filter(ImageFilter.GaussianBlur(0.05 * extent))
    offset = round(light[0] * extent), round(light[1] * extent)
    canvas.paste("black", offset, mask=shade)
    canvas.paste(layer, mask=layer)


def outline(mask: np.ndarray) -> list[list[int]] | None:
    """Polygons ``[x1, y1, x2, y2, ...]`` along the pixel borders of a boolean (H, W) mask.

    One polygon for each 4-connected piece, so that rasterising gives the mask back exactly; None
    if the mask has a hole, which a list of polygons cannot say.
    """
    padded = np.pad(mask, 1)
    core = padded[1:-1, 1:-1]
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Walk clockwise: each side of a pixel whose neighbour is outside gives one step, from the
    # corner (x, y) of the pixel in the direction (dx, dy).
    for beyond, corner, step in (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    ):
        for y, x in np.argwhere(core & ~beyond).tolist():
            steps.setdefault((x + corner[0], y + corner[1]), []).append(step)
    polygons = []
    while steps:
        start = point = next(iter(steps))
        heading = (0, 0)
        vertices: list[tuple[int, int]] = []
        while point in steps:
            options = steps[point]
            # Where two pieces touch at a corner, turning right stays on the same piece.
            right = (-heading[1], heading[0])
            step = options.pop(options.index(right) if right in options else 0)
            if not options:
                del steps[point]
            if step != heading:
                vertices.append(point)
            heading = step
            point = (point[0] + step[0], point[1] + step[1])
            if point == start:
                break
        xs, ys = np.array(vertices).T
        if np.sum(xs * np.roll(ys, -1) - ys * np.roll(xs, -1)) < 0:
            return None  # a counter-clockwise walk goes around a hole
        polygons.append([coordinate for vertex in vertices for coordinate in vertex])
    return polygons


def annotation(instance: Instance, as_polygon: bool) -> dict[str, Any]:
    """COCO annotation of an instance, less the ids; a mask with a hole is written as RLE."""
    rows, columns = np.nonzero(instance.mask)
    left, top = int(columns.min()), int(rows.min())
    segmentation: Any = outline(instance.mask) if as_polygon else None
    if segmentation is None:
        segmentation = rle.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
        segmentation["counts"] = segmentation["counts"].decode("ascii")
    return {
        "category_id": CATEGORIES[instance.category][0],
        "iscrowd": int(instance.is_crowd),
        "area": len(rows),
        "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
        "segmentation": segmentation,
    }


def build(
    output: Path,
    *,
    seed: int = 0,
    train_images: int = 400,
    val_images: int = 60,
    force: bool = False,
) -> Path:
    """Build the dataset in the folder ``output`` (made if need be) and give that folder back.

    A finished dataset with the same arguments is kept as it is unless ``force``; one with other
    arguments is replaced. The new one is made in a hidden folder beside it and renamed at the end,
    so a build that was cut short leaves nothing that looks finished.

    Raises ValueError for a negative seed or fewer than one image in a split, and FileExistsError,
    touching nothing, if ``output`` holds files that this function did not write.
    """
    if seed < 0 or min(train_images, val_images) < 1:
        raise ValueError("seed must be 0 or more, train_images and val_images 1 or more")
    output = Path(output).absolute()
    info = {
        "description": "Demo detection dataset: objects cut out of the photographs that "
        "scikit-image ships, pasted onto other photographs of scikit-image",
        "generator": "demo.detection",
        "recipe": RECIPE,
        "seed": seed,
        "train_images": train_images,
        "val_images": val_images,
    }
    if output.exists():
        built_as, files = _existing(output)
        if built_as == info and not force and all(file.is_file() for file in files):
            print(f"{output} is up to date ({train_images} + {val_images} images)")
            return output
        foreign = [p for p in sorted(output.rglob("*")) if not p.is_dir() and p not in files]
        if foreign:
            raise _refusal(output, f"{foreign[0].relative_to(output)} is not part of it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        fresh = Path(scratch, "new")
        (fresh / "annotations").mkdir(parents=True)
        with tqdm(total=train_images + val_images, desc="demo dataset", unit="image") as progress:
            for split, count in zip(SPLITS, (train_images, val_images), strict=True):
                content = {"info": info, **_write_images(fresh / split, seed, count, progress)}
                _json_path(fresh, split).write_text(json.dumps(content), encoding="utf-8")
        _preview(fresh, "train").save(fresh / "preview.png")
        if output.exists():
            output.rename(Path(scratch, "old"))
        fresh.rename(output)
    return output


def _write_images(
    folder: Path, seed: int, count: int, progress: tqdm[Any]
) -> dict[str, list[dict[str, Any]]]:
    """Write the JPEGs of the split named as ``folder``; its COCO lists."""
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene, rng = compose(seed, folder.name, index)
        name = f"{index:06d}.jpg"
        scene.image.save(folder / name, quality=92)
        width, height = scene.image.size
        record = {"id": index + 1, "file_name": name, "width": width, "height": height}
        images.append(record | {"background": scene.background, "license": 1})
        for instance in scene.instances:
            as_polygon = not instance.is_crowd and rng.random() < 0.75
            # Ids start at 1: some evaluators take id 0 for "no match".
            ids = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append(ids | annotation(instance, as_polygon))
        progress.update()
    return {
        "licenses": [{"id": 1, "name": "see the documentation of skimage.data"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": above}
            for name, (number, above, *_) in CATEGORIES.items()
        ],
    }


def _json_path(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def _refusal(output: Path, reason: str) -> FileExistsError:
    return FileExistsError(
        f"{output} is not a demo dataset alone ({reason}): choose another output folder, "
        "or move that one away"
    )


def _existing(output: Path) -> tuple[dict[str, Any] | None, set[Path]]:
    """The ``info`` of the dataset in ``output`` (None in an empty folder) and all its files."""
    if output.is_dir() and not any(output.iterdir()):
        return None, set()
    files = {output / "preview.png"}
    info = None
    try:
        for split in SPLITS:
            content = json.loads(_json_path(output, split).read_text(encoding="utf-8"))
            info = content["info"]
            if info["generator"] != "demo.detection":
                raise KeyError("generator")
            files.add(_json_path(output, split))
            files.update(output / split / image["file_name"] for image in content["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refusal(output, "its annotations are not ours") from error
    return info, files


def _preview(folder: Path, split: str, count: int = 12, zoom: int = 2) -> Image.Image:
    """Contact sheet of some images, drawn from the written files: outlines, boxes, names."""
    content = json.loads(_json_path(folder, split).read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    colours = dict(zip(names, ("#ffd400", "#00e5ff", "#ff4fd8", "#5dff3b", "#ff8c1a"), strict=True))
    cell = zoom * IMAGE_SIDE[1] + 8
    sheet = Image.new("RGB", (4 * cell, -(-count // 4) * cell), "white")
    crowded = {item["image_id"] for item in content["annotations"] if item["iscrowd"]}
    # The first images, but with a crowd among them if there is one at all.
    chosen = sorted(content["images"][count - 1 :], key=lambda one: one["id"] not in crowded)
    for place, record in enumerate(content["images"][: count - 1] + chosen[:1]):
        width, height = record["width"], record["height"]
        with Image.open(folder / split / record["file_name"]) as image:
            picture = image.convert("RGB").resize((zoom * width, zoom * height))
        for item in content["annotations"]:
            if item["image_id"] != record["id"]:
                continue
            colour, shape = colours[item["category_id"]], item["segmentation"]
            if isinstance(shape, list):
                shape = rle.merge(rle.frPyObjects(shape, height, width))
            mask = Image.fromarray(rle.decode(shape) * 255).resize(picture.size)
            rim = np.asarray(mask.filter(ImageFilter.MaxFilter(3))) > np.asarray(mask)
            picture.paste(colour, mask=Image.fromarray(rim))
            x, y, w, h = (zoom * value for value in item["bbox"])
            pen = ImageDraw.Draw(picture)
            pen.rectangle((x, y, x + w - 1, y + h - 1), outline=colour)
            label = names[item["category_id"]] + (" (crowd)" if item["iscrowd"] else "")
            pen.rectangle(pen.textbbox((x + 2, y), label), fill="black")
            pen.text((x + 2, y), label, fill=colour)
        sheet.paste(picture, (place % 4 * cell + 4, place // 4 * cell + 4))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """Command line: build the dataset and print what is in it."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.detection",
        description="Build a small COCO detection dataset (cats, coins, cups, motorcycles, rockets "
        "in photographs) in seconds, without a download, from the pictures inside scikit-image. "
        "Look at OUTPUT/preview.png to see what it is like.",
        epilog="Calling it again with the same options keeps the finished dataset; other options "
        "replace it. Files that this command did not write are never touched.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder, e.g. datasets/demo")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed gives other scenes (default: 0)"
    )
    parser.add_argument(
        "--train-images", type=int, default=400, metavar="N", help="training set (default: 400)"
    )
    parser.add_argument(
        "--val-images", type=int, default=60, metavar="N", help="validation set (default: 60)"
    )
    parser.add_argument("--force", action="store_true", help="rebuild even if it is up to date")
    options = parser.parse_args(arguments)
    try:
        output = build(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    for split in SPLITS:
        content = json.loads(_json_path(output, split).read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        counts = Counter(names[item["category_id"]] for item in content["annotations"])
        listing = ", ".join(f"{counts[name]} {name}" for name in names.values())
        print(f"{split}: {len(content['images'])} images with {listing}")


if __name__ == "__main__":
    main()
