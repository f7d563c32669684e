"""Opening every video of a set, to find out which can be used."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from backbones.common.errors import UserError, error_line
from backbones.common.files import make_folder
from revvideo.data.decode import probe
from revvideo.data.layouts import Layout, find_videos
from revvideo.data.loader import each_file
from revvideo.data.manifest import Manifest, VideoRecord, load_manifest
from revvideo.data.stills import IMAGES, probe_still
from revvideo.errors import VideoError

_SAVE_EVERY = 30.0  # seconds
_FILES_PER_WORKER = 32  # with fewer, starting a process takes longer than opening the files


def scan(
    root: str | os.PathLike[str],
    split: str,
    annotations: str | os.PathLike[str] | None = None,
    *,
    layout: Layout = "auto",
    classes: Sequence[str] | None = None,
    workers: int | None = None,  # processes that open files; None for one per core
    manifest_path: str | os.PathLike[str],
    deep: bool = False,
) -> Manifest:
    """Find the videos of a split, open each, and write their manifest.

    The first arguments are as for ``find_videos``, whose order is kept. A manifest that is there
    already says which files need not be opened again: readable ones of the same size and time of
    change. A scan that was interrupted leaves what it has found out beside it, for the next one.
    ``deep`` decodes every frame of every file, also of those that are known.

    A UserError is that of ``find_videos``, or says that the manifest is none, or not to be written.
    """
    names, entries = find_videos(root, split, annotations, layout, classes)
    known: dict[str, VideoRecord] = {}
    path = Path(manifest_path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    make_folder(str(path.parent), "the folder of the manifest")
    for file in () if deep else (path, unfinished):
        if file.exists():
            known |= {record.path: record for record in load_manifest(file).readable}
    manifest, saved = Manifest(Path(root).absolute(), names, []), time.monotonic()
    made = partial(_record, root=manifest.root, known=known, deep=deep, images=layout == IMAGES)
    try:
        for record in each_file(made, entries, f"scanning {split}", workers, _FILES_PER_WORKER):
            manifest.records.append(record)
            if not deep and time.monotonic() - saved > _SAVE_EVERY:
                manifest.save(unfinished)
                saved = time.monotonic()
    except BaseException:
        if not deep:
            manifest.save(unfinished)
        raise
    try:
        manifest.save(path)
        unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = f"cannot be written ({error_line(error)}): choose another place"
        raise UserError(f"the manifest {path} {reason}") from error
    return manifest


def _record(
    entry: tuple[str, int], *, root: Path, known: dict[str, VideoRecord], deep: bool, images: bool
) -> VideoRecord:
    """That of a file, made by opening it unless ``known`` has one that still holds."""
    record = VideoRecord(*entry)
    path = root / record.path
    with suppress(OSError):  # opening it says so again
        status = path.stat()
        record = replace(record, size=status.st_size, mtime_ns=status.st_mtime_ns)
    before = known.get(record.path)
    if before and (before.size, before.mtime_ns) == (record.size, record.mtime_ns):
        return replace(before, label=record.label)
    try:
        info = (probe_still if images else probe)(path, deep=deep)
    except VideoError as error:
        return replace(record, problem=str(error))
    problem = "has a single frame" if info.frames < 2 and not images else ""
    return replace(record, **asdict(info), problem=problem)
