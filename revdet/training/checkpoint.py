"""Checkpoints that are never half-written and never half-fit the model they are loaded into."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import Tensor, nn

from backbones.common import files, sharding
from backbones.common.errors import UserError, first_line
from backbones.weights.checkpoint import Checkpoint, damage_of, read_checkpoint
from backbones.weights.loading import load_checkpoint
from revdet.models import find_trunk
from revdet.training.weights import SHARDED, fetch_weights, for_detector

logger = logging.getLogger("revdet")

# Layers whose shape is the number of classes; fine-tuning on other classes trains them anew.
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_head.predictor.")
FINAL = "model_final"  # the name of the checkpoint at the end


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, atomic and strict.

    Args and methods as for ``DetectionCheckpointer``. No code in a file is run. Under ``"model"`` a
    file has the weights to evaluate and to predict with; a run that averages its weights keeps
    those that it trains under ``"training_model"``, which is the name of a checkpointable then.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth``, whole or not at all, and make it the one to resume from.

        All processes call this and the other one, and the main one writes. Of a sharded model each
        writes its part, into a folder ``<name>.dcp``, but for the final checkpoint.
        """
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        if sharding.is_sharded(self.model) and name != FINAL:
            folder = Path(self.save_dir) / f"{name}{SHARDED}"
            self.logger.info(f"Saving checkpoint to {folder}")
            sharding.save_sharded(folder, {"model": self.model.state_dict(), **kwargs, **states})
            if self.save_to_disk:
                self.tag_last_checkpoint(folder.name)
        elif self.save_weights(name, **kwargs, **states):
            self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **more: Any) -> bool:
        """Write ``<name>.pth``: the weights to evaluate, and ``more``; False where others do."""
        content = {"model": self.model.state_dict(), **more}
        if sharding.is_sharded(self.model):
            content = sharding.gathered(content, keep=self.save_to_disk)
        if not self.save_dir or not self.save_to_disk:
            return False
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        files.save_checkpoint(path, content)
        return True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint in ``last_checkpoint``, atomically too."""
        with files.replacing(Path(self.save_dir) / "last_checkpoint") as partial:
            partial.write_text(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, a file or an address; see ``DetectionCheckpointer.load``.

        Every weight of the model must be in it, and no other. A UserError says that the file is
        missing, is no checkpoint, or does not fit the model, which is then untouched.
        """
        self._path = fetch_weights(path)
        inside = self._path / sharding.STATE if self._path.is_dir() else self._path
        try:
            return super().load(str(inside), *args, **kwargs)
        except UserError:
            raise
        except ValueError as error:  # by the optimizer
            groups = f"is of other groups of parameters ({first_line(error)})"
            remedy = "resume with the optimizer.params, such as layer_decay, in its config.yaml"
            raise UserError(f"the state of the optimizer in {path} {groups}: {remedy}") from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        if self._path.is_dir():
            return sharding.read_sharded(self._path, self.model)
        checkpoint = read_checkpoint(filename)
        return {**checkpoint.content, "model": for_detector(self.model, checkpoint, exact=True)}

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        averaged = "training_model" in checkpoint
        if self.checkpointables and averaged != ("training_model" in self.checkpointables):
            kind = f"a run with{'' if averaged else 'out'} averaged weights"
            remedy = "resume it with the train.ema_decay that is in its config.yaml"
            raise UserError(f"checkpoint {self._path} is of {kind}: {remedy}")
        return self._copy(checkpoint.pop("model"), self._path, strict=True)

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Start from a detector: class layers may differ, weights be missing; else a UserError."""
        tensors = for_detector(self.model, checkpoint, exact=False)
        self._log_incompatible_keys(self._copy(tensors, checkpoint.path, strict=False))

    def _copy(self, tensors: dict[str, Tensor], path: Path, *, strict: bool) -> _IncompatibleKeys:
        ours = self.model.state_dict()
        missing = [key for key in ours if key not in tensors]
        unexpected = [key for key in tensors if key not in ours]
        reshaped = [k for k in ours if k in tensors and ours[k].shape != tensors[k].shape]
        anew = [key for key in reshaped if not strict and key.startswith(CLASS_LAYERS)]
        reshaped = [key for key in reshaped if key not in anew]
        if reshaped or len(missing) == len(ours) or (strict and (missing or unexpected)):
            kinds = {"have another shape": reshaped, "are missing": missing}
            kinds["are unknown to the model"] = unexpected
            counts = [f"{len(k)} weights {what} (first: {k[0]})" for what, k in kinds.items() if k]
            wrong = f"checkpoint {path} is of another architecture: {'; '.join(counts)}"
            raise UserError(f"{wrong}. Use the config it was trained with (config.yaml beside it)")
        fitting = [key for key in tensors if key in ours and key not in anew]
        state = {key: sharding.spread(tensors[key], ours[key]) for key in fitting}
        self.model.load_state_dict(state, strict=False)
        if anew:
            self.logger.warning(f"trained anew, for other classes: {', '.join(anew)}")
        return _IncompatibleKeys(missing, unexpected, [])


def periodic_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that a run has saved on its way, oldest first."""
    kinds = (".pth", SHARDED)
    return sorted(p for kind in kinds for p in output_dir.glob("model_" + 7 * "[0-9]" + kind))


def _saved_in(output_dir: Path) -> list[Path]:
    """The checkpoints that a run can be resumed from, whole or not, newest first."""
    return [*output_dir.glob(f"{FINAL}.pth"), *periodic_checkpoints(output_dir)[::-1]]


def holds_a_run(output_dir: Path) -> str:
    """The name of a checkpoint in a folder, whole or not; empty if there is none."""
    found = [*_saved_in(output_dir), *output_dir.glob("last_checkpoint")]
    return found[0].name if found else ""


def checkpoint_to_resume(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; None if it has saved none.

    It is the one that ``last_checkpoint`` names, unless that or the file itself is damaged: then
    the newest one that is not, and the log says so. If all are damaged, a UserError does.
    """
    tag, known = output_dir / "last_checkpoint", _saved_in(output_dir)
    named = output_dir / tag.read_text(errors="replace").strip() if tag.is_file() else tag
    if named in known or (named.suffix == ".pth" and named.is_file()):
        known = [*dict.fromkeys([named, *known])]
    elif known:
        what = "names no checkpoint" if tag.is_file() else "is missing"
        logger.warning(f"{tag} {what}: continuing from {known[0].name}, the newest beside it")
    for path in known:
        if (reason := damage_of(path)) is None:
            return path
        logger.warning(f"{path} is damaged ({reason}): trying the one before")
    if known:
        wrong = f"all checkpoints in {output_dir} are damaged, the newest is {known[0].name}"
        raise UserError(f"{wrong}: set train.output_dir to a new folder")
    return None


def load_initial_weights(model: nn.Module, source: str) -> None:
    """Start a detector from pretrained weights, those of a detector or of its trunk alone.

    Which of them it is shows in the names of the weights. Those of a detector are loaded as by
    :meth:`Checkpointer.start_from`, those of a trunk as by :func:`backbones.load_weights`, into
    the :class:`revdet.models.TrunkBackbone` of the model. What was loaded goes to the log. A
    UserError says why the file cannot be had or read, or does not fit; the model is then untouched.
    """
    path = fetch_weights(source)
    if path.is_dir():
        remedy = f"start from a model_best.pth or {FINAL}.pth"
        raise UserError(f"{path} is of a run that goes on: {remedy}")
    try:
        checkpoint = read_checkpoint(path)
        names = {name.removeprefix("module.") for name in checkpoint.tensors}
        if names.isdisjoint(model.state_dict()):
            _, trunk = find_trunk(model)
            logger.info(f"trunk: {load_checkpoint(trunk, checkpoint, str(path))}")
        else:
            Checkpointer(model).start_from(checkpoint)
    except (ImportError, ValueError) as error:
        raise UserError(f"train.init_checkpoint: {error}") from error
