"""Checkpoints that are never half-written and never half-fit the model they are loaded into."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys

from revdet.errors import UserError

# Layers whose shape is the number of classes; fine-tuning on other classes trains them anew.
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_head.predictor.")


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, atomic and strict.

    Args and methods as for ``DetectionCheckpointer``. Files are unpickled with
    ``weights_only=True``.

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
        content = {"model": self.model.state_dict(), **kwargs}
        content.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        partial = path.with_suffix(".pth.partial")
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint in ``last_checkpoint``, atomically too."""
        tag = Path(self.save_dir) / "last_checkpoint"
        partial = tag.with_name("last_checkpoint.partial")
        partial.write_text(last_filename_basename)
        partial.replace(tag)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; see ``DetectionCheckpointer.load``.

        Raises:
            UserError: the file is missing, is no checkpoint, or does not fit the model, which is
                then untouched.
        """
        if path and "://" not in path and not Path(path).is_file():
            raise UserError(f"checkpoint {path} does not exist: check the path")
        self._path = path
        result: dict[str, Any] = super().load(path, *args, **kwargs)
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
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"checkpoint {filename} cannot be read ({reason}): it is cut off, or no plain file "
                "of weights"
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
