"""Checkpoint files: told apart by their content, read without running anything from them.

What is read is one of: a file of ``torch.save`` (PySlowFast, mmpretrain, or a plain state dict)
and a safetensors file. A file of ``torch.save`` is a pickle, so it is only ever loaded with
``weights_only=True``, which refuses everything but tensors and plain containers.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from backbones.common.errors import UserError, first_line, optional_import
from backbones.common.files import replacing

# Under which key the state dict lies in the files of PySlowFast, mmpretrain and Detectron2.
_CONTAINERS = ("model_state", "state_dict", "model")


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

    @property
    def cfg(self) -> str | None:
        """YAML text of the configuration that PySlowFast trained with, where there is one."""
        cfg = self.content.get("cfg")
        return cfg if isinstance(cfg, str) else None


def read_checkpoint(path: str | PathLike[str] | Checkpoint) -> Checkpoint:
    """Read a checkpoint file into memory, whatever its suffix; one that was read already stays.

    Raises:
        WeightsError: no file, or one that is empty, damaged, no checkpoint, or holds objects
            other than tensors and plain containers.
        ImportError: a safetensors file, and safetensors is not installed.
    """
    if isinstance(path, Checkpoint):
        return path
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            # A safetensors file starts with the length of its header, 8 bytes, which is JSON.
            if start[8:] == b"{":
                return _read_safetensors(path)
            if start:
                return _read_torch(path, file)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    raise WeightsError(f"{path} is empty")


def _read_safetensors(path: Path) -> Checkpoint:
    safetensors = optional_import("safetensors", "safetensors", f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Checkpoint(path, tensors, metadata=file.metadata() or {})
    except Exception as error:  # its own error class and OSError, by the kind of damage
        raise WeightsError(f"{path} is no valid safetensors file: {first_line(error)}") from error


def _read_torch(path: Path, file: IO[bytes]) -> Checkpoint:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
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
    container = next((key for key in _CONTAINERS if isinstance(content.get(key), dict)), None)
    tensors = content if container is None else content[container]
    if not tensors or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise WeightsError(f"{path} holds no state dict (names and tensors)")
    return Checkpoint(path, dict(tensors), content={} if container is None else content)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, all of it or nothing."""
    save = optional_import("safetensors.torch", "safetensors", f"writing {path}").save_file
    # Cloned, because tensors that share a storage cannot be written.
    own = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    with replacing(path) as partial:
        # Readers that follow the Hugging Face hub ask for this entry.
        save(own, partial, metadata={"format": "pt", **metadata})
