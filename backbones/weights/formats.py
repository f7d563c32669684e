"""The checkpoint layouts of other implementations: their names for our names.

PySlowFast (github.com/facebookresearch/SlowFast, ``slowfast/models/reversible_mvit.py``),
mmpretrain (github.com/open-mmlab/mmpretrain, ``mmpretrain/models/backbones/revvit.py``), timm
(``timm/models/vision_transformer.py``; DeiT, MAE and DINOv2 have its names), Hugging Face's
transformers (``models/vit``, ``models/dinov2``; the names of its files and those in its memory),
torchvision (``models/vision_transformer.py``) and Detectron2 (``modeling/backbone/vit.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from backbones.engine.policies import blocks_of
from backbones.weights.checkpoint import WeightsError

Layout = Literal[
    "own",
    "PySlowFast",
    "mmpretrain",
    "timm",  # also DeiT, MAE, DINOv2
    "Detectron2",  # ViTDet
    "Hugging Face",
    "torchvision",
    "PyTorchVideo",  # read by revvideo alone
]

# Their names for our names, first match first. ``{block}`` is the i-th block of the model, in the
# order of the forward pass, whatever stage it lies in.
_LAYER = r"^(?:rev_backbone\.)?layers\.(\d+)"
_TIMM = r"^blocks\.(?:\d+\.)?(\d+)"  # in chunks, as DINOv2 trains
_HF = r"^(?:encoder\.)?layers?\.(\d+)"
_TV = r"^encoder\.layers\.encoder_layer_(\d+)"
_TIMM_NAMES = (
    (_TIMM + r"\.norm1\.", "{block}.f.norm."),
    (_TIMM + r"\.attn\.", "{block}.f.attn."),
    (_TIMM + r"\.ls1\.", "{block}.f.ls."),
    (_TIMM + r"\.norm2\.", "{block}.g.norm."),
    (_TIMM + r"\.mlp\.w12\.", "{block}.g.mlp.fc1."),
    (_TIMM + r"\.mlp\.w3\.", "{block}.g.mlp.fc2."),
    (_TIMM + r"\.mlp\.", "{block}.g.mlp."),
    (_TIMM + r"\.ls2\.", "{block}.g.ls."),
    (r"^pos_embed$", "pos_embed.weight"),
    (r"^cls_token$", "prefix.cls_token"),
    (r"^reg(?:ister)?_tokens?$", "prefix.register_tokens"),
)
_RENAMES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "own": (),
    "PySlowFast": (
        (_LAYER + r"\.F\.", "{block}.f."),
        (_LAYER + r"\.G\.", "{block}.g."),
        (_LAYER + r"\.pre_q_fuse\.fuse_fn\.", "{block}.fuse."),
        (_LAYER + r"\.", "{block}."),
        (r"^pos_embed$", "pos_embed.weight"),
        (r"^pos_embed_spatial$", "pos_embed.spatial.weight"),
        (r"^pos_embed_temporal$", "pos_embed.temporal"),
        (r"^head\.projection\.", "head."),
    ),
    "mmpretrain": (
        (_LAYER + r"\.ln1\.", "{block}.f.norm."),
        (_LAYER + r"\.attn\.", "{block}.f.attn."),
        (_LAYER + r"\.ln2\.", "{block}.g.norm."),
        (_LAYER + r"\.ffn\.layers\.0\.0\.", "{block}.g.mlp.fc1."),
        (_LAYER + r"\.ffn\.layers\.1\.", "{block}.g.mlp.fc2."),
        (r"^pos_embed$", "pos_embed.weight"),
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^ln1\.", "norm."),
        (r"^head\.fc\.", "head."),
    ),
    "timm": _TIMM_NAMES,
    "Detectron2": _TIMM_NAMES,
    "Hugging Face": (
        (_HF + r"\.(?:layernorm_before|norm1)\.", "{block}.f.norm."),
        (_HF + r"\.attention\.(?:attention\.)?q(?:uery|_proj)\.", "{block}.f.attn.q."),
        (_HF + r"\.attention\.(?:attention\.)?k(?:ey|_proj)\.", "{block}.f.attn.k."),
        (_HF + r"\.attention\.(?:attention\.)?v(?:alue|_proj)\.", "{block}.f.attn.v."),
        (_HF + r"\.attention\.(?:output\.dense|o_proj)\.", "{block}.f.attn.proj."),
        (_HF + r"\.layer_scale1\.lambda1$", "{block}.f.ls.gamma"),
        (_HF + r"\.(?:layernorm_after|norm2)\.", "{block}.g.norm."),
        (_HF + r"\.mlp\.gate_proj\.", "{block}.g.mlp.gate."),
        (_HF + r"\.mlp\.up_proj\.", "{block}.g.mlp.up."),
        (_HF + r"\.(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.", "{block}.g.mlp.fc1."),
        (_HF + r"\.(?:output\.dense|mlp\.(?:fc2|weights_out|down_proj))\.", "{block}.g.mlp.fc2."),
        (_HF + r"\.layer_scale2\.lambda1$", "{block}.g.ls.gamma"),
        (r"^embeddings\.position_embeddings$", "pos_embed.weight"),
        (r"^embeddings\.cls_token$", "prefix.cls_token"),
        (r"^embeddings\.register_tokens$", "prefix.register_tokens"),
        (r"^embeddings\.mask_token$", "mask_token"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    ),
    "torchvision": (
        (_TV + r"\.ln_1\.", "{block}.f.norm."),
        (_TV + r"\.self_attention\.in_proj_", "{block}.f.attn.qkv."),
        (_TV + r"\.self_attention\.out_proj\.", "{block}.f.attn.proj."),
        (_TV + r"\.ln_2\.", "{block}.g.norm."),
        (_TV + r"\.mlp\.(?:0|linear_1)\.", "{block}.g.mlp.fc1."),
        (_TV + r"\.mlp\.(?:3|linear_2)\.", "{block}.g.mlp.fc2."),
        (r"^encoder\.pos_embedding$", "pos_embed.weight"),
        (r"^class_token$", "prefix.cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
    ),
}

# Names by which a layout is known at once; timm's are part of others too.
_SIGNS: dict[str, Layout] = {
    r"rev_backbone\.": "PySlowFast",
    r"patch_embed\.projection\.": "mmpretrain",
    r"\.encoder_layer_": "torchvision",
    r"embeddings\.patch_embeddings\.": "Hugging Face",
    r"(^|\.)blocks\.\d+\.(\d+\.)?attn\.rel_pos_[hw]$": "Detectron2",
}
# What a net's first layer is called. What stands before it, stands before all names of the net.
_FIRST = re.compile(
    r"(.*?)(?:patch_embed\.proj|patch_embed\.projection|embeddings\.patch_embeddings\.projection"
    r"|conv_proj)\.weight"
)
_AVERAGED = ("teacher", "ema", "averaged")

# Names of nets that compute something else, by which they are refused.
_OTHERS = {
    r"norm_pre\.|transformer\.resblocks\.|vision_model\.": "a tower of CLIP (a norm before the "
    "blocks, or QuickGELU)",
    r"attn_pool\.": "a tower of SigLIP (pooling by attention)",
    r"cls_positional_encoding\.|patch_embed\.patch_model\.": "PyTorchVideo's MViT (norms inside "
    "the attention)",
    r"^(stages\.\d+\.)?blocks\.\d+\.(blocks\.\d+\.)?attn\.(pool|norm)_[qkv]": "an MViT or MViTv2 "
    "of SlowFast, timm or Detectron2 (norms inside the attention)",
    r"relative_position_bias_table|attn\.rel_pos\.": "a net with a table of relative biases "
    "(BEiT, Swin)",
    r"(^|[._])rope(_embed)?[._]|periods$": "a net with rotary positions (DINOv3, EVA-02)",
    r"attn\.[qv]_bias$|attention\.[qv]_bias$": "VideoMAE, BEiT or EVA-02 (biases of q and v apart)",
    r"\.gamma_[12]$": "a net without absolute positions (DINOv3, EVA-02)",
    r"attn\.[qk]_norm\.": "a net with norms of q and k",
    r"^(features|layers)\.\d+\.(blocks\.)?\d+\.|^layer[1-4]\.|downsample": "no vision transformer "
    "of these",
}


@dataclass
class Translation:
    """Tensors by the names of a model of this package, or their own where they have none there."""

    tensors: dict[str, Tensor]
    layout: Layout  # whose names they had
    beside: list[str]  # names of those that do not belong to the net: of a decoder, of a detector
    streams: int  # how many the net has


def recognise(names: Iterable[str]) -> Layout:
    """Tell a layout by its names; what looks like none of the foreign ones is ``"own"``."""
    layout: Layout = "own"
    for name in names:
        for sign, found in _SIGNS.items():
            if re.search(sign, name):
                return found
        if re.search(r"(^|\.)blocks\.\d+\.(\d+\.)?(norm1|attn\.qkv)\.", name):
            layout = "timm"
    return layout


def prefixes_of(names: Iterable[str]) -> list[str]:
    """What stands before the names of each net among them, ``""`` for nothing."""
    return [match[1] for name in names if (match := _FIRST.fullmatch(name))]


def translate(state_dict: Mapping[str, Tensor], model: nn.Module, ema: bool = False) -> Translation:
    """As :func:`convert_state_dict`, and what was found out."""
    own = model.state_dict().keys()
    prefixes = prefixes_of(state_dict)
    averaged = [prefix for prefix in prefixes if any(word in prefix for word in _AVERAGED)]
    if len(prefixes) > 1 and 0 < len(averaged) < len(prefixes):
        prefixes = averaged if ema else [p for p in prefixes if p not in averaged]
    if len(prefixes) > 1 and "" not in prefixes:
        raise WeightsError(f"it holds {len(prefixes)} nets: {', '.join(prefixes)}")
    prefix = "" if not prefixes or "" in prefixes else prefixes[0]
    # A wrapper's name stands before the head's as well, the net's before the net's alone.
    wrappers = [f"{part}." for part in (prefix or "module.backbone.").split(".")[:-1]]
    names, beside = {}, []
    for key in state_dict:
        names[key] = key.removeprefix(prefix)
        if names[key] != key or (key in own and not prefix):
            continue
        for wrapper in wrappers:
            names[key] = names[key].removeprefix(wrapper)
        if prefix:
            beside.append(key)
    foreign = set(names.values()) - own
    for pattern, what in _OTHERS.items():
        if any(re.search(pattern, name) for name in foreign):
            raise WeightsError(f"it is {what}, which is another net than these")
    layout = recognise(names.values())
    blocks, plain = [*blocks_of(model)], {_of_one_stream(name): name for name in own}
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _rename(names[key], _RENAMES[layout], blocks)
        if name not in own:
            name = plain.get(_of_one_stream(name), name)
        if name in converted:
            raise WeightsError(f"the state dict holds {key} twice, under different prefixes")
        converted[name] = value
        names[key] = name
    _join_parts(converted, own)
    heads = tuple(name for name in own if name.startswith("head."))
    beside = [names[key] for key in beside if names[key] not in heads]
    streams = 2 if layout in ("PySlowFast", "mmpretrain") else 1
    if layout == "own":
        streams = _streams_of(state_dict) or _streams_of(own)
    return Translation(converted, layout, beside, streams)


def describe(translation: Translation) -> str:
    """What vision transformer a foreign file is of, in words."""
    tensors = translation.tensors
    blocks = sum(name.endswith(".f.norm.weight") for name in tensors)
    stem = tensors.get("patch_embed.proj.weight")
    if translation.layout in ("own", "PySlowFast", "mmpretrain") or stem is None or stem.ndim < 2:
        return ""
    words = [f"{blocks} blocks of {stem.shape[0]} channels", f"patches of {stem.shape[-1]}"]
    words += ["class token"] if "prefix.cls_token" in tensors else []
    registers = tensors.get("prefix.register_tokens", stem[:0, 0])
    words += [f"{registers.shape[1]} registers"] if registers.ndim == 3 and len(registers) else []
    words += ["LayerScale"] if any(name.endswith(".ls.gamma") for name in tensors) else []
    return ", ".join(words)


def convert_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of another implementation as ``model`` names its own.

    The layout is recognised by the names (:data:`Layout`). What stands before the names of a whole
    net (``module.``, ``backbone.``, …) is taken off, separate q, k and v become the rows of one
    ``qkv``, and the blocks of a net of one stream get the names of a reversible model's. Nothing
    is resized or folded (see :func:`load_weights`), so gradients can be converted like weights.
    What has no counterpart keeps its name.

    Args:
        state_dict: tensors by their foreign names; by our names, they pass through.
        model: a model of this package, or a module laid out like one; its values do not matter.

    Returns:
        a new dict. Tensors are not copied, except by the concatenation.

    Raises:
        WeightsError: two tensors for one name; q, k and v that do not go together; a net that is
            none of this package, by its name.
    """
    return translate(state_dict, model).tensors


def _streams_of(names: Iterable[str]) -> int:
    """2 for names of a reversible model of this package, 1 for a plain one's, 0 for others."""
    found = [name for name in names if re.search(r"(^|\.)blocks\.\d+\.[fg]\.", name)]
    return 0 if not found else 1 + ("blocks.blocks." in found[0])


def _of_one_stream(name: str) -> str:
    """A block's name as in a plain net; a reversible one has one more level."""
    return re.sub(r"(^|\.)blocks\.blocks\.", r"\1blocks.", name)


def _join_parts(tensors: dict[str, Tensor], own: Iterable[str]) -> None:
    """Separate q, k and v to one tensor, in place, and the two halves of a gated MLP."""
    for fused in own:
        for layer, *parts in ((".qkv.", "q", "k", "v"), (".fc1.", "gate", "up")):
            start, found_in, end = fused.rpartition(layer)
            separate = [f"{start}.{part}.{end}" for part in parts]
            found = [name for name in separate if found_in and name in tensors]
            if not found:
                continue
            what = f"{', '.join(parts[:-1])} and {parts[-1]}"
            if len(found) < len(separate) or fused in tensors:
                raise WeightsError(f"the state dict has no single set of {what} for {fused}")
            try:
                tensors[fused] = torch.cat([tensors.pop(name) for name in separate])
            except RuntimeError as error:
                raise WeightsError(f"{what} for {fused} differ in shape") from error


def _rename(name: str, renames: tuple[tuple[str, str], ...], blocks: list[str]) -> str:
    for pattern, replacement in renames:
        if match := re.match(pattern, name):
            if "{block}" in replacement:
                index = int(match[1])
                if index >= len(blocks):
                    return name
                replacement = replacement.format(block=blocks[index])
            return replacement + name[match.end() :]
    return name
