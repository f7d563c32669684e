"""The checkpoints of a run: opened once to continue from, and written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from backbones.common.errors import UserError
from backbones.common.files import replacing
from backbones.weights.checkpoint import WeightsError, read_checkpoint
from revvideo.training.weights import CLASSES

_STEP = "global_step"  # Lightning's entry: steps of the optimizer taken


class CheckpointIO(TorchCheckpointIO):
    """How Lightning reads and writes the checkpoints of a run.

    Args:
        before: the one to continue from, which is read here; None for none.
        hand_out: whether Lightning will ask for it. It is then kept until that happens.

    Attributes:
        step, classes: steps of the optimizer taken before, and the names of the classes.

    Raises:
        UserError: it is damaged, or something else.
    """

    def __init__(self, before: Path | None, *, hand_out: bool) -> None:
        content = {} if before is None else _read(before)
        self.step = int(content.get(_STEP, 0))
        self.classes: list[str] = content.get(CLASSES, [])
        self._content = content if hand_out else {}

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        content, self._content = self._content, {}
        return content or super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a file that is whole, or not there.

        Lightning writes to the system's folder for temporary files, from where the file may have
        to be copied.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{path.name}.*.partial"):
            leftover.unlink()  # of a session that was killed within a save
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_checkpoint(path).content
    except WeightsError as error:
        raise UserError(f"{error}: move it away to train from the beginning") from error
    if not {CLASSES, _STEP} <= content.keys():
        raise UserError(f"{path} is no checkpoint of a run: move it away")
    return content
