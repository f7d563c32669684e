"""Checkpoint files: told apart by their content, read without running anything from them.

What is read is one of: a file of ``torch.save``, a safetensors file or the index of several, and a
pickle of NumPy arrays (``pickles.py``). A file of ``torch.save`` is a pickle too, so it is only
ever loaded with ``weights_only=True``, which refuses everything but tensors and plain containers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import re
import sys
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from backbones.common.errors import UserError, first_line, optional_import, some_of
from backbones.common.files import has_other_checksum
from backbones.weights.pickles import load_arrays

# Under which key a state dict lies in people's files, and where averaged weights do.
_CONTAINERS = ("model_state", "state_dict", "model", "student", "module")
_AVERAGED = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "teacher")
# What torch.save writes before there were archives: the number that it begins with.
_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
# How files begin that are something else.
_NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: git lfs pull",
    b"<": "a web page, not the file itself: open the address in a browser",
}


class WeightsError(UserError):
    """Weights that cannot be had, read or loaded. The message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file, which is opened once and passed on like this."""

    path: Path
    tensors: dict[str, Tensor]  # the state dict, on the CPU, under the file's own names
    # What a safetensors file says besides its tensors.
    metadata: dict[str, str] = field(default_factory=dict)
    # All entries of a file of torch.save that has the state dict under one of them: of a run, say.
    content: dict[str, Any] = field(default_factory=dict)
    averaged: str | None = None  # under which key averaged weights lie beside these

    @property
    def cfg(self) -> str | None:
        """YAML text of the configuration that PySlowFast trained with, where there is one."""
        cfg = self.content.get("cfg")
        return cfg if isinstance(cfg, str) else None


def read_checkpoint(path: str | PathLike[str] | Checkpoint, ema: bool = False) -> Checkpoint:
    """Read a checkpoint file into memory, whatever its suffix; one that was read already stays.

    Args:
        path: the file; of safetensors in several files, the index (``….index.json``).
        ema: take the averaged weights where there are others too.

    Raises:
        WeightsError: no file, or one that is empty, damaged, no checkpoint, or holds objects
            other than tensors and plain containers; ``ema`` without averaged weights.
        ImportError: a safetensors file, and safetensors is not installed; arrays without NumPy.
    """
    if isinstance(path, Checkpoint):
        return path
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            start = file.read(32)
            file.seek(0)
            # A safetensors file starts with the length of its header, 8 bytes, which is JSON.
            if start[8:9] == b"{" and not start.lstrip().startswith(b"{"):
                return _read_safetensors(path)
            if start.lstrip().startswith(b"{"):
                return _read_index(path)
            if what := next((w for s, w in _NO_WEIGHTS.items() if start.startswith(s)), None):
                raise WeightsError(f"{path} is no checkpoint, but {what}")
            if start:
                return _read_pickle(path, file, start, ema)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    raise WeightsError(f"{path} is empty")


def _read_safetensors(path: Path) -> Checkpoint:
    safetensors = optional_import("safetensors", "weights", f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Checkpoint(path, tensors, metadata=file.metadata() or {})
    except Exception as error:  # its own error class and OSError, by the kind of damage
        raise WeightsError(f"{path} is no valid safetensors file: {first_line(error)}") from error


def _read_index(path: Path) -> Checkpoint:
    """Safetensors in several files; the index says in which of them each tensor lies."""
    try:
        places = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({Path(name).name for name in places.values()})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(f"{path} is no index of a safetensors checkpoint") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = path.with_name(name)
        if not file.is_file():
            raise WeightsError(f"{path} names {name}, which does not lie beside it")
        tensors |= _read_safetensors(file).tensors
    if absent := places.keys() - tensors.keys():
        raise WeightsError(f"{path} names tensors that are in no file: {some_of(sorted(absent))}")
    return Checkpoint(path, tensors)


def _read_pickle(path: Path, file: IO[bytes], start: bytes, ema: bool) -> Checkpoint:
    try:
        if start.startswith(b"PK") or _MAGIC in start:
            with torch.serialization.safe_globals(_harmless()):
                content = torch.load(file, map_location="cpu", weights_only=True)
        else:
            content = load_arrays(file)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        # Torch names the class or function that it refused to import.
        what = "is no checkpoint, or a damaged one"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            why = "which is not loaded because it could run code"
            what = f"holds more than tensors ({found[1]}), {why}"
        raise WeightsError(f"{path} {what}") from error
    except Exception as error:  # a damaged pickle or archive fails in any way
        reason = first_line(error)
        raise WeightsError(f"{path} is no checkpoint, or a damaged one: {reason}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no state dict but a {type(content).__name__}")
    return _state_dict_in(path, content, ema)


def _state_dict_in(path: Path, content: dict[str, Any], ema: bool) -> Checkpoint:
    nested = {key: content[key] for key in (*_CONTAINERS, *_AVERAGED) if key in content}
    nested = {key: value for key, value in nested.items() if isinstance(value, dict) and value}
    plain = next((key for key in _CONTAINERS if key in nested), None)
    averaged = next((key for key in _AVERAGED if key in nested), None)
    if ema and averaged is None and not any(map(_says_averaged, nested.get(plain or "", content))):
        raise WeightsError(f"{path} holds no averaged weights: leave ema out")
    container = averaged if plain is None or (ema and averaged) else plain
    tensors = content if container is None else nested[container]
    # Lightning's and others' have one more level.
    while isinstance(inner := tensors.get("state_dict", tensors.get("model")), dict) and inner:
        tensors = inner
    kinds = {(isinstance(k, str), isinstance(v, Tensor)) for k, v in tensors.items()}
    if kinds != {(True, True)}:
        raise WeightsError(f"{path} holds no state dict (names and tensors)")
    beside = averaged if container == plain else None
    content = {} if container is None else content
    return Checkpoint(path, dict(tensors), content=content, averaged=beside)


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint of a run, None if nothing is: by its checksum, or where it
    has none, by reading it."""
    if (other := has_other_checksum(path)) is not None:
        return "its checksum is another" if other else None
    if path.is_dir():
        return "it has no checksum"  # which is written before the folder gets its name
    try:
        read_checkpoint(path)
    except WeightsError as error:
        return first_line(error)
    return None


def _says_averaged(name: object) -> bool:
    return isinstance(name, str) and bool(re.search(r"(^|\.)(teacher|ema|averaged)", name))


def _harmless() -> list[Any]:
    """What lies beside the weights in people's files and can do nothing: options, plain numbers."""
    known: list[Any] = [argparse.Namespace]
    if numpy := sys.modules.get("numpy"):  # torch has imported it where it is installed
        scalar = importlib.import_module("numpy._core.multiarray").scalar
        known += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        known += [numpy.dtype, *map(type, map(numpy.dtype, "fdlqi?"))]
    return known
