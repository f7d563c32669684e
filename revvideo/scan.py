"""Open every file of a set of videos, and write down which can be used and why the others cannot.

    python -m revvideo.scan datasets/motion                        # all splits that are there
    python -m revvideo.scan kinetics400 --split train val
    python -m revvideo.scan kinetics400 --split val --annotations k400/validate.csv
    python -m revvideo.scan UCF-101 --split train --annotations trainlist01.txt --layout folders

Files are opened in parallel. Each must hold at least two frames and not be cut off, and its first
frame must decode. The result, a CSV file, is `DATA/manifest_SPLIT.csv` or `--output`; where there
is one already, only files that have changed since, or could not be used, are opened again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbones.common.errors import UserError
from revvideo.data.decode import probe
from revvideo.data.layouts import Entries, Layout, find_videos, has_video_extension, splits_of
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
        workers: processes that open files; as many as there are cores if None.
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
    if workers is None:
        workers = os.cpu_count() or 1
    loader: DataLoader[VideoRecord] = DataLoader(
        files, batch_size=None, num_workers=min(workers, len(files) // _FILES_PER_WORKER)
    )
    records = list(tqdm(loader, desc=f"scanning {split}", unit="file", disable=None))
    manifest = Manifest(files.root, names, records)
    if manifest_path is not None:
        try:
            manifest.save(manifest_path)
        except OSError as error:
            raise UserError(
                f"the manifest {manifest_path} cannot be written ({error.strerror}): choose "
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
        try:
            status = path.stat()
        except OSError as error:
            reason = (
                "file is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
            )
            return VideoRecord(name, label, problem=reason)
        record = VideoRecord(name, label, size=status.st_size, mtime_ns=status.st_mtime_ns)
        known = self.known.get(name)
        if known and (known.size, known.mtime_ns) == (record.size, record.mtime_ns):
            return replace(known, label=label)
        try:
            info = probe(path)
        except VideoError as error:
            return replace(record, problem=error.reason)
        problem = ""
        if info.frames < 2:
            problem = "has a single frame"
        elif not has_video_extension(path):
            problem = f"is a video, but its extension {path.suffix!r} is not that of one: rename it"
        return replace(record, **asdict(info), problem=problem)


def describe(manifest: Manifest, most: int | None = None) -> str:
    """What a person wants to know about a manifest: how many videos can be used, why others cannot.

    One line for all readable videos, then one for each of those that are not, up to ``most``.
    """
    readable, unreadable = manifest.readable, manifest.unreadable
    hours = sum(record.duration for record in readable) / 3600
    lines = [
        f"{len(readable):,} of {len(manifest.records):,} videos can be used: "
        f"{len(manifest.classes)} classes, {hours:.2f} hours"
    ]
    named = unreadable[:most]
    lines += [f"  {record.path}: {record.problem}" for record in named]
    if len(named) < len(unreadable):
        lines.append(f"  and {len(unreadable) - len(named):,} more")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m revvideo.scan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", nargs="+", type=Path, metavar="DATA", help="folder of a set of videos")
    add("--split", nargs="+", help="train, val, ... (those of train, val and test that are there)")
    add("--annotations", type=Path, help="list or csv of one split; see revvideo/layouts.py")
    add("--layout", choices=get_args(Layout), default="auto", help="how the files lie (auto)")
    add("--workers", type=int, help="processes that open files (one per core)")
    add("--output", type=Path, help="manifest of one split (DATA/manifest_SPLIT.csv)")
    args = parser.parse_args(argv)
    one = len(args.data) == 1 and args.split is not None and len(args.split) == 1
    if not one and (args.annotations or args.output):
        parser.error("--annotations and --output go with one DATA and one --split")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers {args.workers}: use a number from 0 on")
    return args


def default_manifest(root: str | os.PathLike[str], split: str) -> Path:
    """Where the manifest of a split is kept unless the user says otherwise."""
    return Path(root) / f"manifest_{split}.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Scan, write manifests, and print what cannot be used and why. Returns the exit status."""
    args = parse_args(argv)
    try:
        for root in args.data:
            _scan_splits(root, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _scan_splits(root: Path, args: argparse.Namespace) -> None:
    classes = None
    for split in args.split or splits_of(root):
        path = args.output or default_manifest(root, split)
        manifest = scan(
            root,
            split,
            args.annotations,
            layout=args.layout,
            classes=classes,
            workers=args.workers,
            manifest_path=path,
        )
        classes = manifest.classes  # those of the first split, which is the training set
        print(f"{root}, {split}: {describe(manifest)}\nwrote {path}")


if __name__ == "__main__":
    sys.exit(main())
