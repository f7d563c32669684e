"""What a file has and a model has not, and the other way round, where the two still go together.

A class token is left out, or takes in its position; LayerScale is folded into the layers before it;
a plain net's branches go into a reversible one. Each is said in the report, and a head is taken
over only where it reads what it was trained to read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt

import torch
from torch import Tensor, nn

from backbones.common.errors import some_of
from backbones.models.trunk import Trunk
from backbones.weights.checkpoint import WeightsError
from backbones.weights.formats import Layout, Translation
from backbones.weights.resizing import is_table

Tensors = dict[str, Tensor]

_CLS, _REGISTERS, _POSITION = "prefix.cls_token", "prefix.register_tokens", "pos_embed.weight"
_DETECTOR = r"simfp_|fpn_|proposal_generator\.|roi_heads\.|rpn_head\.|roi_head\.|bbox_head\.|pixel_"
# Parts of files that are not of the net itself, and what they are.
_PARTS = {
    _DETECTOR: "of the detector around the trunk",
    r"decoder": "of MAE's decoder",
    r"mask_token$": "stands for masked patches",
    r"(dino|ibot)_head\.": "of the training without labels",
    r"dist_token$|head_dist\.": "of the distillation",
    r"pooler\.": "of the pooler",
}


@dataclass
class LoadReport:
    """What :func:`load_weights` did. Names are the model's own; ``str()`` gives a summary.

    ``converted`` is what took another form: a class token with its position, LayerScale that was
    folded, a plain net's norm and head in a reversible model. ``missing`` are tensors of the model
    that keep the values they had: those of the head, tables of relative positions where the file
    has none, and a final norm (ViTDet has none).
    """

    source: str  # the path or address
    format: Layout  # whose layout the file has
    net: str = ""  # what net it is, in words; empty where only the layout is known
    loaded: list[str] = field(default_factory=list)  # tensors that were copied into the model
    converted: dict[str, str] = field(default_factory=dict)  # each with what was done
    resized: dict[str, str] = field(default_factory=dict)  # to the model's grid, likewise
    left_out: dict[str, str] = field(default_factory=dict)  # tensors of the file, with the reason
    missing: list[str] = field(default_factory=list)
    averaged: str | None = None  # where the file holds averaged weights too, which were not taken

    def __str__(self) -> str:
        what = ": ".join(filter(None, (self.format, self.net)))
        lines = [f"{self.source} ({what}): {len(self.loaded)} tensors loaded"]
        reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
        for did in ("converted", "resized", "left_out"):
            for name, why in getattr(self, did).items():
                reasons[did.replace("_", " "), why].append(name)
        lines += [f"{did} {some_of(names)}: {why}" for (did, why), names in reasons.items()]
        if self.averaged is not None:
            lines.append(f"not taken: averaged weights under {self.averaged!r} (ema=True)")
        if others := [name for name in self.missing if not is_table(name)]:
            lines.append(f"left unchanged: {', '.join(others)}")
        if tables := [name for name in self.missing if is_table(name)]:
            count = f"{len(tables)} tables of relative positions"
            lines.append(f"not in the file, unchanged: {count} ({some_of(sorted(tables))})")
        return "\n  ".join(lines)


def adapt(translation: Translation, model: nn.Module, report: LoadReport) -> None:
    """Make what a file holds fit a model, in place, and say in the report what was done; a
    WeightsError for a net of two streams in a model of one, or that cannot become the other."""
    tensors, own = translation.tensors, model.state_dict()
    foreign = translation.layout not in ("own", "PySlowFast", "mmpretrain")
    class_token = _CLS in tensors
    if foreign:
        _fit_prefix(tensors, own, report)
    elif translation.layout == "mmpretrain":
        _drop_stale_class_token(tensors, report)
    for name in [*tensors]:
        bare = name.rpartition("backbone.")[2]
        why = next((why for start, why in _PARTS.items() if re.match(start, bare)), None)
        if name not in own and (why or name in translation.beside):
            del tensors[name]
            report.left_out[name] = why or "not of the net itself"
    if not isinstance(model, Trunk):
        return
    if foreign:
        _fit_layer_scale(tensors, own, report)
        _fit_head(tensors, own, model.global_pool, class_token, report)
    if foreign or own.keys().isdisjoint(("norm.weight", "fc_norm.weight")):
        _fit_norm(tensors, own, report)
    if translation.streams > model.streams:
        raise WeightsError(
            "it is of a reversible net, whose branches a plain one joins in another way: take its "
            "reversible twin (rev_…)"
        )
    if translation.streams < model.streams:
        _rewire(tensors, own, report)


def _drop_stale_class_token(tensors: Tensors, report: LoadReport) -> None:
    """Early mmpretrain allocated a class token and its position and used neither."""
    position = tensors.get(_POSITION)
    if "cls_token" not in tensors or position is None or position.ndim != 3:
        return
    if _rows_in_front(position.shape[1], (1,), {}):
        # Extra tokens stand before those of the patches.
        tensors[_POSITION] = position[:, 1:]
        del tensors["cls_token"]
        report.left_out["cls_token"] = "not used by the model"
        report.left_out[f"{_POSITION}[:, 0]"] = "the position of cls_token"


def _fit_prefix(tensors: Tensors, own: Mapping[str, Tensor], report: LoadReport) -> None:
    """Tokens in front of the patches' take in their positions, or go where the model has none."""
    position, registers = tensors.get(_POSITION), tensors.get(_REGISTERS)
    rows, special = 0, 1 + ("dist_token" in tensors)
    if position is not None and position.ndim == 3:
        more = registers.shape[1] if registers is not None and registers.ndim == 3 else 0
        rows = _rows_in_front(position.shape[1], (special, special + more, 0), own)
        tensors[_POSITION] = position[:, rows:]
    for name, first, what in ((_CLS, 0, "class token"), (_REGISTERS, special, "registers")):
        if (token := tensors.get(name)) is None:
            continue
        if name not in own:
            del tensors[name]
            report.left_out[name] = f"the model has no {what}"
        elif position is not None and rows > first and token.ndim == 3:
            own_rows = position[:, first : first + token.shape[1]]
            if own_rows.shape[1:] == token.shape[1:]:
                tensors[name] = token + own_rows
                report.converted[name] = "its position is added to it"
    if rows and _CLS not in own:
        report.left_out[f"{_POSITION}[:, :{rows}]"] = "of tokens that are no patches"


def _rows_in_front(rows: int, candidates: tuple[int, ...], own: Mapping[str, Tensor]) -> int:
    """How many rows of a position embedding are not of patches: these are a square as a rule."""
    wanted = own[_POSITION].shape[1] if _POSITION in own and own[_POSITION].ndim == 3 else None
    for count in candidates:
        if rows - count == wanted:
            return count
    square = (count for count in candidates if 0 < isqrt(max(rows - count, 0)) ** 2 == rows - count)
    return next(square, 0)


def _fit_layer_scale(tensors: Tensors, own: Mapping[str, Tensor], report: LoadReport) -> None:
    """Factors behind a layer are those of its rows."""
    folded = 0
    for name in [name for name in tensors if name.endswith(".ls.gamma") and name not in own]:
        start = name.removesuffix("ls.gamma")
        layer = start + ("attn.proj" if start.endswith(".f.") else "mlp.fc2")
        names, none = (name, f"{layer}.weight", f"{layer}.bias"), torch.empty(0)
        gamma, weight, bias = (tensors.get(name, none) for name in names)
        if weight.ndim != 2 or not gamma.shape == bias.shape == weight.shape[:1]:
            raise WeightsError(f"{name} belongs to no layer {layer}")
        # Multiplied in half precision, they would be rounded twice.
        gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
        tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = weight * gamma[:, None], bias * gamma
        del tensors[name]
        folded += 1
    if folded:
        report.converted[f"LayerScale ({folded} tensors)"] = "folded into attn.proj and mlp.fc2"
    if absent := [name for name in own if name.endswith(".ls.gamma") and name not in tensors]:
        tensors |= {name: torch.ones_like(own[name], device="cpu") for name in absent}
        report.converted[f"LayerScale ({len(absent)} tensors)"] = "1, since the file has none"


def _fit_head(
    tensors: Tensors, own: Mapping[str, Tensor], pool: str, class_token: bool, report: LoadReport
) -> None:
    """Leave a head out that reads something else than the model's does."""
    head, norm = tensors.get("head.weight"), tensors.get("patch_embed.proj.weight")
    if head is None or "head.weight" not in own:
        return
    behind = "fc_norm.weight" in tensors
    theirs = _words("token" if class_token and not behind else "avg", behind)
    if norm is not None and head.ndim == 2 and head.shape[1] == 2 * norm.shape[0]:
        theirs = "the class token beside the mean of the patches"
    mine = _words(pool, "fc_norm.weight" in own)
    if mine != theirs:
        for name in [name for name in tensors if name.startswith("head.")]:
            del tensors[name]
            report.left_out[name] = f"it reads {theirs}, the model's reads {mine}"


def _words(pool: str, behind: bool) -> str:
    if pool == "token":
        return "the class token"
    return f"the mean of the patches, with the norm {'behind' if behind else 'before'} it"


def _fit_norm(tensors: Tensors, own: Mapping[str, Tensor], report: LoadReport) -> None:
    """The norm before the pooling, behind it, or none."""
    for end in ("weight", "bias"):
        here, there = f"norm.{end}", f"fc_norm.{end}"
        if here not in own:
            here, there = there, here
        if here not in tensors and there in tensors and here in own:
            tensors[here] = tensors.pop(there)
            report.converted[here] = f"the file's {there}"
        if there in tensors:
            del tensors[there]
            report.left_out[there] = "the model has no such norm"
        if here in own and here not in tensors:
            report.missing.append(here)


def _rewire(tensors: Tensors, own: Mapping[str, Tensor], report: LoadReport) -> None:
    """A plain net's branches become f and g; norm and head see two streams (Re2TAL, CVPR 2023)."""
    if any(".fuse." in name for name in own.keys() - tensors.keys()):
        raise WeightsError(
            "it is of a plain net, which has no fusion of two streams: create the model with "
            "fusion='avg'"
        )
    report.converted["blocks"] = "the branches of a plain net in a reversible one: fine-tune it"
    for name in ("norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias", "head.weight"):
        value, mine = tensors.get(name), own.get(name)
        if value is None or mine is None or value.ndim != mine.ndim:
            continue
        if value.shape[-1] * 2 == mine.shape[-1]:
            twice, adds = torch.cat([value, value], dim=-1), name == "head.weight"
            tensors[name] = twice / 2 if adds else twice
            halved = ", halved" if adds else ""
            report.converted[name] = f"two copies{halved}, one for each stream"
