"""Where the drawings of a video go."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def drawing_names(paths: Sequence[Path]) -> dict[Path, str]:
    """For each path one of its own: without suffix, relative to the folder that all are in."""
    common = os.path.commonpath([path.absolute().parent for path in paths])
    names = {path: os.path.relpath(path, common) for path in paths}
    stems = {path: str(Path(name).with_suffix("")) for path, name in names.items()}
    taken = Counter(stems.values())
    return {path: names[path] if taken[stem] > 1 else stem for path, stem in stems.items()}


def drawing(folder: Path, kind: str, name: str) -> Path:
    """The file for a drawing, in a folder of its kind, which is made."""
    file = folder / kind / name
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
