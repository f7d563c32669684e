"""Models whose weights are spread over the processes of a run (FSDP2), and what is kept of them."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.common.errors import UserError, error_line
from backbones.common.files import cannot_save, checksum_of, remove, write_checksum

STATE = "state.pth"  # in the folder of a sharded checkpoint, all but the sharded tensors


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: Any) -> None:
    """Give each process of a mesh its part of the weights: ``fully_shard``, in place.

    Each block, a module that is called by no other name than ``forward``, is a unit of its own, of
    which all weights are in one place while it runs, forwards or backwards; the rest is one unit,
    there from the forward to the end of the backward pass. So what is held between the two does not
    grow with the number of reversed blocks. ``model`` is the same on every process, which is not
    checked; ``mesh`` has one dimension (:func:`torch.distributed.device_mesh.init_device_mesh`).
    """
    from torch.distributed.fsdp import fully_shard  # late, as all of torch's sharding: 0.5 s

    # Nobody changes the outputs of our blocks in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A context in which every process has all weights, so that each can run the model alone.

    All processes enter it together; a model that is not sharded stays as it is. It is no place to
    train, and ``state_dict()`` ends it.
    """
    units = [unit for unit in model.modules() if hasattr(unit, "set_reshard_after_forward")]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
        unit.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)  # type: ignore[operator]
            unit.reshard()  # type: ignore[operator]


def is_sharded(value: object) -> bool:
    """Whether a tensor is, or of a module the parameters are, spread over processes."""
    if isinstance(value, nn.Module):
        value = next(value.parameters(), None)
    return hasattr(value, "full_tensor")


def gathered(state: Any, *, keep: bool) -> Any:
    """A state (tensors in dictionaries and lists) with whole tensors in memory of the CPU.

    All processes call it together, and those that do not ``keep`` it get None for the tensors.
    """

    def gather(value: Any, _: str) -> Any:
        if not is_sharded(value):
            return value
        full: Tensor = value.full_tensor()
        return full.cpu() if keep else None

    return _mapped(state, gather)


def spread(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has, if ``like`` is sharded; else all of it."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    there: Any = like
    value = value.to(there.device)
    # Every process has read it, so nothing is sent.
    return distribute_tensor(value, there.device_mesh, there.placements, src_data_rank=None)


def save_sharded(folder: Path, state: dict[str, Any]) -> None:
    """Write a state as a folder, whole or not at all, with its checksum beside it.

    All processes call this together, and each writes its part of the sharded tensors (torch's
    distributed checkpoint); the first one writes all else, into ``state.pth``. A UserError says
    that it cannot be written.
    """
    from torch.distributed import checkpoint

    parts: dict[str, Any] = {}

    def split(value: Any, path: str) -> Any:
        if not is_sharded(value):
            return value
        parts[path] = value
        return None

    rest, first = _mapped(state, split), dist.get_rank() == 0
    beginning = folder.with_name(f"{folder.name}.partial")
    if first:
        remove(beginning)
    dist.barrier()
    try:
        checkpoint.save(parts, checkpoint_id=beginning)
        if first:
            with (beginning / STATE).open("wb") as file:
                torch.save(rest, file)
                os.fsync(file.fileno())
            remove(folder)
            write_checksum(folder, checksum_of(beginning))
            beginning.replace(folder)
    except (OSError, RuntimeError, checkpoint.CheckpointException) as error:
        raise cannot_save(folder, error) from error
    dist.barrier()


def read_sharded(folder: Path, model: nn.Module) -> dict[str, Any]:
    """The state that :func:`save_sharded` has written, by however many processes.

    All processes call this together. Tensors are sharded over them if ``model`` is, and else whole.
    A UserError says that it is damaged, or something else.
    """
    from torch.distributed import checkpoint
    from torch.distributed.tensor import Shard, empty

    param: Any = next(model.parameters())
    make: Callable[..., Any] = torch.empty
    if is_sharded(param):
        make = partial(empty, device_mesh=param.device_mesh, placements=[Shard(0)])
    try:
        reader = _reader(folder)
        entries = reader.read_metadata().state_dict_metadata.items()
        tensors = {name: make(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        rest = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (Exception, checkpoint.CheckpointException) as error:
        raise UserError(f"checkpoint {folder} is damaged ({error_line(error)})") from error
    state: dict[str, Any] = _mapped(rest, lambda value, path: tensors.get(path, value))
    return state


def _reader(folder: Path) -> Any:
    """Torch's reader of distributed checkpoints; it would call whatever the index names."""
    from torch.distributed.checkpoint import FileSystemReader, metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    known: dict[str, Any] = {name: getattr(metadata, name) for name in metadata.__all__}
    known |= {"_MEM_FORMAT_ENCODING": metadata._MEM_FORMAT_ENCODING, "Size": torch.Size}
    known |= {"_StorageInfo": _StorageInfo, "_get_layout": lambda _: torch.strided}
    known |= {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
                return found
            if name in known and module.partition(".")[0] in ("torch", "pathlib"):
                return known[name]
            raise pickle.UnpicklingError(f"it names {module}.{name}")

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                found = Unpickler(file).load()
            entries, files = found.state_dict_metadata.values(), found.storage_data.values()
            if not all(type(entry) is metadata.TensorStorageMetadata for entry in entries):
                raise ValueError("it holds more than tensors")  # torch would unpickle those
            if any(os.sep in info.relative_path for info in files):
                raise ValueError("it names files elsewhere")
            found.storage_meta = found.storage_meta or metadata.StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    return Reader(folder)


def _mapped(value: Any, by: Callable[[Any, str], Any], path: str = "") -> Any:
    """``value`` with ``by(leaf, path)`` in the place of whatever is no dictionary or list in it."""
    if isinstance(value, dict):
        return {k: _mapped(v, by, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, by, f"{path}.{i}") for i, v in enumerate(value))
    return by(value, path)
