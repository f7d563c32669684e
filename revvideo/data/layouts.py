"""Where a labelled set of videos has its files, in the layouts that people keep Kinetics in.

PyTorchVideo's ``LabeledVideoPaths`` sees mp4 and avi files only, and names no wrong line of a list.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

from backbones.common.errors import UserError, near_names, some_of
from backbones.common.files import walk

Layout = Literal["auto", "folders", "list", "csv", "images"]
Entries = list[tuple[str, int]]  # path and label
_Named = list[tuple[str, str]]  # path and class
_Classes = Sequence[str] | None  # their names, where they are known
_Found = tuple[list[str], Entries]  # the names of the classes, and the videos

_VIDEO_NAME = re.compile(
    r".*\.(3gp|avi|flv|m2ts|m4v|mkv|mov|mp4|mpe?g|mts|ogv|ts|vob|webm|wmv)", re.IGNORECASE
)
_LABELS = range(-1, 100_000)  # the largest in a list says how many classes there are
_NUMBER = re.compile(r"-?\d+")
# A line of words alone, none of which could be a path.
_HEADER = re.compile(r"[\w\s,\"-]*[a-z][\w\s,\"-]*", re.IGNORECASE)
_SPLIT_NAMES = {"validation": "val", "validate": "val", "valid": "val", "testing": "test"}
_logger = logging.getLogger(__name__)


def find_videos(
    root: str | os.PathLike[str],
    split: str,
    annotations: str | os.PathLike[str] | None = None,
    layout: Layout = "auto",
    classes: Sequence[str] | None = None,
) -> _Found:
    """The classes of a set, and path and label of each of its videos.

    Layouts:

    - ``folders``: ``root/split/class/…/file``. With ``annotations``, a text file with one path per
      line, relative to a folder of class folders, just those files (UCF101: ``root/class/file`` and
      ``trainlist01.txt``); what follows the path in a line is not used.
    - ``list``: a text file of ``path label`` or ``path,label`` lines (PySlowFast), in
      ``annotations`` or else ``root/split.csv`` or ``.txt``. Labels count from 0, or are names.
      Quotes around them, and a line of column names, are allowed.
    - ``csv``: the annotations of Kinetics, ``label,youtube_id,time_start,time_end,split``, in
      ``annotations`` or else ``root/split.csv`` or ``root/annotations/split.csv``. Files lie
      anywhere in ``root/split`` (or else ``root``), named ``youtube_id_000010_000020.mp4``.
    - ``images``: as ``folders``, of images; see :func:`revvideo.data.stills.find_stills`.
    - ``auto``: ``folders`` if ``root/split`` holds folders with no ``annotations`` given, else what
      the first line of the annotations looks like.

    ``classes`` are the names that labels stand for, where they are known: of the training set, when
    this is the validation set. Otherwise they are found and sorted by name, with ``_`` taken for a
    space, which for Kinetics is the order of the released weights.

    Paths are relative to ``root`` (absolute if outside of it); labels -1 where the annotations give
    none. A file that the annotations name is among them also when it is missing. A UserError says
    that nothing is found, that annotations cannot be read, or that a class is not in ``classes``.
    """
    root = _existing_folder(root)
    if layout == "images":
        from revvideo.data.stills import find_stills  # late, for what scan --help need not have

        return find_stills(root, split, classes)
    file = annotation_file(root, split, annotations, layout)
    if layout == "auto":
        layout = "folders" if file is None else _guess_layout(root, split, file)
    if file is None and layout != "folders":
        tried = ", ".join(_candidates(split))
        raise UserError(f"no annotations for split {split!r} in {root}: tried {tried}; name yours")
    readers: dict[str, Callable[..., _Found]]
    readers = {"folders": _folders, "list": _listed, "csv": _kinetics}
    names, entries = readers[layout](root, split, file, classes)
    if not entries:
        raise UserError(f"split {split!r} of {root} holds no video: check the folder and the split")
    return names, entries


def has_video_extension(path: Path) -> bool:
    """Whether the name of a file is that of a video."""
    return _VIDEO_NAME.fullmatch(path.name) is not None


def splits_of(root: str | os.PathLike[str]) -> list[str]:
    """Those of train, val, test that ``find_videos`` finds something for; a UserError if none."""
    root = _existing_folder(root)
    usual = ("train", "val", "test")
    found = [s for s in usual if _subfolders(root / s) or annotation_file(root, s, None)]
    if not found:
        raise UserError(f"{root} holds none of the splits {', '.join(usual)}: name yours, --split")
    return found


def _candidates(split: str) -> list[str]:
    return [f"{folder}{split}.{ext}" for folder in ("", "annotations/") for ext in ("csv", "txt")]


def annotation_file(
    root: Path, split: str, annotations: str | os.PathLike[str] | None, layout: Layout = "auto"
) -> Path | None:
    """The file that ``find_videos`` would read; None: folders alone say what there is."""
    if annotations is not None:
        for file in (Path(annotations), root / annotations):
            if file.is_file():
                return file
        raise UserError(f"the annotations {annotations} do not exist: check the path")
    if layout == "folders" or (layout == "auto" and _subfolders(root / split)):
        return None
    candidates = (root / name for name in _candidates(split))
    return next((file for file in candidates if file.is_file()), None)


def _guess_layout(root: Path, split: str, file: Path) -> Layout:
    lines = [line for _, line in _lines(file)]
    if lines and "youtube_id" in lines[0].split(","):
        return "csv"
    rows = [_row(line) for line in lines]
    if not any(rows[:2]):  # the first line may name the columns
        return "folders"
    # UCF101's lists: each label, counted from 1, is a folder of its own, which names the class.
    folders = {(label, Path(path).parts[0]) for path, label in filter(None, rows)}
    labels, named = ({pair[i] for pair in folders} for i in (0, 1))
    base = root / split if _subfolders(root / split) else root
    if "0" not in labels and len(labels) == len(named) == len(folders):
        return "folders" if named <= set(_subfolders(base)) else "list"
    return "list"


def _row(line: str) -> tuple[str, str] | None:
    """Path and label of a line of a list; None if it has no label, or more behind it."""
    number = re.fullmatch(r"(.*?)(?:\s+|\s*,\s*)\"?(-?\d+)(?:\.0*)?\"?", line)
    name = re.fullmatch(
        rf"\"?({_VIDEO_NAME.pattern})\"?(?:\s+|\s*,\s*)(?P<label>\".+\"|[^,]+)", line, re.I
    )
    if found := number or name:
        return found[1].strip('" '), (found[2] if number else found["label"]).strip('" ')
    return None


def _existing_folder(root: str | os.PathLike[str]) -> Path:
    if not Path(root).is_dir():
        raise UserError(f"the folder {root} does not exist: give the one that holds your videos")
    return Path(root)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]


def _order(name: str) -> str:
    return name.replace("_", " ").strip()


def _labelled(named: _Named, found: Collection[str], classes: _Classes, where: Path) -> _Found:
    """The classes, and videos with labels in the place of names; -1 in that of an empty one."""
    names = list(sorted(found, key=_order) if classes is None else classes)
    known = {_order(name): label for label, name in enumerate(names)}
    for name in sorted(found):
        if _order(name) not in known:
            near = some_of(near_names(name, names) or names)
            none = f"is none of the {len(names)} classes of the model, such as {near}"
            raise UserError(f"class {name!r} in {where} {none}: rename it, or take it out")
    return names, [(path, known[_order(name)] if name else -1) for path, name in named]


def _folders(root: Path, split: str, file: Path | None, classes: _Classes) -> _Found:
    base = root / split
    if not _subfolders(base):
        if file is None:
            there = ", ".join(sorted(_subfolders(root))) or "no folders"
            lacks = f"and {root} no annotations ({', '.join(_candidates(split))}); it holds {there}"
            raise UserError(f"{base} holds no folders of classes, {lacks}: check the folder")
        base = root
    found = sorted(_subfolders(base), key=_order)
    named = []
    if file is not None:
        for number, line in _lines(file):
            path = re.sub(r"[\s,]-?\d+$", "", line).rstrip()
            name = Path(path).parts[0]
            if name not in found:
                raise UserError(f"{file}, line {number}: {base} has no folder {name!r} for {path}")
            named.append((_place(root, split, os.path.relpath(base / path, root)), name))
        return _labelled(named, found, classes, file)
    others: Counter[str] = Counter()
    for name in found:
        for each in walk(base / name):
            if has_video_extension(each):
                named.append((str(each.relative_to(root)), name))
            else:
                others[each.suffix] += 1
    if others:
        counts = ", ".join(f"{count:,} with {suffix!r}" for suffix, count in others.items())
        _logger.warning("%s: passed over files without the extension of a video, %s", base, counts)
    return _labelled(named, found, classes, root / split)


def _kinetics(root: Path, split: str, file: Path, classes: _Classes) -> _Found:
    rows = list(csv.DictReader(io.StringIO(_text(file))))
    missing = {"youtube_id", "time_start", "time_end"} - set(rows[0] if rows else ())
    if missing:
        raise UserError(f"{file} has no column {', '.join(sorted(missing))}")
    if splits := {_canonical(row["split"]) for row in rows if row.get("split")}:
        if _canonical(split) not in splits:
            raise UserError(f"{file} has no split {split!r}, only {', '.join(sorted(splits))}")
        rows = [row for row in rows if _canonical(row["split"]) == _canonical(split)]
    base = root / split if (root / split).is_dir() else root
    files = {path.stem: path for path in walk(base) if has_video_extension(path)}
    named = []
    for row in rows:
        name = row["youtube_id"]
        try:
            start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
        except (TypeError, ValueError) as error:  # TypeError: the line ends before it
            raise UserError(f"{file}: the time of {name} is no number ({error})") from error
        stem = f"{name}_{start:06d}_{end:06d}"
        path = files.get(stem) or files.get(name) or base / f"{stem}.mp4"
        named.append((str(path.relative_to(root)), row.get("label") or ""))
    return _labelled(named, {label for _, label in named if label}, classes, file)


def _canonical(split: str) -> str:
    return _SPLIT_NAMES.get(split.lower(), split.lower())


def _listed(root: Path, split: str, file: Path, classes: _Classes) -> _Found:
    rows = [(f"{file}, line {number}", line, _row(line)) for number, line in _lines(file)]
    _, first, row = rows[0] if rows else ("", "", None)
    if _HEADER.fullmatch(first) and (row is None or not _NUMBER.fullmatch(row[1])):
        _logger.info("%s: the first line, %r, is taken for the names of columns", *rows.pop(0)[:2])
    numbers = [bool(row and _NUMBER.fullmatch(row[1])) for *_, row in rows]
    for (where, line, row), number in zip(rows, numbers, strict=True):
        if row is None or number != numbers[0] or (number and int(row[1]) not in _LABELS):
            form = "`path label`, labels counting from 0 or names (in quotes, if they have commas)"
            raise UserError(f"{where}: {line[:200]!r} is not {form}")
    named = [(_place(root, split, row[0]), row[1]) for *_, row in rows if row is not None]
    counts = Counter(path for path, _ in dict.fromkeys(named))
    if several := [path for path, count in counts.items() if count > 1]:
        _logger.warning("%s: of several labels each: %s", file, some_of(several))
    if not all(numbers):
        return _labelled(named, {name for _, name in named}, classes, file)
    entries = [(path, int(label)) for path, label in named]
    if classes is None:
        names = _names_of(entries)
        if without := sorted(set(range(len(names))) - {label for _, label in entries}):
            absent = f"no video has the label {some_of([str(label) for label in without])}"
            count = f"labels count from 0, to {len(names) - 1} here"
            _logger.warning(f"{file}: {absent}: it is a class that is never seen; {count}")
        return names, entries
    for (where, _, _), (_, label) in zip(rows, entries, strict=True):
        if label >= len(classes):
            raise UserError(f"{where}: label {label} with the {len(classes)} classes of the model")
    return list(classes), entries


def _place(root: Path, split: str, path: str) -> str:
    """Where a listed file is; also as mp4 instead, as ``revvideo.transcode`` writes it."""
    as_mp4 = [str(Path(path).with_suffix(".mp4"))] if has_video_extension(Path(path)) else []
    for name in (path, *as_mp4):
        for place in (name, os.path.join(split, name)):
            if os.path.exists(root / place):  # not Path.exists, to which a name can be too long
                return place
    return path


def _names_of(entries: Entries) -> list[str]:
    """A name for each label: that of the folder of its videos, if each has one of its own."""
    folders = {(label, Path(path).parent.name) for path, label in entries}
    labels, names = {label for label, _ in folders}, {name for _, name in folders}
    own = dict(folders) if len(labels) == len(names) == len(folders) and "" not in names else {}
    return [own.get(label, str(label)) for label in range(max(labels, default=-1) + 1)]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error})") from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            yield number, line.strip()
