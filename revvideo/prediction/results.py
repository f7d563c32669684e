"""What is found in videos, as JSON, and where drawings go."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbones.common.files import write_json


@dataclass
class Predictions:
    """Collects what is known about the inputs, ``paths``, and writes it into ``folder``."""

    folder: Path
    paths: Sequence[Path]
    videos: list[dict[str, Any]] = field(default_factory=list)  # of inputs that could be read
    unreadable: dict[str, str] = field(default_factory=dict)  # why; of one that broke off, too

    def __post_init__(self) -> None:
        self._names = drawing_names(self.paths)

    def drawing(self, kind: str, path: Path, suffix: str) -> Path:
        """The file for a drawing of ``path``, of a name that no other input has."""
        file = self.folder / kind / (self._names[path] + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def write(self, classes: Sequence[str], facts: dict[str, Any]) -> None:
        """Write ``results.json``, with ``facts`` about the run."""
        results = {"inputs": len(self.paths), "videos": len(self.videos)}
        about = {"unreadable": self.unreadable, "classes": classes, "run": facts}
        write_json(self.folder / "results.json", results | about)

    def write_videos(self) -> None:
        """Write ``predictions.json``."""
        write_json(self.folder / "predictions.json", self.videos)


def drawing_names(paths: Sequence[Path]) -> dict[Path, str]:
    """For each path one of its own: without suffix, relative to the folder that all are in."""
    absolute = {path: path.absolute() for path in paths}
    common = os.path.commonpath([path.parent for path in absolute.values()])
    names = {path: str(full.relative_to(common)) for path, full in absolute.items()}
    stems = {path: str(Path(name).with_suffix("")) for path, name in names.items()}
    taken = Counter(stems.values())
    return {path: names[path] if taken[stem] > 1 else stem for path, stem in stems.items()}
