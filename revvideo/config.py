"""The settings of a run: YAML files over the keys of :mod:`revvideo.settings`, with overrides.

A file may name another one under ``base:`` (relative to itself), and then holds only what differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from backbones.common.errors import UserError
from backbones.common.settings import check_values, keys_of, split_override, unknown_key, verbatim
from revvideo.data.stills import IMAGES
from revvideo.settings import RECIPES, Config, DataConfig

Tree = dict[str, Any]  # as YAML has it: sections, or what stands in their place

_KEYS = {entry.path: entry for entry in keys_of(Config)}
_TEXTS = [path.split(".") for path, entry in _KEYS.items() if entry.kind is str]
# m, n: strength and operations; mstd, p: spread of the strength, probability of each operation;
# mmax: largest strength; inc: whether all operations get stronger with the strength.
_RAND_AUGMENT = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(mstd|p)\d+(\.\d+)?)*")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides to it.

    ``path`` is a YAML file, also the ``config.yaml`` that a run has saved, or the name of a recipe
    that comes with this package, such as ``kinetics400/rev_mvit_b_16x4``; ``overrides`` are
    ``section.key=value``: a text as it is (``null`` is the empty one, as in YAML), any other value
    in YAML. A UserError says that there is no such file, that it is no recipe, which key is unknown
    (and which are near), or which value is of the wrong type or out of its range.
    """
    merged = OmegaConf.structured(Config)
    for where, tree in [*_read(str(path), ()), *map(_parse_override, overrides)]:
        for section, entry in _TEXTS:
            part = tree.get(section)
            if isinstance(part, dict) and part.get(entry, "") is None:  # as YAML reads `key:`
                part[entry] = ""
        part = tree.get("model")
        if isinstance(part, dict) and part.get("arguments") == {}:  # else merged with those before
            merged.model.arguments = {}
        try:
            merged = OmegaConf.merge(merged, tree)
        except OmegaConfBaseException as error:
            raise _explain(error, tree, where) from error
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"config {str(path)!r}, with the overrides: {_one_line(error)}") from error
    check_values(config, Config)
    for contradiction in _contradictions(config):
        raise UserError(contradiction)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write all settings as YAML, complete, so that it is a recipe itself."""
    tree = asdict(config)
    for section, entry in _TEXTS:
        tree[section][entry] = verbatim(tree[section][entry])
    path.write_text(OmegaConf.to_yaml(tree), encoding="utf-8")


def _read(name: str, seen: tuple[Path, ...]) -> list[tuple[str, Tree]]:
    """The trees of a file and of those it is based on, the latter first."""
    path = Path(RECIPES.find(name))
    where = f"config {str(path)!r}"
    if path.resolve() in seen:
        raise UserError(f"{where} is its own base")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{where} cannot be read: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where} is no recipe: it holds no sections")
    base = tree.pop("base", None)
    before = [] if base is None else _read(str(path.parent / str(base)), (*seen, path.resolve()))
    return [*before, (where, cast(Tree, tree))]


def _parse_override(text: str) -> tuple[str, Tree]:
    where = f"override {text!r}"
    name, value = split_override(text)
    if name.split(".") in _TEXTS:
        section, entry = name.split(".")
        return where, {section: {entry: "" if value == "null" else verbatim(value)}}
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{where} cannot be read: {_one_line(error)}") from error
    return where, cast(Tree, tree)


def _explain(error: OmegaConfBaseException, tree: Tree, where: str) -> UserError:
    """What is wrong with the tree, in the words of a recipe."""
    name = str(error.full_key).partition("[")[0]  # not which element of a list
    section, _, entry = name.partition(".")
    part = tree.get(section)
    if isinstance(error, ConfigKeyError):
        if not entry and isinstance(part, dict) and part:
            name = f"{section}.{next(iter(part))}"
        return unknown_key(name, _KEYS, where)
    if name in _KEYS and isinstance(part, dict):
        kind, value = _KEYS[name].type_name, part.get(entry)
        return UserError(f"{where}: {name} takes a value of type {kind}, got {value!r}")
    section = next(key for key, content in tree.items() if not isinstance(content, dict))
    first = next(path for path in _KEYS if path.startswith(f"{section}."))
    return UserError(f"{where}: {section} is a section, with keys such as {first}")


def _contradictions(config: Config) -> Iterator[str]:
    """What is wrong, and the bounds of single keys do not say."""
    data, augment, train, test = config.data, config.augment, config.train, config.test
    for name, value in (("scale", augment.scale), ("ratio", augment.ratio)):
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            yield f"augment.{name}={value}: give two numbers, the smaller one first"
    if data.layout == IMAGES:
        ones = {"data.num_frames": data.num_frames, "test.clips": test.clips}
        for name, number in {**ones, "test.crops": test.crops}.items():
            if number != 1:
                yield f"data.layout=images: an image is one frame, set {name}=1"
        if (data.mean, data.std) != (DataConfig().mean, DataConfig().std):
            given = f"data.mean={data.mean} data.std={data.std}"
            yield f"{given} are of videos: images are normalised by ImageNet's, leave both out"
    if test.views == "published" and (test.clips, test.crops) != (5, 1):
        given = f"got test.clips={test.clips} test.crops={test.crops}"
        of = f"is of 5 clips and 1 crop, {given}: set these, or test.views=even"
        yield f"test.views=published {of}"
    if (text := augment.rand_augment) and not _RAND_AUGMENT.fullmatch(text):
        yield f"augment.rand_augment={text}: write it as timm does, such as rand-m7-n4-mstd0.5-inc1"
    for name, free in (("memory_keep", []), ("memory_slices", 1)):
        if train.memory_budget and (kept := getattr(train, name)) != free:
            both = f"chooses what is kept, and so does train.{name}={kept}: set one of the two"
            yield f"train.memory_budget={train.memory_budget} {both}"
    if test.short_side < data.crop_size:
        yield f"test.short_side={test.short_side}: use at least data.crop_size={data.crop_size}"
    if 0 < data.decode_short_side < test.short_side:
        least = f"test.short_side={test.short_side}, or 0, or frames would be enlarged again"
        yield f"data.decode_short_side={data.decode_short_side}: use at least {least}"
    if test.crops == 2:
        yield "test.crops=2: use 1 (centre) or 3 (along the longer side)"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
