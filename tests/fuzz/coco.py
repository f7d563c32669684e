"""Annotation files in which anything may be something else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.running import RECIPE, TINY, damaged

BIG: list[Any] = [10**400, -(10**400), 2**63, -(2**63), 2**31, 1e308, 1e-320, -1, 0, 0.5, True]
BIG += [float("nan"), float("inf")]
ODD: list[Any] = [None, "", "\0", "../" * 9, "/dev/zero", "\ud800", "é" * 300, "x" * 5000, [], {}]
ODD += [[[]], [None], {"a": 1}, "1"]


class Coco:
    """Annotation files: read, normalised, trained on for a step an image, and evaluated."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        from PIL import Image
        from pycocotools import mask

        self.images, images, annotations = folder / "img", [], []
        self.images.mkdir()
        drawn = np.zeros((48, 64), np.uint8, order="F")
        drawn[12:36, 16:48] = 1
        packed = mask.encode(drawn)["counts"].decode()
        forms = [
            [[16, 12, 48, 12, 48, 36, 16, 36]],
            {"size": [48, 64], "counts": packed},
            {"size": [48, 64], "counts": [16 * 48 + 12, *[24, 24] * 31, 24, 16 * 48 + 12]},
        ]
        for number in (1, 2, 3):
            pixels = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
            Image.fromarray(pixels).save(self.images / f"{number}.png")
            size = {"width": 64, "height": 48}
            images.append({"id": number, "file_name": f"{number}.png", **size})
            entry = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "area": 768}
            box = {"bbox": [16, 12, 32, 24], "segmentation": forms[number - 1]}
            annotations.append({**entry, **box})
        categories = [{"id": 1, "name": "box"}]
        self.base = {"images": images, "annotations": annotations, "categories": categories}

    def case(self, rnd: random.Random, path: Path) -> Callable[[], Any]:
        tree = copy.deepcopy(self.base)
        for _ in range(rnd.choice([1, 1, 2, 5])):
            change(tree, rnd)
        raw = json.dumps(tree).encode()
        if rnd.random() < 0.2:
            deep = rnd.choice([900, 5000])
            nested = raw[:-1] + b', "deep": ' + b"[" * deep + b"]" * deep + b"}"
            raw = rnd.choice([nested, b"\xef\xbb\xbf" + raw, damaged(raw, rnd)])
        path.write_bytes(raw)
        skip = f"dataset.skip_broken={str(rnd.random() < 0.7).lower()}"
        return lambda: self.train(path, skip)

    def train(self, path: Path, skip: str) -> None:
        from detectron2.config import instantiate
        from detectron2.utils.events import EventStorage

        from revdet.config import load_config
        from revdet.data.normalise import normalise, use_normalised
        from revdet.models import build_model
        from revdet.training.evaluation import evaluate
        from revdet.training.results import finish

        data = [f"dataset.{split}_json={path}" for split in ("train", "val")]
        data += [f"dataset.{split}_images={self.images}" for split in ("train", "val")]
        out = f"train.output_dir={path}.out"
        cfg = load_config(RECIPE, [*TINY, *data, skip, out])
        normalise(cfg)
        use_normalised(cfg)
        model, loader = build_model(cfg, "cpu"), instantiate(cfg.dataloader.train)
        mapper = instantiate(cfg.dataloader.train.mapper)
        with EventStorage():
            for record in loader.dataset.records:
                sum(model([mapper(copy.deepcopy(record))]).values()).backward()
        finish(cfg, model, evaluate(cfg, model.eval()), {}, trained=False)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a tree."""
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        yield from places(value, (*path, key))


def change(tree: Any, rnd: random.Random) -> None:
    """Change one thing somewhere in a tree."""
    if not (paths := [path for path in places(tree) if len(path) < 5 or rnd.random() < 0.2]):
        return
    *above, key = rnd.choice(paths)
    parent = tree
    for step in above:
        parent = parent[step]
    match rnd.choice(["drop", "big", "odd", "twice", "list", "text", "counts"]):
        case "drop":
            del parent[key]
        case "twice" if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        case "list":
            parent[key] = [parent[key]]
        case "text":
            parent[key] = "7"
        case "counts":
            texts = ["o" * 24, "", "PPP" * 50, "~" * 1000, {"a": 1}, [2**32, 5], [10**30], [None]]
            random_text = "".join(chr(rnd.randint(48, 111)) for _ in range(rnd.randint(1, 40)))
            counts = rnd.choice([*texts, [1.5], [-5, 10], random_text, random_text])
            parent[key] = {"size": [48, 64], "counts": counts}
        case other:
            parent[key] = copy.deepcopy(rnd.choice(BIG if other == "big" else ODD))
