"""Make a COCO-format file of the files that labelling tools write: YOLO, Pascal VOC, LabelMe.

    python -m revdet.convert labels/ train.json --images photos/          # YOLO: NAME.txt per image
    python -m revdet.convert annotations/ train.json --images photos/     # VOC: NAME.xml
    python -m revdet.convert labelled/ train.json                         # LabelMe: NAME.json

YOLO's boxes and polygons, VOC's boxes, LabelMe's polygons and rectangles. The images lie in
--images (SOURCE, if it is not given) under the names of their label files. YOLO's numbers get names
from `classes.txt`, `obj.names` or `data.yaml` in SOURCE or above it. A file that cannot be read is
left out, counted and named; so are images without a label file.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backbones.common.console import make_parser, name_unreadable, run_command
from backbones.common.errors import UserError, error_line
from backbones.common.files import walk, write_json
from backbones.common.images import checked_size, image_suffixes

# Where YOLO has the names of classes.
_NAMES = ("classes.txt", "obj.names", "data.yaml")

Shape = tuple[str, list[float]]  # a class and a polygon x, y, x, y, …; of a box, its four numbers
Reader = Callable[[Path, int, int], Iterator[Shape]]  # from a file, and its image's width, height


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can fix."""
    parser = make_parser("python -m revdet.convert", __doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of label files, searched in depth")
    add("output", type=Path, metavar="OUT.json", help="COCO-format file")
    add("--images", type=Path, metavar="FOLDER", help="where the images are (SOURCE)")
    return run_command(parser, _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    folder = args.images or args.source
    for given in (args.source, folder):
        if not given.is_dir():
            raise UserError(f"{given} is no folder: give the one of the labels, and --images")
    yolo: Reader = partial(_yolo, _class_names(args.source))
    kinds = {".xml": _voc, ".json": _labelme, ".txt": yolo}
    every, notes = sorted(walk(args.source)), {*_NAMES, args.output.name}
    labels = [file for file in every if file.suffix in kinds and file.name not in notes]
    if not labels:
        formats = ".txt (YOLO), .xml (VOC) or .json (LabelMe)"
        raise UserError(f"{args.source} holds no label file: {formats}")
    suffixes = image_suffixes()
    files = [file for file in sorted(walk(folder)) if file.suffix.lower() in suffixes]
    there = {file.relative_to(folder).with_suffix(""): file for file in files}
    images: list[dict[str, Any]] = []
    label_of: dict[Path, Path] = {}
    found: list[tuple[int, Shape]] = []
    unreadable: dict[str, str] = {}
    named = {file: there.get(file.relative_to(args.source).with_suffix("")) for file in labels}
    for file, path in named.items():
        try:
            if path is None:
                raise ValueError(f"no image of this name in {folder}")
            if path in label_of:
                raise ValueError(f"{path.name} has another label file, {label_of[path].name}")
            width, height = checked_size(path)
            shapes = list(kinds[file.suffix](file, width, height))
            for label, points in shapes:
                _check(label, points, width, height)
        except Exception as error:  # a damaged file fails in any way
            unreadable[str(file)] = error_line(error)
            continue
        label_of[path] = file
        name = path.relative_to(folder).as_posix()
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        found += [(len(images), shape) for shape in shapes]
    ids = {name: number for number, name in enumerate(sorted({name for _, (name, _) in found}), 1)}
    annotations = [
        {"id": number, "image_id": image, "category_id": ids[name], **_geometry(points)}
        for number, (image, (name, points)) in enumerate(found, 1)
    ]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    if not annotations:
        name_unreadable(unreadable, None)
        raise UserError(f"no object in the {len(labels)} label files of {args.source}")
    write_json(args.output, content, indent=None)
    print(f"{len(images)} images, {len(annotations)} objects of {', '.join(ids)} -> {args.output}")
    unreadable |= {str(f): "has no label file" for f in sorted({*files} - {*named.values()})}
    name_unreadable(unreadable, None)


def _check(name: str, points: list[float], width: int, height: int) -> None:
    if not name:
        raise ValueError("an object has no name")
    for i, value in enumerate(points):
        side = height if i % 2 else width
        if not -side < value < 2 * side:
            far = f"{name!r} reaches to {value:g}, far outside of {width} x {height} pixels"
            raise ValueError(f"{far} (YOLO's numbers are fractions of the image)")


def _geometry(points: list[float]) -> dict[str, Any]:
    """Box, area and, of a polygon, segmentation."""
    xs, ys = points[0::2], points[1::2]
    left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    box = {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
    if len(points) <= 4:
        return box
    turned = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    area = abs(sum(x * v - u * y for x, y, u, v in turned)) / 2
    return {**box, "area": area, "segmentation": [points]}


def _voc(file: Path, width: int, height: int) -> Iterator[Shape]:
    for thing in ElementTree.parse(file).getroot().iter("object"):
        box = [float(thing.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")]
        yield thing.findtext("name", "").strip(), [box[0] - 1, box[1] - 1, box[2], box[3]]


def _labelme(file: Path, width: int, height: int) -> Iterator[Shape]:
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict) or "shapes" not in content:
        raise ValueError("it has no shapes, as LabelMe's files have (COCO's need no converting)")
    for shape in content["shapes"]:
        points = [float(value) for point in shape["points"] for value in point]
        if len(points) < 6 and shape.get("shape_type") != "rectangle":
            raise ValueError(f"a {shape.get('shape_type')} has no area: label it as a polygon")
        yield str(shape["label"]), points


def _yolo(names: dict[float, str], file: Path, width: int, height: int) -> Iterator[Shape]:
    for line in filter(None, file.read_text(encoding="utf-8-sig").splitlines()):
        label, *numbers = line.split()
        values = [float(x) * (height if i % 2 else width) for i, x in enumerate(numbers)]
        if len(values) == 4:
            x, y, w, h = values
            values = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        elif len(values) < 6 or len(values) % 2:
            raise ValueError(f"{line!r} is no `class x y w h` and no polygon")
        number = float(label)
        if not number.is_integer() or (names and number not in names):
            raise ValueError(f"class {label} is none of the {len(names)} that have names")
        yield names.get(number, label), values


def _class_names(source: Path) -> dict[float, str]:
    """By their numbers; empty if there are no names."""
    folders = source, *source.resolve().parents[:2]
    file = next(filter(Path.is_file, (folder / n for folder in folders for n in _NAMES)), None)
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix != ".yaml":
            return {number: name.strip() for number, name in enumerate(text.splitlines())}
        import yaml

        content = yaml.safe_load(text)
        names, points = content["names"], content.get("kpt_shape")
        listed = names.items() if isinstance(names, dict) else enumerate(names)
        by_number: dict[float, str] = {int(number): str(name) for number, name in listed}
    except Exception as error:  # what is in it may be anything
        raise UserError(f"{file} has no names of classes ({error_line(error)})") from error
    if points:
        raise UserError(f"{file}: key points (kpt_shape) cannot be taken, only boxes, masks")
    return by_number


if __name__ == "__main__":
    sys.exit(main())
