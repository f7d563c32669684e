"""The network of a config, and the precision that it runs in."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

import backbones
from backbones.common.errors import UserError
from backbones.registry import input_shape
from revvideo import hub
from revvideo.data.stills import IMAGES, squeeze_frame
from revvideo.settings import Config

# Of so many classes, the best ones, predictions have names and scores.
TOP_K = 5

# The dtype of torch.autocast, by the names of train.precision; None for none.
AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def build_model(config: Config, num_classes: int = 0) -> nn.Module:
    """The network of a config with its memory policy, freshly initialised.

    ``num_classes``, of the data, counts where ``model.num_classes`` leaves it open. A UserError
    names a model that does not exist, or does not take these clips or arguments.
    """
    settings = config.model
    outputs = settings.num_classes or num_classes
    if not outputs:
        raise UserError("model.num_classes=0, and there is no data to count: set the number")
    if settings.name.startswith(hub.PREFIX):
        try:
            return hub.build(config, outputs)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"{settings.name} cannot be built: {error}") from error
    images = config.data.layout == IMAGES
    arguments: dict[str, Any] = {
        **({} if images else {"num_frames": config.data.num_frames}),
        "img_size": config.data.crop_size,
        "drop_rate": settings.drop_rate,
        "drop_path_rate": settings.drop_path_rate,
        **settings.arguments,
    }
    train, policy = config.train, cast(backbones.MemoryPolicy, config.train.memory)
    kept = train.stored_blocks, train.memory_keep, train.memory_slices
    try:
        model = backbones.create_model(settings.name, num_classes=outputs, **arguments)
        backbones.set_memory(model, policy, *kept)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "takes no argument 'num_frames'" in reason:
            reason = f"{settings.name} is for images; for clips, use an mvit_* or rev_mvit_*"
        raise UserError(f"the model cannot be built: {reason}") from error
    if images:
        if len(input_shape(model)) == 4:
            raise UserError(f"data.layout=images needs a model of images, {settings.name} is not")
        model.register_forward_pre_hook(squeeze_frame)
    return model
