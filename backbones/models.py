"""The names under which models are created, and what each name stands for."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from backbones.vit import RevViT, ViT

__all__ = ["create_model", "list_models", "register_model"]

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
    name: str, *, num_classes: int | None = None, pretrained: bool = False, **overrides: Any
) -> nn.Module:
    """Build a model by name.

    Args:
        name: one of :func:`list_models`.
        num_classes: outputs of the head, 0 for pooled features; None for the published number.
        pretrained: released weights; not available yet, so True is an error.
        overrides: constructor arguments of the model (``img_size``, ``depth``, …) that replace
            those of the name.

    Raises:
        ValueError: unknown name or argument (the message lists the near ones), or ``pretrained``.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, list_models()) or list_models()
        raise ValueError(f"there is no model {name!r}; did you mean {', '.join(near)}?")
    if pretrained:
        raise ValueError(
            f"released weights for {name!r} cannot be loaded yet; use pretrained=False"
        )
    model, arguments = _REGISTRY[name]
    known = inspect.signature(model).parameters
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known) or list(known)
            raise ValueError(f"{name} takes no argument {key!r}; did you mean {', '.join(near)}?")
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    return model(**{**arguments, **overrides})


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
