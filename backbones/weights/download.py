"""Weights behind an address: a copy of them on this machine."""

from __future__ import annotations

import hashlib
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from os import PathLike
from pathlib import Path

import torch

from backbones.common import files
from backbones.weights.checkpoint import WeightsError

# Files of other projects to start from, by names of our own.
_FAIR = "https://dl.fbaipublicfiles.com"
_VITDET = f"{_FAIR}/detectron2/ViTDet/COCO/mask_rcnn_vitdet"
ZOO = {
    "mae_vit_base": f"{_FAIR}/mae/pretrain/mae_pretrain_vit_base.pth",
    "mae_vit_large": f"{_FAIR}/mae/pretrain/mae_pretrain_vit_large.pth",
    "mae_vit_huge": f"{_FAIR}/mae/pretrain/mae_pretrain_vit_huge.pth",
    "dinov2_vit_small": f"{_FAIR}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vit_base": f"{_FAIR}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vit_large": f"{_FAIR}/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "vitdet_base": f"{_VITDET}_b/f325346929/model_final_61ccd1.pkl",
    "vitdet_large": f"{_VITDET}_l/f325599698/model_final_6146ed.pkl",
    "vitdet_huge": f"{_VITDET}_h/f329145471/model_final_7224f1.pkl",
}

_TIMEOUT = 30.0  # seconds for a server to answer


def local_file(path_or_url: str | PathLike[str]) -> Path:
    """The file that is meant; see :func:`download` for an address, or a name of :data:`ZOO`."""
    source = ZOO.get(str(path_or_url), str(path_or_url))
    return download(source) if "://" in source else Path(source).expanduser()


def download(url: str) -> Path:
    """The file behind ``url`` (``http://``, ``https://``, ``file://``), downloaded once into
    ``torch.hub.get_dir()/checkpoints``.

    Beside the file lies its sha256 (``NAME.sha256``, as ``sha256sum`` writes it), recorded at
    the first use, since the publishers give none, and compared at every later one. A file put
    there by hand is used as if downloaded. Of several processes one downloads; the others wait.
    Shows its progress where stderr is a terminal.

    Raises:
        WeightsError: no such kind of address; no connection, or a download that breaks off (the
            message says where to put the file by hand); or a file that is no longer the one of
            the first use.
    """
    target = cached_path(url)
    if not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target):
                if not target.is_file():  # no other process was faster
                    _fetch(url, target)
        except (OSError, HTTPException, ValueError) as error:  # urllib's errors are OSErrors
            reason = getattr(error, "reason", None) or error
            raise WeightsError(
                f"cannot download {url} ({reason}); get it another way and put it at {target}"
            ) from error
    changed = files.has_other_checksum(target)
    if changed is None:
        with suppress(OSError):  # a folder that several users share may be read-only to this one
            files.write_checksum(target, files.checksum_of(target))
    elif changed:
        record = files.checksum_file(target).name
        remedy = "delete both to download it again"
        raise WeightsError(f"{target} is not the file of the checksum in {record}; {remedy}")
    return target


def cached_path(url: str) -> Path:
    """Where :func:`download` keeps the file of ``url``, which need not be there yet."""
    parts = urllib.parse.urlsplit(url)
    name = Path(urllib.parse.unquote(parts.path)).name
    if parts.scheme not in ("http", "https", "file") or not name:
        raise WeightsError(f"{url} is no address of a file (http://, https:// or file://)")
    if parts.netloc != "dl.fbaipublicfiles.com":
        # Two addresses may well end in the same name.
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        name = f"{Path(name).stem}-{digest}{Path(name).suffix}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait until no other process is in this context for the same file."""
    import fcntl  # not under Windows

    lock = target.with_name(f"{target.name}.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Who waits for it still gets it, and finds the file there. Only after a failure may
            # somebody make a new one and try at the same time, which does no harm.
            lock.unlink(missing_ok=True)


def _fetch(url: str, target: Path) -> None:
    # Asked for first, because torch.hub neither gives up on a silent server nor compares sizes.
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
        size = response.headers.get("Content-Length")
    with files.replacing(target) as partial:
        torch.hub.download_url_to_file(url, str(partial), progress=sys.stderr.isatty())
        received = partial.stat().st_size
        if size is not None and received != int(size):
            raise OSError(f"the connection broke off after {received} of {size} bytes")
