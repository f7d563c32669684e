"""Models built from what a checkpoint says about itself."""

from __future__ import annotations

import json
from os import PathLike

from torch import nn

from backbones.common.errors import some_of
from backbones.registry import build, name_of
from backbones.weights.checkpoint import Checkpoint, WeightsError, read_checkpoint
from backbones.weights.formats import model_of_cfg
from backbones.weights.loading import CONFIG, load_checkpoint

__all__ = ["build_pyslowfast", "build_saved", "from_pyslowfast", "load_model"]

_BY_HAND = "use create_model(…) and load_weights(…)"

# What arguments that make no model end in.
_UNFIT = (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError)


def from_pyslowfast(path: str | PathLike[str]) -> nn.Module:
    """Build the model of a PySlowFast checkpoint from the cfg inside it, and load its weights.

    Unlike the original, the model returns raw logits in eval mode too, without the softmax.

    Args:
        path: a ``.pyth`` file; its rates of dropout and stochastic depth are kept.

    Returns:
        the model. Its ``config`` names the model of the zoo that it is, or else the one of its kind
        that has all of its arguments changed.

    Raises:
        WeightsError: a file that cannot be read, has no cfg, is of a model that this package does
            not have, or holds other tensors than that model.
        ImportError: PyYAML is not installed.
    """
    return build_pyslowfast(read_checkpoint(path))


def build_pyslowfast(checkpoint: Checkpoint) -> nn.Module:
    """As :func:`from_pyslowfast`, of a checkpoint that was read already."""
    path = checkpoint.path
    if checkpoint.cfg is None:
        raise WeightsError(f"{path} has no PySlowFast cfg inside; {_BY_HAND}")
    try:
        name, arguments = model_of_cfg(checkpoint.cfg)
        model = build(name, **arguments)
    except _UNFIT as error:
        raise WeightsError(f"{path}: {error}") from error
    # The cfg names no size: what is called "rev_vit_base" so far may be any Rev-ViT.
    vars(model)["config"]["name"] = name_of(model) or name
    _load_all(model, checkpoint)
    return model


def load_model(path: str | PathLike[str]) -> nn.Module:
    """Build the model that :func:`save_weights` wrote to ``path``, and load its weights.

    Raises:
        WeightsError: a file that cannot be read, does not say which model it is of, or holds
            other tensors than that model.
        ImportError: safetensors is not installed.
    """
    return build_saved(read_checkpoint(path))


def build_saved(checkpoint: Checkpoint) -> nn.Module:
    """As :func:`load_model`, of a checkpoint that was read already."""
    path = checkpoint.path
    if CONFIG not in checkpoint.metadata:
        raise WeightsError(f"{path} does not say which model it is of; {_BY_HAND}")
    try:
        config = json.loads(checkpoint.metadata[CONFIG])
        model = build(config["name"], **config["arguments"])
    except _UNFIT as error:
        raise WeightsError(f"{path} names a model that cannot be built: {error}") from error
    _load_all(model, checkpoint)
    return model


def _load_all(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load, and take no less than everything: a file fits the model that it describes."""
    path = checkpoint.path
    report = load_checkpoint(model, checkpoint, str(path))
    problems = [f"{name}: {why}" for name, why in report.left_out.items()]
    if absent := [name for name in report.missing if name not in report.left_out]:
        problems.append(f"not in the file: {some_of(absent)}")
    if problems:
        raise WeightsError(f"{path} is not of the model that it describes: {'; '.join(problems)}")
