"""What is found in pictures and videos, as COCO-format JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from backbones.common.files import free_name, write_json

Facts = dict[str, Any]  # as JSON has them


@dataclass
class Predictions:
    """Collects what is found and writes ``predictions.json`` and ``results.json``."""

    folder: Path  # where they are written, and drawings beside them
    categories: list[Facts]  # the dataset's id and name of each class, in the model's order
    run: Facts  # what results.json says about the run, besides the seconds that it has taken
    objects: list[Facts] = field(default_factory=list)  # COCO results, one for each that was found
    pictures: list[Facts] = field(default_factory=list)  # what is known of those that can be read
    videos: list[Facts] = field(default_factory=list)  # likewise, and of those that break off
    unreadable: dict[str, str] = field(default_factory=dict)  # the reason, for these and the others
    _drawings: set[Path] = field(default_factory=set)
    _began: float = field(default_factory=time.perf_counter)

    def add(self, image_id: int, instances: Instances, **where: Any) -> None:
        """Add what was found in one picture or frame, with more keys such as ``file_name``."""
        for found in instances_to_coco_json(instances, image_id):
            found["category_id"] = self.categories[found["category_id"]]["id"]
            self.objects.append({**where, **found})

    def drawing(self, kind: str, path: Path, suffix: str) -> Path:
        """The file for a drawing of ``path``; inputs of one name in two folders get two."""
        return free_name(self.folder / kind, path, suffix, self._drawings)

    def write(self, **more: Any) -> None:
        """Write both files, each whole or not at all, with ``more`` about the run."""
        self.objects.sort(key=lambda found: found["image_id"])
        self.pictures.sort(key=lambda picture: picture["image_id"])
        found = {"pictures": self.pictures, "videos": self.videos, "unreadable": self.unreadable}
        run = {**self.run, "seconds": round(time.perf_counter() - self._began, 1), **more}
        results = {**found, "categories": self.categories, "run": run}
        write_json(self.folder / "predictions.json", self.objects, indent=None)
        write_json(self.folder / "results.json", results)
