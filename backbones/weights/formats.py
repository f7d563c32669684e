"""The checkpoint layouts of other implementations: their names, their configuration.

PySlowFast (github.com/facebookresearch/SlowFast, ``slowfast/models/reversible_mvit.py``) and
mmpretrain (github.com/open-mmlab/mmpretrain, ``mmpretrain/models/backbones/revvit.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backbones.common.errors import optional_import
from backbones.engine.policies import blocks_of
from backbones.weights.checkpoint import WeightsError

__all__ = ["Layout", "convert_state_dict", "model_of_cfg", "recognise"]

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


# What the models of this package are, in PySlowFast's configuration. A key that an old file does
# not have yet stands for what it became, so only keys that are there are compared.
# CLS_EMBED_ON is not among them: the published Kinetics configuration sets it, although the model
# cannot have a class token.
_EXPECTED: dict[str, object] = {
    "MODEL.MODEL_NAME": "MViT",
    "MVIT.REV.ENABLE": True,
    "MVIT.REV.RESPATH_FUSE": "concat",
    "MVIT.MODE": "conv",
    "MVIT.NORM": "layernorm",
    "MVIT.NORM_STEM": False,
    "MVIT.DROPOUT_RATE": 0.0,
    "MVIT.POOL_FIRST": False,
    "MVIT.USE_ABS_POS": True,
    "MVIT.USE_FIXED_SINCOS_POS": False,
    "MVIT.USE_MEAN_POOLING": False,
}


def model_of_cfg(cfg: str) -> tuple[str, dict[str, Any]]:
    """Read the configuration that a PySlowFast checkpoint carries, YAML text.

    Returns:
        a registered name of that kind of model, of whatever size, and the arguments that make
        :func:`create_model` build the same model.

    Raises:
        WeightsError: no YAML; a key that is needed is missing; or a model that this package does
            not have. The message names the key.
        ImportError: PyYAML is not installed.
    """
    yaml = optional_import("yaml", "pyyaml", "reading the cfg of a PySlowFast checkpoint")
    try:
        tree = yaml.safe_load(cfg)
    except yaml.YAMLError as error:
        raise WeightsError("the cfg in the checkpoint is no YAML") from error
    flat = _flatten(tree)
    _expect(flat, _EXPECTED)
    try:
        return _arguments(flat)
    except KeyError as error:
        raise WeightsError(f"the cfg in the checkpoint lacks {error.args[0]}") from error
    except (TypeError, IndexError) as error:
        raise WeightsError("the cfg in the checkpoint has a value of a wrong type") from error


def _flatten(tree: object, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}".lstrip("."))
    return flat


def _expect(cfg: dict[str, Any], expected: dict[str, object], beside: str = "") -> None:
    for key, value in expected.items():
        if cfg.get(key, value) != value:
            raise WeightsError(
                f"no model of this package has {key} {cfg[key]}{beside} (only {value})"
            )


def _arguments(cfg: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    arguments: dict[str, Any] = {
        "img_size": cfg["DATA.TRAIN_CROP_SIZE"],
        "in_chans": cfg["DATA.INPUT_CHANNEL_NUM"][0],
        "num_classes": cfg["MODEL.NUM_CLASSES"],
        "embed_dim": cfg["MVIT.EMBED_DIM"],
        "depth": cfg["MVIT.DEPTH"],
        "num_heads": cfg["MVIT.NUM_HEADS"],
        "mlp_ratio": cfg["MVIT.MLP_RATIO"],
        "qkv_bias": cfg["MVIT.QKV_BIAS"],
        "drop_rate": cfg["MODEL.DROPOUT_RATE"],
        "drop_path_rate": cfg["MVIT.DROPPATH_RATE"],
    }
    images, transitions = cfg["MVIT.PATCH_2D"], cfg["MVIT.REV.BUFFER_LAYERS"]
    # The tables have the names and the shapes of ours, and attention adds the same to its logits.
    rel_pos = arguments["use_rel_pos"] = cfg.get("MVIT.REL_POS_SPATIAL", False)
    tables = {"MVIT.REL_POS_TEMPORAL": rel_pos and not images}
    _expect(cfg, tables, f" with MVIT.REL_POS_SPATIAL {rel_pos}")
    doubled = [[layer, 2.0] for layer in transitions]
    stages: dict[str, object] = {
        "MVIT.DIM_MUL": doubled,
        "MVIT.HEAD_MUL": doubled,
        "MVIT.POOL_Q_STRIDE": [[layer, 1, 2, 2] for layer in transitions],
        "MVIT.POOL_KV_STRIDE": [],
    }
    if not transitions:
        patch = cfg["MVIT.PATCH_KERNEL"][0]
        plain = {
            "MVIT.PATCH_2D": True,
            "MVIT.RESIDUAL_POOLING": False,
            "MVIT.POOL_KV_STRIDE_ADAPTIVE": None,
            "MVIT.PATCH_KERNEL": [patch, patch],
            "MVIT.PATCH_STRIDE": [patch, patch],
            "MVIT.PATCH_PADDING": [0, 0],
        }
        _expect(cfg, stages | plain, " without stages")
        return "rev_vit_base", {**arguments, "patch_size": patch}

    stride = cfg["MVIT.POOL_KV_STRIDE_ADAPTIVE"][-1]
    pooled = {
        "MVIT.POOL_KV_STRIDE_ADAPTIVE": [1, stride, stride],
        "MVIT.POOL_KVQ_KERNEL": [1 if images else 3, 3, 3],
        "MVIT.PATCH_KERNEL": [7, 7] if images else [3, 7, 7],
        "MVIT.PATCH_STRIDE": [4, 4] if images else [2, 4, 4],
        "MVIT.PATCH_PADDING": [3, 3] if images else [1, 3, 3],
        "MVIT.SEP_POS_EMBED": not images,
    }
    _expect(cfg, stages | pooled, " with stages")
    return "rev_mvit_base" if images else "rev_mvit_base_16x4", {
        **arguments,
        "num_frames": None if images else cfg["DATA.NUM_FRAMES"],
        "transitions": tuple(transitions),
        "kv_stride": stride,
        "fusion": cfg.get("MVIT.REV.PRE_Q_FUSION", "avg"),
        "residual_pooling": cfg.get("MVIT.RESIDUAL_POOLING", False),
    }
