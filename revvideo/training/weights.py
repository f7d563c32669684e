"""Weights to start from, to test and to predict with: Kinetics, ImageNet or a run's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.common.errors import UserError
from backbones.common.paths import local_path
from backbones.models.trunk import Trunk
from backbones.registry import MODELS
from backbones.weights.checkpoint import Checkpoint, WeightsError, read_checkpoint
from backbones.weights.download import local_file
from backbones.weights.formats import convert_state_dict
from backbones.weights.loading import LoadReport, load_checkpoint
from revvideo import hub
from revvideo.models import build_model
from revvideo.settings import Config

CLASSES = "classes"  # the entry of a run's checkpoint that names them

_OF_IMAGES = ". Released weights for images have the architecture of model.name=rev_mvit_base"


@dataclass(frozen=True)
class Weights:
    """The state dict of a file."""

    source: str  # as the user named it
    checkpoint: Checkpoint
    classes: list[str]  # their names, which a run's checkpoint holds; empty for others


def read_weights(source: str | Path) -> Weights:
    """Those of a file, an address, or a model's name (the released ones); else a UserError."""
    source = str(source)
    released = MODELS[source].weights if source in MODELS else None
    address = released or hub.address(source)
    # Of the web, backbones keeps what it downloads itself, and compares it at every use.
    web = address.startswith(("http://", "https://"))
    file = local_file(address if web else local_path(source, "model.weights"))
    checkpoint = read_checkpoint(file)
    classes = [str(name) for name in checkpoint.content.get(CLASSES, ())]
    # The rest of a run's checkpoint is three times as large as the weights.
    return Weights(source, replace(checkpoint, content={}), classes)


def load_pretrained(model: nn.Module, weights: Weights) -> LoadReport:
    """Load weights into a model for clips, and report what was done.

    Takes what :func:`backbones.load_weights` does, the checkpoints of ``run.py`` among it, and
    those of an image model: each convolution becomes one in space and time that looks at the
    middle frame alone (ViViT, arXiv 2103.15691, section 3.4), and the positions are the image's in
    space and zero in time. So at first a clip that stands still is classified as its image is.
    Weights that do not fit are a UserError, and leave ``model`` untouched.
    """
    if not isinstance(model, Trunk):
        return hub.load(model, weights.checkpoint, weights.source)
    inflated: dict[str, str] = {}
    try:
        checkpoint = weights.checkpoint
        if "pos_embed.temporal" in model.state_dict():  # a model of clips
            tensors = convert_state_dict(checkpoint.tensors, model)
            if inflated := _inflate(tensors, model):
                checkpoint = replace(checkpoint, tensors=tensors)
        report = load_checkpoint(model, checkpoint, weights.source)
    except WeightsError as error:
        raise UserError(f"{error}{_OF_IMAGES if inflated else ''}") from error
    report.resized.update(inflated)
    return report


def load_run(source: str | Path, config: Config) -> tuple[nn.Module, list[str]]:
    """The model of a finished run, in eval mode on the CPU, and the names of its classes.

    These are their numbers where the file does not say. A UserError says that the weights cannot be
    read, do not fit the config, or have no head.
    """
    weights = read_weights(source)
    model = build_model(config, len(weights.classes) or config.model.num_classes)
    require_complete(load_pretrained(model, weights))
    outputs = hub.classifier_of(model).out_features
    return model.eval(), weights.classes or [str(index) for index in range(outputs)]


def require_complete(report: LoadReport) -> None:
    """Refuse weights whose head was left out: its scores would be those of a random one."""
    if report.missing:
        why = "; ".join(dict.fromkeys(report.left_out.values())) or "the file has none"
        remedy = "so there is nothing to evaluate: set model.num_classes, or fine-tune first"
        raise UserError(f"{report.source}: its head does not fit ({why}), {remedy}")


def _inflate(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Turn the weights of an image model into those of ``model``, in place; says what was done."""
    own = model.state_dict()
    spatial, temporal = "pos_embed.spatial.weight", "pos_embed.temporal"
    if "pos_embed.weight" not in tensors or spatial not in own:
        return {}
    inflated: dict[str, str] = {}
    for name, value in tensors.items():
        frames = own[name].shape[2] if name in own and own[name].ndim == 5 else 1
        value = value.unsqueeze(2) if value.ndim == 4 else value
        if value.ndim == 5 and value.shape[2] == 1 < frames:
            tensors[name] = value.new_zeros(*value.shape[:2], frames, *value.shape[3:])
            tensors[name][:, :, frames // 2] = value[:, :, 0]
            inflated[name] = f"from 1 to {frames} frames, around the middle one"
    tensors[spatial] = tensors.pop("pos_embed.weight")
    tensors[temporal] = torch.zeros_like(own[temporal])
    if inflated:
        first, what = next(iter(inflated.items()))
        inflated = {f"{first} and {len(inflated) - 1} other convolutions": what}
    inflated[temporal] = "not in the file: zero, so that all frames start alike"
    return inflated
