"""Opening every video of a set, to find out which can be used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbones.common.errors import UserError, error_line
from revvideo.data.decode import probe
from revvideo.data.layouts import Entries, Layout, find_videos
from revvideo.data.manifest import Manifest, VideoRecord, load_manifest
from revvideo.errors import VideoError

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
) -> Manifest:
    """Find the videos of a split, and open each.

    Args:
        root, split, annotations, layout, classes: as for ``find_videos``.
        workers: processes that open files; None for one per core.
        manifest_path: where to write the manifest. If it is there already, it says which files
            need not be opened again: readable ones of the same size and time of change.

    Returns:
        The manifest; videos in the order in which ``find_videos`` gives them.

    Raises:
        UserError: as ``find_videos``; ``manifest_path`` is no manifest, or cannot be written.
    """
    names, entries = find_videos(root, split, annotations, layout, classes)
    known: dict[str, VideoRecord] = {}
    if manifest_path is not None and Path(manifest_path).exists():
        before = load_manifest(manifest_path)
        if before.root == Path(root).absolute():
            known = {record.path: record for record in before.readable}
    files = _Files(Path(root).absolute(), entries, known)
    most = (os.cpu_count() or 1) if workers is None else workers
    workers = min(most, len(files) // _FILES_PER_WORKER)
    loader: DataLoader[VideoRecord] = DataLoader(files, batch_size=None, num_workers=workers)
    records = list(tqdm(loader, desc=f"scanning {split}", unit="file", disable=None))
    manifest = Manifest(files.root, names, records)
    if manifest_path is not None:
        try:
            manifest.save(manifest_path)
        except OSError as error:
            raise UserError(
                f"the manifest {manifest_path} cannot be written ({error_line(error)}): choose "
                "another place"
            ) from error
    return manifest


class _Files(Dataset[VideoRecord]):
    """The record of each file, made by opening it unless ``known`` has one that still holds."""

    def __init__(self, root: Path, entries: Entries, known: dict[str, VideoRecord]) -> None:
        self.root = root
        self.entries = entries
        self.known = known

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
            info = probe(path)
        except VideoError as error:
            return replace(record, problem=error.reason)
        problem = "has a single frame" if info.frames < 2 else ""
        return replace(record, **asdict(info), problem=problem)
