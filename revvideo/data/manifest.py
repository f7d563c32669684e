"""What a scan found out about a set of videos, in a text file that people can read and diff."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

from backbones.common.errors import UserError, error_line
from backbones.common.files import replacing

_FORMAT = "revvideo manifest 1"


@dataclass(frozen=True)
class VideoRecord:
    """One video file, with what :class:`revvideo.data.decode.VideoInfo` says about it."""

    path: str  # relative to the root of its manifest, or absolute
    label: int  # index into the classes; -1 if it is not known
    frames: int = 0
    duration: float = 0.0
    fps: float = 0.0
    width: int = 0
    height: int = 0
    problem: str = ""  # why the file cannot be used
    size: int = -1  # of the file when it was scanned, in bytes; -1 if absent
    mtime_ns: int = -1  # likewise
    index: str = ""


@dataclass(frozen=True)
class Manifest:
    """A set of videos."""

    root: Path  # the folder that relative paths start from
    classes: list[str]  # in the order of the labels
    records: list[VideoRecord]  # of each video that the set should have, also of those it lacks

    @property
    def readable(self) -> list[VideoRecord]:
        """The videos that can be opened."""
        return [record for record in self.records if not record.problem]

    @property
    def unreadable(self) -> list[VideoRecord]:
        """The videos that cannot, each with its ``problem``."""
        return [record for record in self.records if record.problem]

    @property
    def usable(self) -> list[VideoRecord]:
        """The videos that can be trained and tested on: readable, with a label."""
        return [record for record in self.readable if record.label >= 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file, whole or not at all, into a folder that is there.

        Its first line starts with ``#`` and holds root and classes as JSON; then come a line of
        column names and one line per video. ``pandas.read_csv(path, comment="#")`` reads it.
        """
        path = Path(path)
        header = {"format": _FORMAT, "root": str(self.root), "classes": self.classes}
        columns = [field.name for field in fields(VideoRecord)]
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            file.write(f"# {json.dumps(header, ensure_ascii=False)}\n")
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(vars, self.records))


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read what ``Manifest.save`` wrote; a UserError if it is not there, or no manifest."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header = json.loads(file.readline().removeprefix("#"))
            if header["format"] != _FORMAT:
                raise ValueError(f"its format is {header['format']!r}, not {_FORMAT!r}")
            kinds = get_type_hints(VideoRecord).items()
            records = [
                VideoRecord(**{name: kind(row[name]) for name, kind in kinds if name in row})
                for row in csv.DictReader(file)
            ]
            return Manifest(Path(header["root"]), list(header["classes"]), records)
    except OSError as error:
        reason = f"cannot be read ({error_line(error)}): write it with `python -m revvideo.scan`"
        raise UserError(f"the manifest {path} {reason}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"is no manifest ({error}): delete it, and scan the videos again"
        raise UserError(f"{path} {reason}") from error


def default_manifest(root: str | os.PathLike[str], split: str) -> Path:
    """Where the manifest of a split is kept unless the user says otherwise."""
    return Path(root) / f"manifest_{split}.csv"


def describe(manifest: Manifest, most: int | None = None) -> str:
    """How many videos of a manifest can be used, and why up to ``most`` of the others cannot."""
    readable, unreadable = manifest.readable, manifest.unreadable
    hours = sum(record.duration for record in readable) / 3600
    what, length = ("videos", f", {hours:.2f} hours") if hours or not readable else ("images", "")
    count = f"{len(readable):,} of {len(manifest.records):,} {what}"
    lines = [f"{count} can be used: {len(manifest.classes)} classes{length}"]
    lines += [f"  {record.path}: {record.problem}" for record in unreadable[:most]]
    if most is not None and len(unreadable) > most:
        lines.append(f"  and {len(unreadable) - most:,} more")
    return "\n".join(lines)
