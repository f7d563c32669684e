"""Models of PyTorchVideo's hub as contestants: ``model.name=pytorchvideo/slow_r50``.

Their memory is stored, or checkpointed block by block where that counts no batch twice.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from pytorchvideo.models import hub
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbones.common.errors import UserError, first_line, near_names
from backbones.weights.checkpoint import Checkpoint
from backbones.weights.loading import LoadReport
from revvideo.settings import Config

PREFIX = "pytorchvideo/"

# Of a clip, for which the hub has trained them: frames, and pixels on a side.
_MADE_FOR = {
    "mvit_base_16x4": (16, 224),
    "mvit_base_32x3": (32, 224),
    "slow_r50": (8, 224),
    "c2d_r50": (8, 224),
    "i3d_r50": (8, 224),
    "csn_r101": (32, 224),
    "r2plus1d_r50": (16, 224),
    "x3d_xs": (4, 160),
    "x3d_s": (13, 160),
    "x3d_m": (16, 224),
    "x3d_l": (16, 312),
}


def classifier_of(model: nn.Module) -> nn.Linear:
    """The layer that gives the scores: ``head``, or of a hub's model its last linear layer."""
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear):
        return head
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def address(source: str) -> str:
    """Where the hub keeps the weights of ``pytorchvideo/NAME``; other sources as they are."""
    if not source.startswith(PREFIX):
        return source
    name = source.removeprefix(PREFIX)
    paths = getattr(sys.modules[_builder(name).__module__], "checkpoint_paths", {})
    if name not in paths:
        raise UserError(f"the hub has no weights of {source}")
    return cast(str, paths[name])


def build(config: Config, num_classes: int) -> nn.Module:
    """A model of the hub, freshly initialised, whose outputs are logits.

    A UserError names what the hub does not have, or its model does not take.
    """
    settings, data, train = config.model, config.data, config.train
    name = settings.name.removeprefix(PREFIX)
    builder, arguments = _builder(name), dict(settings.arguments)
    if name.startswith("mvit"):
        arguments |= {"spatial_size": data.crop_size, "temporal_size": data.num_frames}
        arguments["droppath_rate_block"] = settings.drop_path_rate
    elif settings.drop_path_rate:
        raise UserError(f"{settings.name} has no stochastic depth: set model.drop_path_rate=0")
    for key, default in (("stored_blocks", 0), ("memory_keep", []), ("memory_slices", 1)):
        if getattr(train, key) != default:
            raise UserError(f"train.{key} is for models of backbones, not for {settings.name}")
    if train.memory_budget or train.memory == "reversible":
        chosen = "a memory budget" if train.memory_budget else "train.memory=reversible"
        needs = "needs a model of backbones, such as rev_mvit_base_16x4"
        remedy = "set train.memory=store or checkpoint, and no train.memory_budget"
        raise UserError(f"{chosen} {needs}: for {settings.name} {remedy}")
    if config.optim.layer_decay != 1:
        raise UserError(f"{settings.name} has no layers to decay by: set optim.layer_decay=1")
    model = builder(**arguments)
    _give_logits(model, num_classes, settings.drop_rate)
    _check_clip(model, settings.name, data.num_frames, data.crop_size)
    if train.memory == "checkpoint":
        _checkpoint_blocks(model, settings.name)
    return model


def load(model: nn.Module, weights: Checkpoint, source: str) -> LoadReport:
    """Load a file of the hub, or of a run, into a hub model; a head of other classes is left out.

    A file that does not fit is a UserError, and leaves the model untouched.
    """
    own, tensors = model.state_dict(), dict(weights.tensors)
    for prefix in ("module.", "backbone."):  # of torch's DDP; of a run
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    left_out: dict[str, str] = {}
    head = next(name for name, module in model.named_modules() if module is classifier_of(model))
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in tensors and tensors[name].shape[:1] != own[name].shape[:1]:
            left_out[name] = f"of {len(tensors.pop(name))} classes, the model has {len(own[name])}"
    strange = tensors.keys() - own.keys() or own.keys() - tensors.keys() - left_out.keys()
    strange = strange or {n for n, t in tensors.items() if t.shape != own[n].shape}
    if strange:
        raise UserError(f"{source} does not fit this model of PyTorchVideo: {min(strange)}, first")
    model.load_state_dict(own | tensors)
    loaded, missing = [*tensors], [*left_out]
    return LoadReport(source, "PyTorchVideo", loaded=loaded, left_out=left_out, missing=missing)


def _builder(name: str) -> Callable[..., nn.Module]:
    if name.startswith("slowfast"):
        ours = "models of one pathway are trained here, such as pytorchvideo/slow_r50"
        raise UserError(f"{PREFIX}{name} takes two clips, a slow and a fast one: {ours}")
    if name not in _MADE_FOR:
        near = ", ".join(near_names(name, _MADE_FOR) or _MADE_FOR)
        raise UserError(f"{PREFIX}{name} is no classifier of clips of PyTorchVideo's hub: {near}")
    return cast(Callable[..., nn.Module], getattr(hub, name))


def _give_logits(model: nn.Module, num_classes: int, drop_rate: float) -> None:
    """A head of ``num_classes``, with this dropout before it and without a softmax behind it."""
    old = classifier_of(model)
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old and old.out_features != num_classes:
                new = nn.Linear(old.in_features, num_classes)
                nn.init.normal_(new.weight, std=0.01)
                nn.init.zeros_(new.bias)
                setattr(parent, name, new)
            elif isinstance(child, nn.Softmax):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, nn.Dropout) and name == "dropout":  # that of a head
                child.p = drop_rate


def _check_clip(model: nn.Module, name: str, frames: int, size: int) -> None:
    """Some heads average over a fixed number of frames and pixels, which must be there."""
    try:
        with torch.no_grad():
            clip = torch.empty(1, 3, frames, size, size, device="meta")
            copy.deepcopy(model).to("meta").eval()(clip)
    except (RuntimeError, ValueError, AssertionError) as error:
        of, pixels = _MADE_FOR[name.removeprefix(PREFIX)]
        wrong = f"does not take {frames} frames of {size} px ({first_line(error)})"
        made_for = f"data.num_frames={of} data.crop_size={pixels}"
        raise UserError(f"{name} {wrong}: it is made for {made_for}") from error


class _Checkpointed(nn.Module):
    def forward(self, *args: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=False)


def _checkpoint_blocks(model: nn.Module, name: str) -> None:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        twice = f"would count each batch twice in the batch norms of {name}"
        raise UserError(f"train.memory=checkpoint {twice}: set train.memory=store")
    for block in cast(nn.ModuleList, model.blocks):
        # A class of its own, which a copy of the model keeps, unlike a forward put on the object.
        block.__class__ = type(type(block).__name__, (_Checkpointed, type(block)), {})
