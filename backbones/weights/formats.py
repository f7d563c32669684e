"""The checkpoint layouts of other implementations: their names for our names.

PySlowFast (github.com/facebookresearch/SlowFast, ``slowfast/models/reversible_mvit.py``) and
mmpretrain (github.com/open-mmlab/mmpretrain, ``mmpretrain/models/backbones/revvit.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from backbones.engine.policies import blocks_of
from backbones.weights.checkpoint import WeightsError

Layout = Literal["own", "PySlowFast", "mmpretrain"]

# Their names for our names, first match first. ``{block}`` is the i-th block of the model, in the
# order of the forward pass, whatever stage it lies in.
_LAYER = r"^(?:rev_backbone\.)?layers\.(\d+)"
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
}


def recognise(names: Iterable[str]) -> Layout:
    """Tell a layout by its names; what looks like neither of the foreign ones is ``"own"``."""
    for name in names:
        if "rev_backbone." in name:
            return "PySlowFast"
        if "patch_embed.projection." in name:
            return "mmpretrain"
    return "own"


def convert_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of PySlowFast or mmpretrain as ``model`` names its own.

    The layout is recognised by the names. Prefixes ``module.`` and ``backbone.`` are taken off,
    and separate q, k and v become the rows of one ``qkv``. Nothing is resized (see
    :func:`load_weights`), so gradients can be converted like weights. What has no counterpart
    keeps its name.

    Args:
        state_dict: tensors by their foreign names; by our names, they pass through.
        model: a model of this package, or a module laid out like one; its values do not matter.

    Returns:
        a new dict. Tensors are not copied, except by the concatenation.

    Raises:
        WeightsError: two tensors for one name, or q, k and v that do not go together.
    """
    own = model.state_dict().keys()
    # Without what DistributedDataParallel and mmpretrain put in front of a name.
    names = {
        key: key if key in own else key.removeprefix("module.").removeprefix("backbone.")
        for key in state_dict
    }
    renames, blocks = _RENAMES[recognise(names.values())], [*blocks_of(model)]
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _rename(names[key], renames, blocks)
        if name in converted:
            raise WeightsError(f"the state dict holds {key} twice, under different prefixes")
        converted[name] = value
    for fused in own:
        start, qkv, end = fused.rpartition(".qkv.")
        separate = [f"{start}.{part}.{end}" for part in "qkv"]
        found = [name for name in separate if qkv and name in converted]
        if not found:
            continue
        if len(found) < 3 or fused in converted:
            raise WeightsError(f"the state dict has no single set of q, k and v for {fused}")
        try:
            converted[fused] = torch.cat([converted.pop(name) for name in separate])
        except RuntimeError as error:
            raise WeightsError(f"q, k and v for {fused} differ in shape") from error
    return converted


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
