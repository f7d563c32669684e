"""Weights behind an address: a copy of them on this machine."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import torch

from backbones.common.files import replacing
from backbones.weights.checkpoint import WeightsError

__all__ = ["download"]

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20


def download(url: str) -> Path:
    """The file behind ``url``, downloaded once into ``torch.hub.get_dir()/checkpoints``.

    Beside the file lies its sha256 (``NAME.sha256``, as ``sha256sum`` writes it), recorded at
    the first use, since the publishers give none, and compared at every later one. A file put
    there by hand is used as if downloaded. Shows its progress where stderr is a terminal.

    A download that breaks off goes on where it was, at once and, if that brings nothing more, at
    the next call, provided that the server can send a part of a file and still has the same one.
    Until it is complete it has another name (``NAME.part``), which one process writes at a time.

    Args:
        url: an address that starts with ``http://``, ``https://`` or ``file://``.

    Returns:
        the path of the file.

    Raises:
        WeightsError: no such kind of address; no connection, or a download that breaks off (the
            message says where to put the file by hand); or a file that is no longer the one of
            the first use.
    """
    target = cached_path(url)
    if not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch(url, target)
        except (OSError, HTTPException, ValueError) as error:  # urllib's errors are OSErrors
            reason = getattr(error, "reason", None) or error
            raise WeightsError(
                f"cannot download {url} ({reason}); get it another way and put it at {target}"
            ) from error
    _check_sha256(target)
    return target


def cached_path(url: str) -> Path:
    """Where :func:`download` keeps the file of ``url``. Downloads nothing.

    Raises:
        WeightsError: no such kind of address.
    """
    parts = urllib.parse.urlsplit(url)
    name = Path(urllib.parse.unquote(parts.path)).name
    if parts.scheme not in ("http", "https", "file") or not name:
        raise WeightsError(f"{url} is no address of a file (http://, https:// or file://)")
    if parts.netloc != "dl.fbaipublicfiles.com":
        # Two addresses may well end in the same name.
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        name = f"{Path(name).stem}-{digest}{Path(name).suffix}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _fetch(url: str, target: Path) -> None:
    with _opened_alone(target.with_name(f"{target.name}.part")) as file:
        if target.is_file():  # another process was faster
            return
        part = Path(file.name)
        # What tells the version of the file that the part is of.
        version = part.with_name(f"{part.name}.etag")
        before = 0
        while reason := _fetch_rest(url, file, version, target.name):
            size = part.stat().st_size
            if size <= before:
                raise OSError(f"{reason}; what has come is kept for the next try")
            before = size
        part.replace(target)
        version.unlink(missing_ok=True)


@contextmanager
def _opened_alone(part: Path) -> Iterator[IO[bytes]]:
    """``part``, open for appending, once no other process has it. Left empty, it is deleted."""
    import fcntl  # not under Windows

    while True:
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            opened = os.fstat(file.fileno())
            try:
                if not os.path.samestat(opened, part.stat()):
                    continue
            except FileNotFoundError:  # whoever had it has renamed or deleted it
                continue
            try:
                yield file
            finally:
                # By what is open here: after the end of a download the name may be another's.
                if os.fstat(file.fileno()).st_size == 0:
                    part.unlink(missing_ok=True)
            return


def _fetch_rest(url: str, file: IO[bytes], version: Path, name: str) -> str | None:
    """Append what is missing, or all of it to an empty file; return what broke it off."""
    start = file.seek(0, os.SEEK_END)
    headers = {}
    if start and version.exists():
        headers = {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if not headers or error.code != 416:
            raise
        file.truncate(0)  # there is no such rest: start over
        return _fetch_rest(url, file, version, name)
    with response:
        if not _continues(response, start):
            start = 0
            file.truncate(0)
            _keep_version(response, version)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        try:
            received = start + _copy(response, file, start, total, name)
        except (OSError, HTTPException) as error:
            return str(error) or type(error).__name__
    if total is not None and received != total:
        return f"the connection broke off after {received} of {total} bytes"
    return None


def _continues(response: Any, start: int) -> bool:
    """Whether a response is the rest of the file, from byte ``start`` on."""
    content_range = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    partial = getattr(response, "status", None) == 206  # of file:// there is none
    return partial and content_range is not None and int(content_range[1]) == start


def _keep_version(response: Any, version: Path) -> None:
    identity = response.headers.get("ETag", "W/")
    if identity.startswith("W/"):  # a weak one, which stands for other bytes too
        identity = response.headers.get("Last-Modified")
    if identity:
        version.write_text(identity)
    else:
        version.unlink(missing_ok=True)


def _copy(source: IO[bytes], target: IO[bytes], start: int, total: int | None, name: str) -> int:
    received = 0
    show = sys.stderr.isatty()
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        target.flush()
        received += len(chunk)
        if show:
            of_total = f" of {total / 1e6:.1f}" if total else ""
            done = (start + received) / 1e6
            print(f"\r{name}: {done:.1f}{of_total} MB", end="", file=sys.stderr)
    if show:
        print(file=sys.stderr)
    return received


def _check_sha256(path: Path) -> None:
    """Compare ``path`` with the checksum beside it, or record the checksum."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    actual = digest.hexdigest()
    record = path.with_name(path.name + ".sha256")
    if not record.exists():
        # A folder that several users share may be read-only to this one.
        with suppress(OSError), replacing(record) as partial:
            partial.write_text(f"{actual}  {path.name}\n")
    elif record.read_text().split()[:1] != [actual]:
        raise WeightsError(
            f"{path} is not the file of the checksum in {record.name}; delete both to download "
            "it again"
        )
