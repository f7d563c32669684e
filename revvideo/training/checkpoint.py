"""The checkpoints of a run: opened once to continue from, and written whole."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf

from backbones.common.errors import UserError
from backbones.common.files import remove_partials, save_checkpoint
from backbones.weights.checkpoint import WeightsError, damage_of, read_checkpoint
from revvideo.settings import Config
from revvideo.training.weights import CLASSES

logger = logging.getLogger("revvideo")

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

_STEP = "global_step"  # Lightning's entry: steps of the optimizer taken


class CheckpointIO(TorchCheckpointIO):
    """How Lightning reads and writes the checkpoints of a run.

    ``before`` is the one to continue from, or None. It is read here (a UserError says that it is
    damaged, or something else), and kept until Lightning asks for it if it is to ``hand_out``.
    """

    def __init__(self, before: Path | None, *, hand_out: bool) -> None:
        content: dict[str, Any] = {}
        if before is not None:
            try:
                content = read_checkpoint(before).content
            except WeightsError as error:
                raise UserError(f"{error}: move it away to train from the beginning") from error
            if not {CLASSES, _STEP} <= content.keys():
                raise UserError(f"{before} is no checkpoint of a run: move it away")
        self.step = int(content.get(_STEP, 0))
        self.classes: list[str] = content.get(CLASSES, [])
        self.averaged = "averaging_state" in content
        self._recipe = OmegaConf.create(content.get("config", ""))  # of the run, as it was
        self._content = content if hand_out else {}

    def changed(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """The keys of a recipe that are not as they were in the run: their values now and then."""
        found = {}
        for section, values in asdict(config).items():
            for key, now in values.items():
                was = OmegaConf.select(self._recipe, f"{section}.{key}")
                if was is not None and was != now:
                    found[f"{section}.{key}"] = now, was
        return found

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        content, self._content = self._content, {}
        return content or super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a file that is whole, or not there; the one before becomes ``previous.ckpt``.

        Lightning's may be copied from the system's folder for temporary files, and be cut off.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(path.parent)  # of a session that was killed within a save
        save_checkpoint(path, checkpoint, path.with_name(PREVIOUS))


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder, None if it has none; a UserError if all are bad."""
    reasons = []
    for path in saved_in(folder):
        if (reason := damage_of(path)) is None:
            return path
        reasons.append(f"{path} is damaged ({reason})")
        logger.warning("%s: trying the one before", reasons[-1])
    if reasons:
        raise UserError(f"{reasons[0]}: move it away to train from the beginning")
    return None


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, newest first."""
    return [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]
