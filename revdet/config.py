"""Recipes: loading a LazyConfig file and applying ``key=value`` overrides, checked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from backbones.common.errors import UserError, first_line
from backbones.common.settings import check_values, keys_of, split_override, unknown_key, verbatim
from revdet.data.datasets import name_own_data
from revdet.install import RECIPES
from revdet.settings import SECTIONS

# What train_net.py needs from a recipe.
REQUIRED = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

# What the config.yaml of earlier versions names, and where it is now.
MOVED = {
    "revdet.backbone.TrunkBackbone": "revdet.TrunkBackbone",
    "revdet.dataloader.TrainMapper": "revdet.data.loader.TrainMapper",
    "revdet.dataloader.build_train_loader": "revdet.data.loader.build_train_loader",
    "revdet.evaluation.FasterCOCOEvaluator": "revdet.training.evaluation.FasterCOCOEvaluator",
    "revdet.solver.get_optimizer_params": "revdet.training.optim.get_optimizer_params",
}

# What the config.yaml of a run may name: a file of strangers shall build models, not call programs.
# Both the name and the module that defines what it names are looked at.
BUILDABLE = (
    "backbones.create_model",
    "backbones.factory.",
    "backbones.models.",
    "revdet.TrunkBackbone",
    "revdet.data.loader.",
    "revdet.models.",
    "revdet.priors.",
    "revdet.training.evaluation.",
    "revdet.training.optim.",
    "detectron2.data.build",
    "detectron2.data.get_detection_dataset_dicts",
    "detectron2.data.DatasetMapper",
    "detectron2.data.dataset_mapper.",
    "detectron2.data.transforms.",
    "detectron2.evaluation.",
    "detectron2.layers.",
    "detectron2.modeling.",
    "detectron2.solver.",
    "fvcore.common.param_scheduler.",
    "torch.nn.",
    "torch.optim.",
)

_TYPED = {key.path: key for name, section in SECTIONS.items() for key in keys_of(section, name)}


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a recipe and apply overrides to it.

    ``path`` is a LazyConfig ``.py`` file, the ``config.yaml`` that a run has saved, or the name of
    a recipe that comes with this package, such as ``coco/mask_rcnn_rev_vit_base_100ep``. Overrides
    are ``section.key=value``: the value of a typed key that is a string is taken as it stands, any
    other in Hydra's syntax, and the key must exist in the recipe, or be an argument of what the
    recipe builds there. A UserError says that there is no such file, that it is no recipe, which
    key is unknown (and which are near), or which value is of the wrong type or out of bounds.
    """
    path = RECIPES.find(path)
    cfg = _read(path)
    for where, node in nodes_of(cfg):
        if isinstance(node, DictConfig) and "_target_" in node:
            if isinstance(node._target_, str):
                node._target_ = MOVED.get(node._target_, node._target_)
                if not path.endswith(".py"):
                    _check_buildable(node._target_, f"config {path}")
            known = _known_keys(node)
            for key in node:
                if known is not None and key not in (*known, "_target_"):
                    raise _unknown(f"{where}.{key!s}".lstrip("."), known, f"config {path}")
    for name in SECTIONS:
        cfg[name] = _typed(name, cfg.get(name, {}), f"config {path}")
    for override in overrides:
        _apply(cfg, override)
    given = {override.partition("=")[0] for override in overrides}
    if "train.max_iter" in given and cfg.train.epochs:
        if "train.epochs" in given:
            raise UserError("train.max_iter and train.epochs are both given: set one of the two")
        cfg.train.epochs = 0.0  # the recipe's
    for name, section in SECTIONS.items():
        check_values(cfg[name], section, name)
    name_own_data(cfg)
    return cfg


def own_keys(node: Any) -> list[Any]:
    """The keys or indices of a config node whose values stand there: no ``${…}``."""
    keys = range(len(node)) if OmegaConf.is_list(node) else node
    return [key for key in keys if not OmegaConf.is_interpolation(node, key)]


def nodes_of(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config node and every section and list below it, each with its path."""
    yield path, node
    for name in own_keys(node):
        if OmegaConf.is_config(node[name]):
            yield from nodes_of(node[name], f"{path}.{name}".lstrip("."))


def _read(path: str) -> DictConfig:
    try:
        cfg = LazyConfig.load(path) if path.endswith(".py") else read_yaml(path)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise UserError(f"config {path!r} cannot be read: {reason}") from error
    if missing := [section for section in REQUIRED if not OmegaConf.is_dict(cfg.get(section))]:
        lacks = f"it lacks the section(s) {', '.join(missing)}"
        raise UserError(f"config {path!r} is no recipe: {lacks}")
    return cfg


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """YAML without Python objects, but for those that recipes hold."""


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node)
)
_Loader.add_constructor(
    "tag:yaml.org,2002:python/object:detectron2.layers.shape_spec.ShapeSpec",
    lambda loader, node: ShapeSpec(**loader.construct_mapping(node)),
)


def read_yaml(path: str) -> DictConfig:
    """The config of a run. Nothing in it is executed: no tag, no resolver as in ``${oc.env:}``."""
    text = Path(path).read_text(encoding="utf-8")
    if resolver := re.search(r"(?<!\\)(?:\\\\)*\$\{[^{}]*:", text):
        raise ValueError(f"{resolver[0]}…}} is no key of it")
    content = yaml.load(text, Loader=_Loader)
    if not isinstance(content, dict):
        raise ValueError("it holds no sections")
    return OmegaConf.create(content, flags={"allow_objects": True})


def _check_buildable(target: str, where: str) -> None:
    home = ""
    if target.startswith(BUILDABLE) and ".__" not in target:
        try:
            found = locate(target)
            home = f"{found.__module__}.{found.__qualname__}"
        except (ImportError, AttributeError) as error:
            wrong = f"{where} names {target!r}, which cannot be imported"
            raise UserError(f"{wrong}: correct it") from error
    if not home.startswith(BUILDABLE):
        remedy = "only a .py recipe may build what is not of a recipe's packages"
        raise UserError(f"{where} names _target_ {target!r}: {remedy}")


def _typed(name: str, given: Any, where: str) -> DictConfig:
    """A typed section: the defaults and what a recipe gives, of which names and types are right."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SECTIONS[name]), given)
    except ConfigKeyError as error:
        raise _unknown(f"{name}.{error.full_key}", (), where) from error
    except OmegaConfBaseException as error:
        key = f"{name}.{error.full_key or ''}".rstrip(".")
        raise UserError(f"{where}: {key}: {first_line(error)}") from error
    # Plain again, because a typed node would be saved as a Python object.
    return DictConfig(OmegaConf.to_container(merged))


def _apply(cfg: DictConfig, override: str) -> None:
    if override.startswith(("+", "~")):
        raise UserError(f"override {override!r}: write key=value, without '+' or '~'")
    key, text = split_override(override)
    kind = _TYPED[key].type_name if key in _TYPED else ""
    if kind == "str":
        _set(cfg, key, verbatim(text), text)
        return
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}")
    except HydraException as error:
        wrong = "the value is no number, list, … and, if it is a text, needs quotes"
        raise UserError(f"override {override!r}: {wrong}") from error
    if parsed.is_sweep_override():
        raise UserError(f"override {override!r} has several values: write a list [a,b]")
    if kind == "list" and not isinstance(parsed.value(), list):
        raise UserError(f"{key} takes a list such as [a,b], got {text}")
    _set(cfg, key, parsed.value(), text)


def _set(cfg: DictConfig, key: str, value: Any, text: str) -> None:
    """Set a key to ``value``, which was written as ``text``."""
    parts, old = key.split("."), cfg
    for depth, part in enumerate(parts):
        if not OmegaConf.is_config(old):
            where = ".".join(parts[:depth])
            raise UserError(f"there is no key {key!r}: {where} is the value {old!r}")
        known = _known_keys(old)
        if known is not None and part not in known:
            raise _unknown(".".join(parts[: depth + 1]), known)
        old = OmegaConf.select(old, part)
    if isinstance(old, DictConfig) and isinstance(value, dict):
        for name, item in value.items():
            _set(cfg, f"{key}.{name}", item, str(item))
        return
    if isinstance(old, str) and isinstance(value, int | float) and not isinstance(value, bool):
        value = text  # a folder may be called 2017
    if old is not None and not _same_kind(old, value):
        if isinstance(old, DictConfig):
            keys = ", ".join(map(str, old))
            raise UserError(f"{key} is a section, with the keys {keys}; got {text}")
        raise UserError(f"{key} takes a value like {old!r} ({type(old).__name__}), got {value!r}")
    OmegaConf.update(cfg, key, value)


def _same_kind(old: object, new: object) -> bool:
    if isinstance(old, DictConfig) or isinstance(new, dict):
        return False
    if isinstance(old, int):  # or bool, which is a kind of its own
        return type(new) is type(old)
    if isinstance(old, float):
        return type(new) in (int, float)
    return not isinstance(new, bool | None)


def _known_keys(node: DictConfig | ListConfig) -> list[str] | None:
    """What may stand under ``node``; None if what it builds takes any keyword."""
    if isinstance(node, ListConfig):
        return [str(index) for index in range(len(node))]
    if "_target_" not in node:
        return [str(key) for key in node]
    target = node._target_
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


def _unknown(path: str, siblings: Sequence[str], where: str = "") -> UserError:
    """The error for a key that does not exist; ``siblings`` are those that could stand there."""
    parent = path.rpartition(".")[0]
    typed = [known for known in _TYPED if known.startswith(f"{path.partition('.')[0]}.")]
    return unknown_key(path, typed or [f"{parent}.{s}".lstrip(".") for s in siblings], where)
