"""Weights to start from, to evaluate and to predict with: Kinetics, ImageNet or a run's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from backbones.common.errors import UserError
from backbones.registry import MODELS
from backbones.weights.checkpoint import WeightsError, read_checkpoint
from backbones.weights.download import download
from backbones.weights.formats import convert_state_dict
from backbones.weights.loading import LoadReport, load_checkpoint
from revvideo.config import Config
from revvideo.models import build_model

# What a run's checkpoint holds beside Lightning's entries: the names of the classes.
CLASSES = "classes"


@dataclass(frozen=True)
class RunInfo:
    """What a run's checkpoint says about itself: steps of the optimizer taken, class names."""

    step: int
    classes: list[str]


def read_run_info(path: Path) -> RunInfo | None:
    """The facts in a checkpoint of ``run.py``; None for anything else, or a damaged one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # no file, another format, or damaged in some way; its reader tells which
        return None
    if not isinstance(content, dict) or CLASSES not in content or "global_step" not in content:
        return None
    return RunInfo(int(content["global_step"]), [str(name) for name in content[CLASSES]])


def load_pretrained(model: nn.Module, source: str) -> LoadReport:
    """Load weights into a model for clips, and report what was done.

    ``source`` is a file, an address, or the name of a model of :mod:`backbones` with released
    weights, which are downloaded once.

    Takes what :func:`backbones.load_weights` does, the checkpoints of ``run.py`` among it, and
    those of an image model: each convolution becomes one in space and time that looks at the
    middle frame alone (ViViT, arXiv 2103.15691, section 3.4), and the positions are the image's in
    space and zero in time. So at first a clip that stands still is classified as its image is.

    Raises:
        UserError: a file that cannot be had or read, or does not fit; ``model`` is then untouched.
    """
    inflated: dict[str, str] = {}
    try:
        address = MODELS[source].weights or source if source in MODELS else source
        path = download(address) if "://" in address else Path(source).expanduser()
        checkpoint = read_checkpoint(path)
        tensors = convert_state_dict(checkpoint.tensors, model)
        inflated = _inflate(tensors, model)
        if inflated:
            checkpoint = replace(checkpoint, tensors=tensors)
        report = load_checkpoint(model, checkpoint, source)
    except (WeightsError, ImportError) as error:
        raise UserError(f"{error}{_remedy(model) if inflated else ''}") from error
    report.resized.update(inflated)
    return report


def load_run(weights: str | Path, config: Config) -> tuple[nn.Module, list[str]]:
    """The model of a finished run, to predict with.

    Args:
        weights: a checkpoint of ``run.py``, or any other weights with a head.
        config: the config of the run.

    Returns:
        the model in eval mode, on the CPU, and the names of its classes, which are their numbers
        where the file does not say.

    Raises:
        UserError: a file that cannot be read or does not fit the config.
    """
    info = read_run_info(Path(weights).expanduser())
    classes = info.classes if info else []
    model = build_model(config, len(classes) or config.model.num_classes)
    require_complete(load_pretrained(model, str(weights)))
    outputs = cast(nn.Linear, model.head).out_features
    return model.eval(), classes or [str(index) for index in range(outputs)]


def require_complete(report: LoadReport) -> None:
    """Refuse weights whose head was left out: its scores would be those of a random one."""
    if report.missing:
        why = "; ".join(dict.fromkeys(report.left_out.values())) or "the file has none"
        raise UserError(
            f"{report.source}: its head does not fit ({why}), so there is nothing to evaluate: "
            "set model.num_classes, or fine-tune first"
        )


def _inflate(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Turn the weights of an image model into those of ``model``, in place; says what was done."""
    own = model.state_dict()
    spatial, temporal = "pos_embed.spatial.weight", "pos_embed.temporal"
    if "pos_embed.weight" not in tensors or spatial not in own:
        return {}
    done = {}
    for name, value in tensors.items():
        target = own.get(name)
        if target is None or target.ndim != 5:
            continue
        if value.ndim == 4:
            value = value.unsqueeze(2)
        if value.ndim == 5 and value.shape[2] == 1 < target.shape[2]:
            tensors[name] = value.new_zeros(*value.shape[:2], target.shape[2], *value.shape[3:])
            tensors[name][:, :, target.shape[2] // 2] = value[:, :, 0]
            done[name] = f"from 1 to {target.shape[2]} frames, around the middle one"
    tensors[spatial] = tensors.pop("pos_embed.weight")
    tensors[temporal] = torch.zeros_like(own[temporal])
    inflated: dict[str, str] = {}
    if done:
        first, what = next(iter(done.items()))
        inflated[f"{first} and {len(done) - 1} other convolutions"] = what
    inflated[temporal] = "not in the file: zero, so that all frames start alike"
    return inflated


def _remedy(model: nn.Module) -> str:
    """What to do about image weights of another architecture than the model's."""
    if getattr(model, "config", {}).get("name") == "rev_mvit_base":
        return ""
    return ". Released weights for images have the architecture of model.name=rev_mvit_base"
