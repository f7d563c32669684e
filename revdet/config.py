"""Recipes: loading a LazyConfig file and applying ``key=value`` overrides, checked."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from backbones.common.errors import UserError
from revdet.data.own_data import DATASET_DEFAULTS

# What train_net.py needs from a recipe.
SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

# Settings of the run, and all the keys that the train section may have.
TRAIN_DEFAULTS = OmegaConf.create(
    dict(
        output_dir="output/run",
        init_checkpoint="",  # weights to start from, a file or an address
        max_iter=90000,
        seed=0,
        device="auto",  # cuda where there is one
        # What the trunk keeps for the backward pass: store, checkpoint or reversible.
        memory="reversible",
        stored_blocks=0,  # how many of its last blocks store whatever the policy
        memory_budget="",  # such as "8GB": choose both, so that a training step fits
        accumulate=1,  # batches per iteration, of which gradients are averaged
        # Images per iteration that the learning rate belongs to; with others it changes in
        # proportion. 0: it stays.
        reference_batch_size=0,
        amp=dict(enabled=False, dtype="bfloat16"),  # autocast; float16 scales the loss
        clip_grad_norm=0.0,  # 0: no clipping
        ema_decay=0.0,  # such as 0.9999: evaluate and keep an average of the weights
        deterministic=False,  # an operation that cannot be is an error
        ddp=dict(
            broadcast_buffers=False,
            find_unused_parameters=False,
            static_graph=False,
            gradient_as_bucket_view=True,  # one copy of the gradients less
            fp16_compression=False,
        ),
        checkpointer=dict(period=5000, max_to_keep=3),
        eval_period=5000,  # 0: at the end only
        log_period=20,
        check_data=True,  # decode every image before training starts
        pictures=8,  # validation images drawn with their predictions at the end
    )
)


def config_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """A parser of command lines that name a recipe and override it.

    Args:
        prog: the command.
        doc: its help: a summary and, after an empty line, what follows the options.
    """
    summary, _, examples = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        "--config-file",
        dest="config",
        required=True,
        metavar="FILE",
        help="the recipe: a file under configs/detection, or the config.yaml of a run",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the recipe")
    return parser


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a recipe and apply overrides to it.

    Args:
        path: a LazyConfig ``.py`` file, or the ``config.yaml`` that a run has saved.
        overrides: ``section.key=value`` in Hydra's syntax. The key must exist in the recipe, or be
            an argument of what the recipe builds there.

    Raises:
        UserError: no such file, a file that is no recipe, or an unknown key (the message lists
            the near ones) or a value of the wrong type.
    """
    if not Path(path).is_file():
        raise UserError(f"config {path!r} does not exist{_near_recipes(path)}")
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:
        raise UserError(f"config {path!r} cannot be read: {_one_line(error)}") from error
    missing = [section for section in SECTIONS if section not in cfg]
    if missing:
        raise UserError(
            f"config {path!r} is no recipe: it lacks the section(s) {', '.join(missing)}"
        )
    _check_tree(cfg, "")
    for section, defaults in (("train", TRAIN_DEFAULTS), ("dataset", DATASET_DEFAULTS)):
        given = cfg.get(section, {})
        if unknown := [key for key in given if key not in defaults]:
            key = f"{section}.{unknown[0]}"
            raise UserError(_unknown_key(key, unknown[0], [*defaults], section))
        cfg[section] = OmegaConf.merge(defaults, given)
    for override in overrides:
        _apply(cfg, override)
    return cfg


def _check_tree(node: object, where: str) -> None:
    """Refuse an argument that the target of a section does not take, before anything is built."""
    if isinstance(node, DictConfig):
        known = _parameters(node)
        for key in node:
            path = f"{where}.{key}".lstrip(".")
            if known is not None and key != "_target_" and key not in known:
                raise UserError(_unknown_key(path, str(key), known, where))
            if not OmegaConf.is_interpolation(node, key):
                _check_tree(node[key], path)
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            _check_tree(item, f"{where}.{index}")


def _apply(cfg: DictConfig, override: str) -> None:
    try:
        parsed = OverridesParser.create().parse_override(override)
        key, value = parsed.key_or_group, parsed.value()
    except (HydraException, ValueError) as error:
        raise UserError(f"override {override!r} is not of the form key=value") from error
    if parsed.is_delete() or parsed.is_add():
        raise UserError(f"override {override!r}: write key=value, without '+' or '~'")
    _set(cfg, key, value, override.partition("=")[2])


def _set(cfg: DictConfig, key: str, value: Any, typed: str) -> None:
    """Set a key to ``value``, which was written as ``typed``."""
    *parents, last = key.split(".")
    node = cfg
    for depth, part in enumerate(parents):
        node = _child(node, part, key, ".".join(parents[:depth]))
        if not OmegaConf.is_config(node):
            where = ".".join(parents[: depth + 1])
            raise UserError(f"config key {key!r} does not exist: {where} is the value {node!r}")
    known = _known_keys(node)
    if known is not None and last not in known:
        raise UserError(_unknown_key(key, last, known, ".".join(parents)))
    old = OmegaConf.select(cfg, key)
    if isinstance(old, DictConfig) and isinstance(value, dict):
        for name, item in value.items():
            _set(cfg, f"{key}.{name}", item, str(item))
        return
    if isinstance(old, str) and isinstance(value, int | float) and not isinstance(value, bool):
        value = typed  # a folder may be called 2017
    if old is not None and not _same_kind(old, value):
        kind = "a section" if OmegaConf.is_config(old) else type(old).__name__
        raise UserError(f"config key {key!r} takes a value like {old!r} ({kind}), got {value!r}")
    OmegaConf.update(cfg, key, value)


def _same_kind(old: object, new: object) -> bool:
    if isinstance(old, DictConfig) or isinstance(new, dict):
        return False
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, int):
        return isinstance(new, int)
    if isinstance(old, float):
        return isinstance(new, int | float)
    return new is not None


def _child(node: DictConfig | ListConfig, part: str, key: str, where: str) -> object:
    known = _known_keys(node)
    if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    if isinstance(node, DictConfig) and part in node:
        return node[part]
    raise UserError(_unknown_key(key, part, known or [], where))


def _known_keys(node: DictConfig | ListConfig) -> list[str] | None:
    """What may stand under ``node``; None if its target takes any keyword."""
    if isinstance(node, ListConfig):
        return [str(index) for index in range(len(node))]
    known = [str(key) for key in node if key != "_target_"]
    if "_target_" not in node:
        return known
    parameters = _parameters(node)
    return None if parameters is None else sorted({*known, *parameters})


def _parameters(node: DictConfig) -> list[str] | None:
    """The arguments of what ``node`` builds; None if it builds nothing or takes any keyword."""
    target = node.get("_target_")
    if target is None:
        return None
    if isinstance(target, str):
        try:
            target = locate(target)
        except ImportError as error:
            raise UserError(f"config names {target!r}, which cannot be imported") from error
    # Detectron2's @configurable wraps __init__; the signature shows through functools.wraps.
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _unknown_key(key: str, part: str, known: Sequence[str], where: str) -> str:
    near = difflib.get_close_matches(part, known, n=3) or sorted(known)[:12]
    prefix = f"{where}." if where else ""
    choices = ", ".join(prefix + name for name in near)
    return f"config key {key!r} does not exist; did you mean {choices}?"


def _near_recipes(path: str) -> str:
    recipes = [str(p) for p in sorted(Path("configs/detection").glob("*/*.py"))]
    recipes = [p for p in recipes if Path(p).parent.name != "common"]
    near = difflib.get_close_matches(path, recipes, n=3, cutoff=0.5) or recipes
    return f"; there are {', '.join(near)}" if near else ""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")
