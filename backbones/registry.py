"""The models that have a name: one record each, of all that is known about it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from backbones.common.errors import near_names
from backbones.models.mvit import MViT, RevMViT
from backbones.models.vit import RevViT, ViT

__all__ = [
    "MODELS",
    "ModelRecord",
    "build",
    "input_shape",
    "list_models",
    "name_of",
    "register_model",
]

_PYSLOWFAST = "https://dl.fbaipublicfiles.com/pyslowfast/rev"

# Arguments that may differ without making another model: they follow the data and the training.
_OF_THE_DATA = {"img_size", "num_classes", "num_frames"}


@dataclass(frozen=True)
class ModelRecord:
    """What a name stands for.

    Attributes:
        constructor, arguments: build the model.
        weights: address of the authors' released file (PySlowFast's model zoo), or None.
        top1, top5: published accuracy in percent, or None.
    """

    constructor: type[nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    top1: float | None = None
    top5: float | None = None


MODELS: dict[str, ModelRecord] = {}


def register_model(name: str, model: type[nn.Module], **arguments: Any) -> None:
    """Make ``create_model(name)`` build ``model(**arguments)``.

    Raises:
        ValueError: the name is taken.
    """
    _add(name, ModelRecord(model, arguments))


def _add(name: str, record: ModelRecord) -> None:
    if name in MODELS:
        raise ValueError(f"a model named {name!r} is registered already")
    MODELS[name] = record


def list_models() -> list[str]:
    """The names that :func:`backbones.create_model` knows, sorted."""
    return sorted(MODELS)


def build(name: str, **overrides: Any) -> nn.Module:
    """Build a model by name, with arguments that replace those of its record.

    Its attribute ``config`` holds ``name`` and all ``arguments`` that were not left to the
    constructor.

    Raises:
        ValueError: unknown name or argument (the message lists the near ones).
    """
    if name not in MODELS:
        near = ", ".join(near_names(name, list_models()))
        raise ValueError(f"there is no model {name!r}; did you mean {near}?")
    record = MODELS[name]
    known = inspect.signature(record.constructor).parameters
    for key in overrides:
        if key not in known:
            near = ", ".join(near_names(key, known))
            raise ValueError(f"{name} takes no argument {key!r}; did you mean {near}?")
    arguments = {**record.arguments, **overrides}
    model = record.constructor(**arguments)
    # Not `model.config = …`: nn.Module declares its attributes to be tensors and modules.
    vars(model)["config"] = {"name": name, "arguments": arguments}
    return model


def name_of(model: nn.Module) -> str | None:
    """The name of the registered model that ``model`` is, by its class and arguments, or None.

    Another name than it was built with where that was given another depth or width. Sizes of the
    input, classes and rates of dropout do not count.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    own = _identity(ModelRecord(type(model), config["arguments"]))
    same = (name for name, record in MODELS.items() if _identity(record) == own)
    return next(same, None)


def _identity(record: ModelRecord) -> tuple[Any, ...]:
    defaults = inspect.signature(record.constructor).parameters.items()
    arguments = {name: parameter.default for name, parameter in defaults} | record.arguments
    clips = arguments.get("num_frames") is not None
    compared = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if name not in _OF_THE_DATA and not name.endswith(("drop_rate", "drop_path_rate"))
    }
    return record.constructor, clips, sorted(compared.items(), key=lambda item: item[0])


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """The sample that a model of :func:`build` is made for: (C, H, W) or (C, T, H, W)."""
    arguments = getattr(model, "config", {}).get("arguments", {})
    size = arguments.get("img_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    frames = arguments.get("num_frames")
    clip = () if frames is None else (frames,)
    return (arguments.get("in_chans", 3), *clip, height, width)


# Width, depth and heads of the vision transformers, in the sizes of the field.
_VIT_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}

# Scores: one view of ImageNet-1k at 224 px; rev_mvit_base_16x4: Kinetics-400, 1 x 5 views. From
# arXiv 2302.04869, but of the two Rev-MViTs that of the weights released later (the paper: 82.5
# and 78.5). The paper's MViT-B has no score here: mvit_base differs from it in more than a class
# token. top5: mmpretrain's of the released weights, converted; the paper and its authors give none.
_RELEASED: dict[str, dict[str, Any]] = {
    "rev_vit_small": {"weights": f"{_PYSLOWFAST}/REV_VIT_S.pyth", "top1": 79.9, "top5": 94.9},
    "rev_vit_base": {"weights": f"{_PYSLOWFAST}/REV_VIT_B.pyth", "top1": 81.8, "top5": 95.56},
    "rev_vit_large": {"top1": 81.4},
    "vit_small": {"top1": 79.9},
    "vit_base": {"top1": 81.8},
    "vit_large": {"top1": 81.5},
}

for _size, _arguments in _VIT_SIZES.items():
    for _name, _class in ((f"rev_vit_{_size}", RevViT), (f"vit_{_size}", ViT)):
        _add(_name, ModelRecord(_class, _arguments, **_RELEASED.get(_name, {})))

# The released Kinetics model. The published config does not build as it stands; without its class
# token it does, with the published parameters and operations, and it takes the mean of the streams.
_MVIT_16X4: dict[str, Any] = {
    "num_frames": 16,
    "num_classes": 400,
    "kv_stride": 8,
    "qkv_bias": False,
}

_add("rev_mvit_base", ModelRecord(RevMViT, {}, f"{_PYSLOWFAST}/REV_MVIT_B.pyth", top1=82.9))
_add("mvit_base", ModelRecord(MViT))
_add(
    "rev_mvit_base_16x4",
    ModelRecord(
        RevMViT, {"fusion": "avg", **_MVIT_16X4}, f"{_PYSLOWFAST}/REV_MVIT_B_16x4.pyth", top1=78.4
    ),
)
_add("mvit_base_16x4", ModelRecord(MViT, _MVIT_16X4))
