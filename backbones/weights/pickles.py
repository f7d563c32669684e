"""Pickles of NumPy arrays, as Detectron2's zoo has them, read by an unpickler that runs nothing.

``pickle.load`` calls whatever a file names. This one knows containers, strings, numbers and arrays
of numbers, and builds the arrays itself; any other name is refused.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor

from backbones.common.errors import optional_import


class _Array:
    """An array as it comes: made empty, then given its state, like NumPy's own."""

    tensor: Tensor

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = _tensor(data, dtype, shape, "F" if fortran else "C")


class _DType:
    """A dtype by its text, which is looked up only once its state is known."""

    order: str | None = None

    def __init__(self, text: str, *_: object) -> None:
        self.text = text if isinstance(text, str) else "O"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else None


def _tensor(data: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> Tensor:
    numpy = optional_import("numpy", "weights", "reading a pickle of arrays")
    kind = numpy.dtype(dtype.text).newbyteorder(dtype.order or "=")
    if kind.kind not in "fiub" or not isinstance(data, bytes | bytearray):
        raise ValueError(f"it holds an array of {kind}, not of numbers")
    array = numpy.frombuffer(data, kind).reshape(shape, order=order)
    return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))


def _scalar(dtype: _DType, data: bytes) -> Tensor:
    return _tensor(data, dtype, (), "C")


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2 and protocols before 3 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"it holds text in {encoding}")
    return text.encode("latin-1")


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _KNOWN[_module, "_reconstruct"] = _Array
    _KNOWN[_module, "scalar"] = _scalar
for _module in ("numpy.core.numeric", "numpy._core.numeric"):  # protocol 5
    _KNOWN[_module, "_frombuffer"] = _tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("an entry outside of the file")


def load_arrays(file: IO[bytes]) -> Any:
    """What a pickle holds, its arrays as tensors. Needs NumPy.

    A ``pickle.UnpicklingError`` says that it names more than containers and arrays (``GLOBAL name``
    in the message, as torch has it); any other error, that it is damaged or holds an array of
    something else than numbers.
    """
    return _plain(_Unpickler(io.BytesIO(file.read()), encoding="latin1").load())


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.tensor
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value
