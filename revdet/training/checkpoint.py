"""Checkpoints that are never half-written and never half-fit the model they are loaded into."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

import backbones
from backbones.common.errors import UserError, error_line
from backbones.weights.download import download
from revdet.models import find_trunk

logger = logging.getLogger("revdet")

# Layers whose shape is the number of classes; fine-tuning on other classes trains them anew.
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_head.predictor.")


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, atomic and strict.

    Args and methods as for ``DetectionCheckpointer``. Files are unpickled with
    ``weights_only=True``. Under ``"model"`` a file has the weights to evaluate and to predict
    with; a run that averages its weights keeps those that it trains under ``"training_model"``,
    which is the name of a checkpointable then.

    Attributes:
        strict: whether every weight of the model must be in the file, and no other. True to
            resume and to evaluate. False to start from pretrained weights: then the class layers
            may differ and weights may be missing, but none that is there may have another shape.
    """

    strict = True

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` under another name, then rename it: it is whole, or not there."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        self._write(name, {"model": self.model.state_dict(), **kwargs, **states})
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **facts: float) -> None:
        """Write ``<name>.pth`` with the weights to evaluate and ``facts``, not to resume from."""
        if self.save_dir and self.save_to_disk:
            self._write(name, {"model": self.model.state_dict(), **facts})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        partial = path.with_suffix(".pth.partial")
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint in ``last_checkpoint``, atomically too."""
        tag = Path(self.save_dir) / "last_checkpoint"
        partial = tag.with_name("last_checkpoint.partial")
        partial.write_text(last_filename_basename)
        partial.replace(tag)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, a file or an address; see ``DetectionCheckpointer.load``.

        Raises:
            UserError: the file is missing, is no checkpoint, or does not fit the model, which is
                then untouched.
        """
        self._path = fetch_weights(path)
        result: dict[str, Any] = super().load(self._path, *args, **kwargs)
        return result

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            content = torch.load(filename, map_location="cpu", weights_only=True)
        except (
            EOFError,
            OSError,
            RuntimeError,
            ValueError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            raise UserError(
                f"checkpoint {filename} cannot be read ({error_line(error)}): it is cut off, or no "
                "plain file of weights"
            ) from error
        weights = content.get("model", content) if isinstance(content, dict) else None
        if (
            not isinstance(weights, dict)
            or not weights
            or not all(isinstance(value, torch.Tensor) for value in weights.values())
        ):
            raise UserError(f"checkpoint {filename} holds no weights under 'model'")
        return content if "model" in content else {"model": content}

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        averaged = "training_model" in checkpoint
        if self.checkpointables and averaged != ("training_model" in self.checkpointables):
            raise UserError(
                f"checkpoint {self._path} is of a run with{'' if averaged else 'out'} averaged "
                "weights: resume it with the train.ema_decay that is in its config.yaml"
            )
        theirs = {key.removeprefix("module."): v for key, v in checkpoint.pop("model").items()}
        ours = self.model.state_dict()
        missing = [key for key in ours if key not in theirs]
        unexpected = [key for key in theirs if key not in ours]
        reshaped = [k for k in ours if k in theirs and ours[k].shape != theirs[k].shape]
        classes = []
        if not self.strict:
            classes = [key for key in reshaped if key.startswith(CLASS_LAYERS)]
            reshaped = [key for key in reshaped if key not in classes]
            theirs = {key: value for key, value in theirs.items() if key not in classes}
        nothing_fits = len(missing) == len(ours)
        if reshaped or nothing_fits or (self.strict and (missing or unexpected)):
            raise UserError(self._misfit(missing, unexpected, reshaped))
        self.model.load_state_dict(theirs, strict=False)
        if classes:
            self.logger.warning(f"trained anew, for other classes: {', '.join(classes)}")
        return _IncompatibleKeys(missing, unexpected, [])

    def _misfit(self, missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
        counts = [
            f"{len(keys)} weights {what} (first: {keys[0]})"
            for what, keys in (
                ("have another shape", reshaped),
                ("are missing", missing),
                ("are unknown to the model", unexpected),
            )
            if keys
        ]
        return (
            f"checkpoint {self._path} is of another architecture: {'; '.join(counts)}. Use the "
            "config it was trained with (config.yaml beside it)"
        )


def load_initial_weights(model: nn.Module, source: str) -> None:
    """Start a detector from pretrained weights, those of a detector or of its trunk alone.

    Which of them it is shows in the names of the weights. Of a detector the class layers may
    differ, and weights may be missing. A trunk's file is loaded by :func:`backbones.load_weights`:
    PySlowFast's layout, mmpretrain's or this package's; all of the trunk must be in it, and
    position embeddings are resized. What was loaded goes to the log.

    Args:
        model: the detector, on a :class:`revdet.models.TrunkBackbone` for a trunk's file.
        source: a file; or an address, which is downloaded once.

    Raises:
        UserError: the file cannot be had or read, or does not fit. The model is then untouched.
    """
    path = fetch_weights(source)
    if _is_of_detector(path, model):
        checkpointer = Checkpointer(model)
        checkpointer.strict = False
        checkpointer.load(path)
        return
    try:
        _, trunk = find_trunk(model)
        logger.info(f"trunk: {backbones.load_weights(trunk, path)}")
    except (ImportError, ValueError) as error:
        raise UserError(f"train.init_checkpoint: {error}") from error


def fetch_weights(source: str) -> str:
    """The path of the file that ``source`` names; an address is downloaded once.

    Raises:
        UserError: there is no such file, or it cannot be had.
    """
    try:
        path = str(download(source)) if "://" in source else source
    except backbones.WeightsError as error:
        raise UserError(f"checkpoint: {error}") from error
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} does not exist: check the path")
    return path


def _is_of_detector(path: str, model: nn.Module) -> bool:
    """Whether a file has weights under names that the detector has too."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # safetensors, or a damaged file, about which load_weights() says more
        return False
    weights = content.get("model", content) if isinstance(content, dict) else None
    return isinstance(weights, dict) and not weights.keys().isdisjoint(model.state_dict())
