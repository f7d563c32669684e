"""The models that have a name: one record each, of all that is known about it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from backbones.common.errors import did_you_mean
from backbones.models.mvit import MViT, RevMViT
from backbones.models.trunk import Trunk
from backbones.models.vit import RevViT, ViT

# Arguments that may differ without making another model: they follow the data and the training.
_OF_THE_DATA = {"img_size", "num_classes", "num_frames", "pretrain_img_size"}


@dataclass(frozen=True)
class ModelRecord:
    """What a name stands for."""

    constructor: type[nn.Module]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None  # address of the file that the authors have released
    # Published, in percent: of one view of ImageNet-1k at 224 pixels; of a model of clips, of 1 x 5
    # views of Kinetics-400.
    top1: float | None = None
    top5: float | None = None


# Widths and depths of vision transformers.
_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}
_GIANT = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "patch_size": 14, "swiglu": True}

# The released Kinetics model. The published config does not build as it stands; without its class
# token it does, with the published parameters and operations, and it takes the mean of the streams.
_CLIPS = {"num_frames": 16, "num_classes": 400, "kv_stride": 8, "qkv_bias": False}

_ZOO = "https://dl.fbaipublicfiles.com/pyslowfast/rev"  # of PySlowFast

# Scores are those of arXiv 2302.04869; of the two Rev-MViTs those of the weights, which were
# released later (the paper: 82.5 and 78.5). The paper's MViT-B has no score here: mvit_base differs
# from it in more than a class token. top5: mmpretrain's, of the released weights, converted; the
# paper and its authors give none.
MODELS: dict[str, ModelRecord] = {
    "rev_vit_tiny": ModelRecord(RevViT, _TINY),
    "rev_vit_small": ModelRecord(RevViT, _SMALL, f"{_ZOO}/REV_VIT_S.pyth", 79.9, 94.9),
    "rev_vit_base": ModelRecord(RevViT, _BASE, f"{_ZOO}/REV_VIT_B.pyth", 81.8, 95.56),
    "rev_vit_large": ModelRecord(RevViT, _LARGE, top1=81.4),
    "rev_vit_huge": ModelRecord(RevViT, _HUGE),
    "rev_vit_giant": ModelRecord(RevViT, _GIANT),
    "vit_tiny": ModelRecord(ViT, _TINY),
    "vit_small": ModelRecord(ViT, _SMALL, top1=79.9),
    "vit_base": ModelRecord(ViT, _BASE, top1=81.8),
    "vit_large": ModelRecord(ViT, _LARGE, top1=81.5),
    "vit_huge": ModelRecord(ViT, _HUGE),
    "vit_giant": ModelRecord(ViT, _GIANT),
    "rev_mvit_base": ModelRecord(
        RevMViT, {"fusion": "concat_linear_2"}, f"{_ZOO}/REV_MVIT_B.pyth", 82.9
    ),
    "rev_mvit_base_16x4": ModelRecord(
        RevMViT, {**_CLIPS, "fusion": "avg"}, f"{_ZOO}/REV_MVIT_B_16x4.pyth", 78.4
    ),
    "mvit_base": ModelRecord(MViT),
    "mvit_base_16x4": ModelRecord(MViT, _CLIPS),
}


def register_model(name: str, model: type[nn.Module], **arguments: Any) -> None:
    """Make ``create_model(name)`` build ``model(**arguments)``; a ValueError if it is taken."""
    if name in MODELS:
        raise ValueError(f"a model named {name!r} is registered already")
    MODELS[name] = ModelRecord(model, arguments)


def list_models() -> list[str]:
    """The names that :func:`backbones.create_model` knows, sorted."""
    return sorted(MODELS)


def record_of(name: str) -> ModelRecord:
    """What a name stands for; a ValueError, which lists the near ones, if it is unknown."""
    if name not in MODELS:
        near = did_you_mean(name, list_models()) or ": backbones.list_models() has all names"
        raise ValueError(f"there is no model {name!r}{near}")
    return MODELS[name]


def build(name: str, **overrides: Any) -> Trunk:
    """As :func:`backbones.create_model` without weights: ``overrides`` replace arguments."""
    record = record_of(name)
    known = inspect.signature(record.constructor).parameters
    any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key in overrides:
        if key not in known and not any_key:
            raise ValueError(f"{name} takes no argument {key!r}{did_you_mean(key, known)}")
    arguments = {**record.arguments, **overrides}
    for key, value in overrides.items():
        if isinstance(value, Sequence) and not isinstance(value, str | tuple):
            arguments[key] = [*value]  # a recipe's kind of list cannot be saved as JSON
    # What others register may be any module: of its type nothing more is known than they know.
    model = cast(Trunk, record.constructor(**arguments))
    # Not `model.config = …`: nn.Module declares its attributes to be tensors and modules.
    vars(model)["config"] = {"name": name, "arguments": arguments}
    return model


def name_of(model: nn.Module) -> str | None:
    """The name of the registered model that ``model`` is, by its class and arguments, or None.

    Another name than it was built with where that was given another depth or width. Sizes of the
    input, classes and rates of dropout do not count.
    """
    config = vars(model).get("config")
    if config is None:
        return None
    own, records = _identity(type(model), config["arguments"]), MODELS.items()
    same = (name for name, of in records if _identity(of.constructor, of.arguments) == own)
    return next(same, None)


def _identity(constructor: type[nn.Module], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two models have in common that compute the same function of their weights."""
    parameters = inspect.signature(constructor).parameters
    arguments = {name: parameter.default for name, parameter in parameters.items()} | dict(given)
    compared = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if name not in _OF_THE_DATA and not name.endswith(("drop_rate", "drop_path_rate"))
    }
    return constructor, arguments.get("num_frames") is not None, compared


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """The sample that a model of :func:`build` is made for: (C, H, W) or (C, T, H, W)."""
    arguments = getattr(model, "config", {}).get("arguments", {})
    size = arguments.get("img_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    frames = arguments.get("num_frames")
    clip = () if frames is None else (frames,)
    return (arguments.get("in_chans", 3), *clip, height, width)
