"""The models of this package in timm: importing this module registers there all that have a name.

>>> import timm, backbones.timm
>>> model = timm.create_model("rev_vit_base", pretrained=True, num_classes=10, drop_path_rate=0.1)
>>> maps = timm.create_model("rev_mvit_base", features_only=True)(images)
>>> model.set_grad_checkpointing()  # backbones.set_memory(model, "reversible")

They are the classes of :func:`backbones.create_model`, so ``set_memory``, ``fit_memory`` and
``load_weights`` take them. With ``pretrained=True``, ``pretrained_cfg_overlay={"file": …}`` takes
any file that :func:`backbones.load_weights` reads. timm's training script: docs/pretrained.md. An
ImportError says that timm is not installed.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from backbones.common.errors import optional_import
from backbones.common.images import IMAGENET_MEAN, IMAGENET_STD
from backbones.registry import MODELS, build
from backbones.weights.loading import load_weights

_timm = optional_import("timm.models", "timm", "backbones.timm")

# What timm knows of each model, by its name. Sizes, crop and colours as of the released ones.
default_cfgs = {
    name: {
        "url": record.weights or "",
        "num_classes": record.arguments.get("num_classes", 1000),
        "input_size": (3, 224, 224),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    for name, record in MODELS.items()
}


def _register(name: str) -> None:
    known = inspect.signature(MODELS[name].constructor)

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **arguments: Any,
    ) -> nn.Module:
        described = pretrained_cfg, pretrained_cfg_overlay
        cfg = _timm.resolve_pretrained_cfg(name, *described)

        def make(device: Any = None, dtype: Any = None, **arguments: Any) -> Any:
            known.bind(**arguments)  # a TypeError for what is no argument, as timm's models have it
            with torch.device(device) if device else nullcontext():
                model: Any = build(name, **arguments)
            for index, info in enumerate(model.feature_info):
                info["module"] = f"stages.{index}" if hasattr(model, "stages") else "blocks"
            model.in_chans, model.head_hidden_size = model.patch_embed.in_chans, model.num_features
            if pretrained:
                source = cfg.file or cfg.url
                if not source:
                    raise ValueError(
                        f"no weights are released for {name!r}: use pretrained=False, or "
                        "pretrained_cfg_overlay={'file': …}"
                    )
                load_weights(model, source)
            return model.to(dtype)

        default = getattr(known.parameters.get("transitions"), "default", ())
        stages = len(arguments.get("transitions", default)) + 1
        return _timm.build_model_with_cfg(
            make,
            name,
            False,  # make has loaded them
            *described,
            feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(stages))},
            **arguments,
        )

    create.__name__ = name
    setattr(sys.modules[__name__], name, _timm.register_model(create))


for _name in MODELS:
    _register(_name)
