"""Any model of :mod:`backbones` as a Detectron2 backbone, and the detector of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import log2
from typing import Any

from detectron2.config import instantiate
from detectron2.layers import get_norm
from detectron2.modeling import Backbone
from omegaconf import DictConfig
from torch import Tensor, nn

import backbones
from backbones.common.errors import UserError
from revdet.heads import set_heads_memory

logger = logging.getLogger("revdet")


class TrunkBackbone(Backbone):
    """Feature maps of a model of :mod:`backbones` under Detectron2's names.

    A map of stride ``2**k`` is called ``"scale<k>"``, as in Detectron2's own MViT: a ViT with
    patches of 16 pixels has ``"scale4"``, MViT-B has ``"scale2"`` to ``"scale5"``. The trunk
    itself normalises its last map; the others get a layer norm here, as in Detectron2's MViT.

    A trunk made for clips sees an image as a clip of one frame.

    ``model`` has ``feature_maps`` and ``feature_info``, and is usually made with
    ``create_model(…, num_classes=0)``. ``out_features`` names the maps to return, None all; a
    ValueError says which of them the model does not have.
    """

    model: Any

    def __init__(self, model: Any, out_features: Sequence[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self._clips = getattr(model, "clips", False)
        infos = {f"scale{int(log2(info['reduction']))}": info for info in model.feature_info}
        self._names = names = [*infos]
        for name in out_features or ():
            if name not in names:
                raise ValueError(f"the trunk has no map {name!r}; it has {', '.join(names)}")
        self._out_features = list(out_features or names)
        self._out_feature_channels = {name: info["num_chs"] for name, info in infos.items()}
        self._out_feature_strides = {name: info["reduction"] for name, info in infos.items()}
        own = [name for name in self._out_features if name != names[-1]]
        self.norms = nn.ModuleDict({name: get_norm("LN", infos[name]["num_chs"]) for name in own})

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input are padded to a multiple of this, in pixels."""
        return max(self._out_feature_strides.values())

    def forward(self, x: Tensor | Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """Images (B, 3, H, W), or their stage streams -> {name: (B, C, H / stride, W / stride)}."""
        if isinstance(x, Tensor):
            maps = self.model.feature_maps(x.unsqueeze(2) if self._clips else x)
        else:
            maps = [self.model.map_of(*end) for end in enumerate(x)]
        flat = (x.squeeze(2) if self._clips else x for x in maps)
        named = dict(zip(self._names, flat, strict=True))
        out = {name: named[name] for name in self._out_features}
        return out | {name: norm(out[name]) for name, norm in self.norms.items()}

    def stage_streams(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """What the stages of a model that has several end with, as its own ``stage_streams``."""
        return self.model.stage_streams(x.unsqueeze(2) if self._clips else x)


def find_trunk(model: nn.Module) -> tuple[str, nn.Module]:
    """The prefix of the names of a detector's trunk, and the trunk; a ValueError if it has none."""
    for name, module in model.named_modules():
        if isinstance(module, TrunkBackbone):
            return f"{name}.model.".lstrip("."), module.model
    raise ValueError(f"{type(model).__name__} has no TrunkBackbone (see revdet/models.py)")


def build_model(cfg: DictConfig, device: str = "cpu") -> nn.Module:
    """The detector of a recipe with its memory policy; a UserError if these do not fit together."""
    settings = cfg.train
    try:
        model: Any = instantiate(cfg.model)
        policy = settings.memory, settings.stored_blocks, settings.memory_keep
        backbones.set_memory(model.backbone, *policy, settings.memory_slices)
        heads = settings.heads_memory
        if heads == "auto":
            heads = "store" if settings.memory == "store" else "checkpoint"
        set_heads_memory(model, heads, settings.heads_slices)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the model cannot be built: {type(error).__name__}: {error}") from error
    trunk, total = (sum(p.numel() for p in m.parameters()) for m in (model.backbone, model))
    size = f"{total / 1e6:.2f} M parameters, {trunk / 1e6:.2f} M of them in the trunk and pyramid"
    kept = f"{', '.join(settings.memory_keep) or 'nothing'} kept of the others"
    blocks = f"{settings.stored_blocks} blocks stored, {kept}, in {settings.memory_slices} slices"
    memory = f"memory policy {settings.memory}, {blocks}; pyramid and heads: {heads}"
    logger.info(f"model: {size}; {memory}")
    return model.to(device)
