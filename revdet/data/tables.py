"""What a dataset holds, in numbers and as tables to print."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tabulate import tabulate

from revdet.data.annotations import BROKEN, NOTED, Coco, Entry, Findings, categories_in

CLASSES_LISTED = 100
Row = dict[str, Any]


def summarize(path: Path, content: Coco, cleaned: Coco, findings: Findings) -> Row:
    """What ``results.json`` says about a dataset: ``path`` with its content, whole and cleaned."""
    images, annotations = cleaned["images"], cleaned["annotations"]
    crowds = sum(1 for a in annotations if a["iscrowd"])
    with_objects = {a["image_id"] for a in annotations if not a["iscrowd"]}
    sides = ([image[side] for image in images] for side in ("width", "height"))
    return {
        "annotation_file": str(path),
        "images": len(images),
        "images_without_objects": len(images) - len(with_objects),
        "objects": len(annotations) - crowds,
        "crowd_regions": crowds,
        "categories": len(cleaned["categories"]),
        "median_image": [round(statistics.median(side or [0])) for side in sides],  # width, height
        "left_out_images": len(content["images"]) - len(images),
        "left_out_annotations": len(content["annotations"]) - len(annotations),
        "broken": {kind: len(findings[kind]) for kind in BROKEN if kind in findings},
        "noted": {kind: len(findings[kind]) for kind in NOTED if kind in findings},
    }


def dataset_table(report: dict[str, Row]) -> str:
    """One row for each dataset, from its summary."""
    rows = [
        {
            "dataset": name,
            "images": facts["images"],
            "without objects": facts["images_without_objects"],
            "objects": facts["objects"],
            "crowd regions": facts["crowd_regions"],
            "classes": facts["categories"],
            "median image, px": "{} x {}".format(*facts["median_image"]),
            "broken": sum(facts["broken"].values()),
        }
        for name, facts in report.items()
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe") + "\n"


def class_rows(content: Coco) -> list[Row]:
    """Images, objects, sizes and the median box of each class, in the order of the ids."""
    objects: dict[int, list[Entry]] = {c["id"]: [] for c in content["categories"]}
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            objects[annotation["category_id"]].append(annotation)
    rows = []
    for category in categories_in(content):
        found = objects[category["id"]]
        images = len({a["image_id"] for a in found})
        small = sum(1 for a in found if a["area"] < 32**2)
        large = sum(1 for a in found if a["area"] > 96**2)
        sides = [round(statistics.median(a["bbox"][i] for a in found)) for i in (2, 3) if found]
        row = {"id": category["id"], "class": category["name"], "objects": len(found)}
        sizes = {"small": small, "medium": len(found) - small - large, "large": large}
        box = " x ".join(map(str, sides)) or "-"
        rows.append({**row, "images": images, **sizes, "median box, px": box})
    return rows


def class_table(classes: dict[str, list[Row]]) -> str:
    """One row for each class: the first dataset's figures, then the objects of the others."""
    (_, rows), *others = classes.items()
    for name, theirs in others:
        counts = {row["id"]: row["objects"] for row in theirs}
        rows = [{**row, f"objects in {name}": counts.get(row["id"], 0)} for row in rows]
    shown = sorted(rows, key=lambda row: -row["objects"])[:CLASSES_LISTED]
    more = len(rows) - len(shown)
    note = f"\n… and {more} rarer classes" if more else ""
    table = tabulate(shown, headers="keys", tablefmt="pipe")
    return f"{table}{note}\nsmall: below 32² px of area, large: above 96² px, as COCO has it"
