"""Files: written whole or not at all, found by what a user names."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from backbones.common.errors import UserError, error_line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path``; the file written there takes its place if no error ends the context.

    So ``path`` is never half a file, not even after a power cut, and of two processes that write it
    at once the later wins.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """A context in which no other process may have the same folder; a UserError if one has it.

    The operating system drops the lock when the process ends, however it does. Where it knows no
    locks (not POSIX, some network folders), there is none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{setting}={folder} is in use by a run that has not ended: wait for it or "
                    "stop it, or name another folder"
                ) from error
        yield


def remove_partials(folder: Path) -> None:
    """Remove what :func:`replacing` was writing when its process was killed."""
    for path in folder.glob("*.partial"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Give a damaged file another name, so that its place is free and nothing is lost."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number, aside = number + 1, path.with_name(f"{path.name}.damaged{number}")
    return path.replace(aside)


def checksum_file(path: Path) -> Path:
    """Where the checksum of a checkpoint stands, as ``sha256sum`` writes it."""
    return path.with_name(f"{path.name}.sha256")


def write_checksum(path: Path, checksum: str) -> None:
    """Write it beside ``path``."""
    with replacing(checksum_file(path)) as partial:
        partial.write_text(f"{checksum}  {path.name}\n")


def save_checkpoint(path: Path, content: Any, previous: Path | None = None) -> None:
    """Write by ``torch.save`` a file that is whole, or not there, and its checksum.

    The one before becomes ``previous``, if that is given. A UserError if it cannot be written.
    """
    try:
        with replacing(path) as partial:
            with partial.open("wb") as file:
                torch.save(content, file)
            checksum = checksum_of(partial)
            if previous is not None and path.is_file():
                checksum_file(previous).unlink(missing_ok=True)
                path.replace(previous)
                if checksum_file(path).is_file():
                    checksum_file(path).replace(checksum_file(previous))
        write_checksum(path, checksum)
    except (OSError, RuntimeError) as error:  # the latter by torch, on a full disk
        raise cannot_save(path, error) from error


def cannot_save(path: Path, error: BaseException) -> UserError:
    """The error for a checkpoint that cannot be written."""
    remedy = "make room, or the folder writable, and continue from the checkpoint before"
    return UserError(f"cannot save {path} ({error_line(error)}): {remedy} with --resume")


def has_other_checksum(path: Path) -> bool | None:
    """Whether a file is not what its checksum says; None if it has none."""
    checksum = checksum_file(path)
    if not checksum.is_file():
        return None
    return checksum.read_text(errors="replace").split()[:1] != [checksum_of(path)]


def checksum_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; of a folder, of the files' checksums."""
    digest = hashlib.sha256()
    if path.is_dir():
        for inside in sorted(path.iterdir()):
            digest.update(f"{checksum_of(inside)}  {inside.name}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def make_folder(path: str, setting: str) -> None:
    """Make the folder that a setting names, unless it is there; a UserError if it cannot."""
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
    except (OSError, ValueError) as error:
        reason = f"cannot be made or written to ({error_line(error)})"
        raise UserError(f"{setting}={path} {reason}: name another folder") from error


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file, all of it or nothing; makes its folder. NaN, which JSON has not, is null;
    an OSError says that it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), indent=indent)
    with replacing(path) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content if not isinstance(content, float) or math.isfinite(content) else None


def cut_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Rewrite a text file with the lines that are to be kept; does nothing if there is no file.

    For the metrics of a run that resumes: what an interrupted session logged later is logged again.
    A last line that a kill has cut off goes.
    """
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with replacing(path) as partial:
            kept = (line for line in lines if line.endswith("\n") and keep(line))
            partial.write_text("".join(kept), encoding="utf-8")


def find_files(
    arguments: Sequence[str],
    accepts: Callable[[Path], bool],
    what: str,
    *,
    option: str = "--input",
    passed_over: Path | None = None,
) -> list[Path]:
    """The files that are meant, in the order of the arguments and each once.

    Arguments are files, which may have any name; folders, which are searched in depth for files
    that ``accepts`` takes; and patterns (``*``, ``?``, ``[…]``, ``**``) of such. Files in
    ``passed_over``, the results of an earlier run, are not meant. An argument that names nothing is
    a UserError, which says by which ``option`` it came and ``what`` was looked for.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        exists = Path(argument).exists()
        matches = [argument] if exists else sorted(glob.glob(argument, recursive=True))
        name = f"{option} {printable(argument)}".lstrip()
        if not matches:
            raise UserError(f"{name}: no such file or folder, and nothing matches it")
        files: list[Path] = []
        for match in map(Path, matches):
            inside = (file for file in sorted(walk(match)) if accepts(file) and file.is_file())
            files += inside if match.is_dir() else [match]
        if passed_over is not None:
            own = passed_over.resolve()
            files = [file for file in files if own not in file.resolve().parents]
        if not files:
            besides = "" if passed_over is None else f", or only those in {passed_over}"
            raise UserError(f"{name}: holds no {what}{besides}")
        found.update(dict.fromkeys(files))
    return list(found)


def walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and the folders in it, sorted, without hidden ones.

    Links are followed, but those that lead to a folder a second time, or to one around ``folder``.
    """
    above = [os.stat(around) for around in folder.resolve().parents]
    seen = {(status.st_dev, status.st_ino) for status in above}
    for where, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (Path(where, name) for name in sorted(files) if name[0] != ".")


def read_class_names(file: str | os.PathLike[str], count: int) -> list[str]:
    """The names of ``count`` classes, one a line, from the file of the option ``--classes``."""
    try:
        names = Path(file).read_text(encoding="utf-8-sig").strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read as text in UTF-8 ({error_line(error)})"
        raise UserError(f"--classes {file} {reason}") from error
    if len(names) != count:
        given = f"--classes {file} names {len(names)} classes"
        raise UserError(f"{given}, the model's head has {count}")
    return [name.strip() for name in names]


def free_name(folder: Path, source: Path, suffix: str, taken: set[Path]) -> Path:
    """A file in ``folder``, which is made, for a drawing of ``source``: numbered if its name is
    ``taken``, and then taken itself."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = source.stem[:100]  # names have a limit, and numbers come behind
    file, number = folder / f"{stem}{suffix}", 2
    while file in taken:
        file, number = folder / f"{stem}_{number}{suffix}", number + 1
    taken.add(file)
    return file


def printable(path: str | os.PathLike[str]) -> str:
    """A path as it can be printed, even if its name is no valid Unicode."""
    return os.fsencode(path).decode(errors="backslashreplace")
