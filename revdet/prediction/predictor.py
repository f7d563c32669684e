"""A trained detector as a function of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from omegaconf import DictConfig
from PIL import Image

from backbones.common.console import try_device
from backbones.common.errors import UserError, error_line
from backbones.common.images import read_image, why_unreadable
from revdet.config import load_config
from revdet.data.annotations import LINE
from revdet.data.classes import categories_of
from revdet.models import build_model
from revdet.prediction.media import UnreadableError
from revdet.training.checkpoint import Checkpointer, checkpoint_to_resume


@dataclass
class Frame:
    """A picture, or a frame of a video."""

    index: int  # its number among the inputs, or its time in the video
    pixels: np.ndarray  # (H, W, 3) uint8, RGB
    # What Detectron2's models take: ``image`` (3, H', W') after the recipe's test augmentations,
    # ``height`` and ``width`` of ``pixels``.
    model_input: dict[str, Any]


class Preparation:
    """What a recipe does to a picture before its model: that of its ``dataloader.test.mapper``."""

    def __init__(self, mapper: DictConfig) -> None:
        self.augmentations = T.AugmentationList(instantiate(mapper.augmentations))
        self.is_bgr = mapper.image_format == "BGR"

    def __call__(self, index: int, pixels: np.ndarray) -> Frame:
        """Prepare ``pixels`` (H, W, 3), uint8 RGB; those of a line are an UnreadableError."""
        height, width = pixels.shape[:2]
        if max(height, width) > LINE * min(height, width):
            wrong = f"{width} x {height} px is more than {LINE} times as long as wide"
            raise UnreadableError(f"{wrong}: cut it into pieces")
        given = T.AugInput(pixels[:, :, ::-1] if self.is_bgr else pixels)
        self.augmentations(given)
        image = torch.as_tensor(np.ascontiguousarray(given.image.transpose(2, 0, 1)))
        return Frame(index, pixels, {"image": image, "height": height, "width": width})

    def read(self, numbered: tuple[int, Path]) -> Frame | str:
        """A picture file, of which the number is given, prepared; or why it cannot be read."""
        index, path = numbered
        try:
            return self(index, np.array(read_image(path, upright=True)))
        except Exception as error:  # a damaged file fails in any way
            return why_unreadable(error, path)


class Detector:
    """The model of a recipe with weights; ``prepare`` makes frames for it.

    ``categories`` are the dataset's id and name of each class, in the order of ``pred_classes``,
    and ``classes`` the names, which Detectron2's visualizers find in ``metadata``. What scores less
    than ``threshold``, in [0, 1], is left out. A UserError says that the classes are not known, the
    model cannot be built, or the weights do not fit it.
    """

    def __init__(self, cfg: DictConfig, weights: str, *, device: str, threshold: float) -> None:
        self.categories = categories_of(cfg, weights)  # which makes the recipe for them
        self.classes = [category["name"] for category in self.categories]
        self.metadata = Metadata(thing_classes=self.classes)
        self.prepare = Preparation(cfg.dataloader.test.mapper)
        self.model = build_model(cfg, device).eval()
        Checkpointer(self.model).load(weights)
        module: Any
        for module in self.model.modules():
            if hasattr(module, "test_score_thresh"):
                # In place of the recipe's: what scores less cannot suppress what scores more.
                # A bit lower, because the model leaves out what scores just as much.
                module.test_score_thresh = threshold - 1e-6
        self.threshold = threshold

    @torch.no_grad()
    def detect(self, frames: Sequence[Frame]) -> list[Instances]:
        """What is found in each frame, in pixels of the frame, on the CPU."""
        try:
            outputs = self.model([frame.model_input for frame in frames])
        except torch.OutOfMemoryError as error:
            lacks = f"has not enough memory for {len(frames)} pictures at once"
            raise UserError(f"{self.model.device} {lacks}: set a smaller --batch-size") from error
        found = [output["instances"].to("cpu") for output in outputs]
        return [instances[instances.scores >= self.threshold] for instances in found]

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Instances:
        """What is in a picture: its path, a PIL image, or uint8 (H, W, 3) in RGB.

        It comes as Detectron2's ``Instances``, the likeliest first: ``pred_boxes`` (x0, y0, x1, y1
        in pixels), ``scores``, ``pred_classes``, ``pred_masks`` (N, H, W) if the model has masks,
        and ``names``, of the classes. A UserError says that a file cannot be read, or that the
        picture is of another kind or shape.
        """
        if isinstance(image, str | Path):
            try:
                image = read_image(image, upright=True)
            except Exception as error:  # a damaged file fails in any way
                raise UserError(f"{image} cannot be read: {error_line(error)}") from error
        pixels = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
            raise UserError(f"a picture is uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
        (found,) = self.detect([self.prepare(0, pixels)])
        found.names = [self.classes[label] for label in found.pred_classes.tolist()]
        return found


def load(
    run: str | Path, *, checkpoint: str = "", device: str = "auto", threshold: float = 0.5
) -> Detector:
    """The detector that a run has trained: ``revdet.load(RUN)("photo.jpg")``.

    ``run`` is its ``train.output_dir``, ``checkpoint`` a file in the place of ``model_final.pth``,
    or of the newest one before the end, and ``device`` ``cuda``, ``cpu``, … or ``auto``: a GPU
    where there is one. Scores lower than ``threshold``, 0 to 1, are left out. A UserError says that
    the folder holds no run, or no checkpoint that can be read.
    """
    cfg = load_config(str(Path(run) / "config.yaml"))
    final = Path(run) / "model_final.pth"
    file = checkpoint or (final if final.is_file() else checkpoint_to_resume(Path(run)))
    if file is None:
        raise UserError(f"{run} holds no checkpoint yet")
    on = try_device(device, f"device={device}", "try cpu")
    return Detector(cfg, str(file), device=str(on), threshold=threshold)


def batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Up to ``size`` consecutive frames that are equally large for the model: none is padded."""
    for _, alike in groupby(frames, lambda frame: frame.model_input["image"].shape):
        while batch := list(islice(alike, size)):
            yield batch
