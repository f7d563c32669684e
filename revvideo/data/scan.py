"""Opening every video of a set, to find out which can be used."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbones.common.errors import UserError, error_line
from backbones.common.files import make_folder
from revvideo.data.decode import probe
from revvideo.data.layouts import Entries, Layout, find_videos
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
    workers: int | None = None,
    manifest_path: str | os.PathLike[str] | None = None,
    deep: bool = False,
) -> Manifest:
    """Find the videos of a split, and open each.

    Args:
        root, split, annotations, layout, classes: as for ``find_videos``, whose order is kept.
        workers: processes that open files; None for one per core.
        manifest_path: where to write the manifest. If it is there already, it says which files
            need not be opened again: readable ones of the same size and time of change. A scan
            that was interrupted leaves what it has found out beside it, for the next one.
        deep: decode every frame of every file, also of those that are known.

    A UserError is that of ``find_videos``, or says that the manifest is none, or not to be written.
    """
    names, entries = find_videos(root, split, annotations, layout, classes)
    known: dict[str, VideoRecord] = {}
    path = None if manifest_path is None else Path(manifest_path)
    unfinished = path and path.with_name(f"{path.name}.unfinished")
    if path and unfinished:
        make_folder(str(path.parent), "the folder of the manifest")
        for file in () if deep else (path, unfinished):
            if file.exists():
                known |= {record.path: record for record in load_manifest(file).readable}
    files = _Files(Path(root).absolute(), entries, known, deep, layout == IMAGES)
    most = (os.cpu_count() or 1) if workers is None else workers
    workers = min(most, len(files) // _FILES_PER_WORKER)
    loader: DataLoader[VideoRecord] = DataLoader(files, batch_size=None, num_workers=workers)
    manifest, saved = Manifest(files.root, names, []), time.monotonic()
    try:
        for record in tqdm(loader, desc=f"scanning {split}", unit="file", disable=None):
            manifest.records.append(record)
            if unfinished and not deep and time.monotonic() - saved > _SAVE_EVERY:
                manifest.save(unfinished)
                saved = time.monotonic()
    except BaseException:
        if unfinished and not deep:
            manifest.save(unfinished)
        raise
    if path and unfinished:
        try:
            manifest.save(path)
            unfinished.unlink(missing_ok=True)
        except OSError as error:
            reason = f"cannot be written ({error_line(error)}): choose another place"
            raise UserError(f"the manifest {path} {reason}") from error
    return manifest


@dataclass
class _Files(Dataset[VideoRecord]):
    """The record of each file, made by opening it unless ``known`` has one that still holds."""

    root: Path
    entries: Entries
    known: dict[str, VideoRecord]
    deep: bool
    images: bool

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> VideoRecord:
        name, label = self.entries[index]
        path = self.root / name
        record = VideoRecord(name, label)
        with suppress(OSError):  # opening it says so again
            status = path.stat()
            record = replace(record, size=status.st_size, mtime_ns=status.st_mtime_ns)
        known = self.known.get(name)
        if known and (known.size, known.mtime_ns) == (record.size, record.mtime_ns):
            return replace(known, label=label)
        try:
            info = (probe_still if self.images else probe)(path, deep=self.deep)
        except VideoError as error:
            return replace(record, problem=error.reason)
        problem = "has a single frame" if info.frames < 2 and not self.images else ""
        return replace(record, **asdict(info), problem=problem)
