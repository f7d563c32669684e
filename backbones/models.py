"""The names under which models are created, and what each name stands for."""

from __future__ import annotations

import difflib
import inspect
import logging
from typing import Any

from torch import nn

from backbones.compiled import compile_blocks
from backbones.download import RELEASED_WEIGHTS
from backbones.mvit import MViT, RevMViT
from backbones.vit import RevViT, ViT
from backbones.weights import load_weights

__all__ = ["create_model", "list_models", "register_model"]

_log = logging.getLogger(__name__)

_REGISTRY: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {}


def register_model(name: str, model: type[nn.Module], **arguments: Any) -> None:
    """Make ``create_model(name)`` build ``model(**arguments)``.

    Raises:
        ValueError: the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"a model named {name!r} is registered already")
    _REGISTRY[name] = (model, arguments)


def list_models() -> list[str]:
    """The names that :func:`create_model` knows, sorted."""
    return sorted(_REGISTRY)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    compile: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Build a model by name.

    >>> create_model("rev_vit_small", num_classes=10, drop_path_rate=0.1)  # a classifier
    >>> create_model(  # the trunk of a detector, after ViTDet
    ...     "rev_vit_base", num_classes=0, img_size=1024,
    ...     window_size=14, global_attn_indexes=(2, 5, 8, 11), use_rel_pos=True,
    ... )

    Args:
        name: one of :func:`list_models`.
        num_classes: outputs of the head, 0 for pooled features; None for the published number.
        pretrained: load the authors' released weights, downloaded at the first use (see
            :func:`backbones.download.download`). Other ``num_classes`` than the released ones
            give a new head. What was loaded goes to the log, at level INFO.
        compile: compile the branches of the blocks when they first run; see
            :func:`backbones.compile_blocks`.
        overrides: constructor arguments of the model (``img_size``, ``depth``, …) that replace
            those of the name.

    Returns:
        the model; its attribute ``config`` holds ``name`` and all ``arguments`` that were not left
        to the constructor.

    Raises:
        ValueError: unknown name or argument (the message lists the near ones); ``pretrained``
            without released weights, or with weights that cannot be had or do not fit the
            arguments (:class:`backbones.WeightsError`).
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, list_models()) or list_models()
        raise ValueError(f"there is no model {name!r}; did you mean {', '.join(near)}?")
    if pretrained and name not in RELEASED_WEIGHTS:
        released = ", ".join(sorted(RELEASED_WEIGHTS))
        raise ValueError(
            f"no weights are released for {name!r}, only for {released}; use pretrained=False"
        )
    constructor, arguments = _REGISTRY[name]
    known = inspect.signature(constructor).parameters
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known) or list(known)
            raise ValueError(f"{name} takes no argument {key!r}; did you mean {', '.join(near)}?")
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    arguments = {**arguments, **overrides}
    model = constructor(**arguments)
    # Not `model.config = …`: nn.Module declares its attributes to be tensors and modules.
    vars(model)["config"] = {"name": name, "arguments": arguments}
    if pretrained:
        _log.info("%s", load_weights(model, RELEASED_WEIGHTS[name]))
    if compile:
        compile_blocks(model)
    return model


# Width, depth and heads of the vision transformers, in the sizes of the field.
_VIT_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}

for _size, _arguments in _VIT_SIZES.items():
    register_model(f"rev_vit_{_size}", RevViT, **_arguments)
    register_model(f"vit_{_size}", ViT, **_arguments)

# The released Kinetics model. The published config does not build as it stands; without its class
# token it does, with the published parameters and operations, and it takes the mean of the streams.
_MVIT_16X4: dict[str, Any] = {
    "num_frames": 16,
    "num_classes": 400,
    "kv_stride": 8,
    "qkv_bias": False,
}

register_model("rev_mvit_base", RevMViT)
register_model("mvit_base", MViT)
register_model("rev_mvit_base_16x4", RevMViT, fusion="avg", **_MVIT_16X4)
register_model("mvit_base_16x4", MViT, **_MVIT_16X4)
