"""What is found in pictures and videos, as COCO-format JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from backbones.common.files import free_name, write_json


@dataclass
class Predictions:
    """Collects what is found and writes ``predictions.json`` and ``results.json``.

    Args:
        folder: where they are written, and drawings beside them.
        categories: the dataset's ``id`` and ``name`` of each class, in the model's order.

    Attributes:
        objects: COCO results, a dictionary for each object that was found.
        pictures, videos: what is known about each input that could be read.
        unreadable: the reason, for each other input. A video may be in both: it broke off.
    """

    folder: Path
    categories: list[dict[str, Any]]
    objects: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    _drawings: set[Path] = field(default_factory=set)

    def add(self, image_id: int, instances: Instances, **where: Any) -> None:
        """Add what was found in one picture or frame, with more keys such as ``file_name``."""
        for found in instances_to_coco_json(instances, image_id):
            found["category_id"] = self.categories[found["category_id"]]["id"]
            self.objects.append({**where, **found})

    def drawing(self, kind: str, path: Path, suffix: str) -> Path:
        """The file for a drawing of ``path``; inputs of one name in two folders get two."""
        folder = self.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        file = free_name(folder, path, suffix, self._drawings)
        self._drawings.add(file)
        return file

    def write(self, **facts: Any) -> None:
        """Write both files, each whole or not at all; ``facts`` about the run go into results."""
        self.objects.sort(key=lambda found: found["image_id"])
        self.pictures.sort(key=lambda picture: picture["image_id"])
        results = {
            "pictures": self.pictures,
            "videos": self.videos,
            "unreadable": self.unreadable,
            "categories": self.categories,
            "run": facts,
        }
        write_json(self.folder / "predictions.json", self.objects, indent=None)
        write_json(self.folder / "results.json", results)
