"""The released weights: where they are published, and a copy of them on this machine."""

from __future__ import annotations

import hashlib
import sys
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO

import torch

from backbones.files import WeightsError, replacing

__all__ = ["RELEASED_WEIGHTS", "download"]

_PYSLOWFAST = "https://dl.fbaipublicfiles.com/pyslowfast/rev"

# The authors' files (PySlowFast's model zoo): ImageNet-1k, the last one Kinetics-400.
RELEASED_WEIGHTS: dict[str, str] = {
    "rev_vit_small": f"{_PYSLOWFAST}/REV_VIT_S.pyth",
    "rev_vit_base": f"{_PYSLOWFAST}/REV_VIT_B.pyth",
    "rev_mvit_base": f"{_PYSLOWFAST}/REV_MVIT_B.pyth",
    "rev_mvit_base_16x4": f"{_PYSLOWFAST}/REV_MVIT_B_16x4.pyth",
}

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20


def download(url: str) -> Path:
    """The file behind ``url``, downloaded once into ``torch.hub.get_dir()/checkpoints``.

    Beside the file lies its sha256 (``NAME.sha256``, as ``sha256sum`` writes it), recorded at
    the first use, since the publishers give none, and compared at every later one. A file put
    there by hand is used as if downloaded. Shows its progress where stderr is a terminal.

    Args:
        url: an address that starts with ``http://``, ``https://`` or ``file://``.

    Returns:
        the path of the file.

    Raises:
        WeightsError: no such kind of address; no connection, or a download that breaks off (then
            nothing stays behind, and the message says where to put the file by hand); or a file
            that is no longer the one of the first use.
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
    """Where :func:`download` keeps the file of ``url``. Downloads nothing."""
    parts = urllib.parse.urlsplit(url)
    name = Path(urllib.parse.unquote(parts.path)).name
    if parts.scheme not in ("http", "https", "file") or not name:
        raise WeightsError(f"{url} is no address of a file (http://, https:// or file://)")
    if url not in RELEASED_WEIGHTS.values():
        # Two addresses may well end in the same name.
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        name = f"{Path(name).stem}-{digest}{Path(name).suffix}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _fetch(url: str, target: Path) -> None:
    """Download to a file of another name, which becomes ``target`` once it is complete."""
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, replacing(target) as partial:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with partial.open("wb") as file:
            received = _copy(response, file, total, target.name)
        if total is not None and received != total:
            raise OSError(f"the connection broke off after {received} of {total} bytes")


def _copy(source: IO[bytes], target: IO[bytes], total: int | None, name: str) -> int:
    received = 0
    show = sys.stderr.isatty()
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        received += len(chunk)
        if show:
            of_total = f" of {total / 1e6:.1f}" if total else ""
            print(f"\r{name}: {received / 1e6:.1f}{of_total} MB", end="", file=sys.stderr)
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
