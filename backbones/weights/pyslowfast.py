"""Models built from the configuration inside a PySlowFast checkpoint."""

from __future__ import annotations

from os import PathLike
from typing import Any

from backbones.common.errors import optional_import
from backbones.models.trunk import Trunk
from backbones.registry import name_of
from backbones.weights.checkpoint import Checkpoint, WeightsError, read_checkpoint
from backbones.weights.loading import build_described


def from_pyslowfast(path: str | PathLike[str] | Checkpoint) -> Trunk:
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
    checkpoint = read_checkpoint(path)
    if checkpoint.cfg is None:
        instead = "use create_model(…) and load_weights(…)"
        raise WeightsError(f"{checkpoint.path} has no PySlowFast cfg inside; {instead}")
    try:
        name, arguments = _model_of_cfg(checkpoint.cfg)
    except WeightsError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from error
    model = build_described(checkpoint, name, arguments)
    # The cfg names no size: what is called "rev_vit_base" so far may be any Rev-ViT.
    vars(model)["config"]["name"] = name_of(model) or name
    return model


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


def _model_of_cfg(cfg: str) -> tuple[str, dict[str, Any]]:
    """A registered name of that kind of model, of whatever size, and all of its arguments."""
    yaml = optional_import("yaml", "weights", "reading the cfg of a PySlowFast checkpoint")
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
        if (given := cfg.get(key, value)) != value:
            raise WeightsError(f"no model of this package has {key} {given}{beside} (only {value})")


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
