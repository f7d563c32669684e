"""The settings of a run: YAML files over typed dataclasses, with ``key=value`` overrides.

Every key of a recipe is a field below, with its type, its default and one line of explanation,
which is what ``--help`` prints. A file may name another one under ``base:`` (relative to itself),
and then holds only what differs.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from backbones.common.errors import UserError

BASE = "base"
# m, n: strength and operations; mstd, p: spread of the strength, probability of each operation;
# mmax: largest strength; inc: whether all operations get stronger with the strength.
_RAND_AUGMENT = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(mstd|p)\d+(\.\d+)?)*")


def key(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field: its default (copied, if it is a list), its line in ``--help``, its bounds."""
    rules = {"text": text, "choices": tuple(choices), "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=rules)
    return field(default=default, metadata=rules)


@dataclass
class DataConfig:
    """Which videos, and what a clip of them is."""

    root: str = key("", "folder of the videos; what lists name is found relative to it")
    layout: str = key(
        "auto",
        "folders: SPLIT/CLASS/FILE; list: lines `path label`; csv: Kinetics' annotations",
        choices=("auto", "folders", "list", "csv"),
    )
    annotations: str = key("", "the list or csv of a split, with {split} for its name; '': found")
    train_split: str = key("train", "the split to train on")
    val_split: str = key("val", "the split to validate and test on")
    manifests: str = key("", "folder of what revvideo.scan wrote; '': root")
    num_frames: int = key(16, "frames of a clip", low=1)
    stride: int = key(
        4, "distance of its frames, in frames of a video of 30 per second; 0: a still", low=0
    )
    crop_size: int = key(224, "height and width of what the model sees, in pixels", low=8)
    decode_short_side: int = key(0, "shrink to this shorter side while decoding; 0: no", low=0)
    mean: float = key(0.45, "subtracted from pixels in [0, 1] …")
    std: float = key(0.225, "… which are then divided by this", low=1e-6)
    workers: int = key(8, "loader processes of each training process", low=0)


@dataclass
class AugmentConfig:
    """What training does to clips; the same to all frames of one."""

    repeats: int = key(
        1, "differently augmented copies of the clip of a video (repeated augmentation)", low=1
    )
    scale: list[float] = key([0.08, 1.0], "area of the random crop over that of the frame")  # noqa: RUF009
    ratio: list[float] = key([0.75, 1.3333], "width over height of the random crop")  # noqa: RUF009
    flip: float = key(0.5, "probability of a horizontal flip", low=0, high=1)
    rand_augment: str = key("", "RandAugment in timm's words: rand-m7-n4-mstd0.5-inc1; '': none")
    color_jitter: float = key(0.0, "brightness, contrast and saturation vary by this", low=0)
    erase: float = key(0.0, "probability that a box is filled with noise", low=0, high=1)
    mixup: float = key(0.0, "alpha of mixup; 0: none", low=0)
    cutmix: float = key(0.0, "alpha of cutmix; 0: none. With both, each batch draws one", low=0)
    label_smoothing: float = key(0.0, "share of the label spread over all classes", low=0, high=1)


@dataclass
class ModelConfig:
    """Which network, and from which weights it starts."""

    name: str = key("rev_mvit_base_16x4", "a name of backbones.list_models()")
    num_classes: int = key(0, "outputs of the head; 0: as many as the data has classes", low=0)
    weights: str = key(
        "",
        "file, address or released model to start from: a run's .ckpt, .safetensors, PySlowFast; "
        "that of an image model is inflated",
    )
    drop_rate: float = key(0.0, "dropout before the head", low=0, high=1)
    drop_path_rate: float = key(0.0, "stochastic depth of the last block", low=0, high=1)
    arguments: dict[str, Any] = key({}, "other ones of the model, such as arguments.depth=8")  # noqa: RUF009


@dataclass
class OptimConfig:
    """AdamW; linear warm-up, then a cosine, step by step."""

    batch_size: int = key(256, "videos of one step, over all processes and accumulations", low=1)
    epochs: int = key(200, "passes over the training videos", low=1)
    max_steps: int = key(0, "stop after so many steps; 0: after the epochs", low=0)
    lr: float = key(1.6e-3, "learning rate after the warm-up", low=0)
    warmup_epochs: float = key(30.0, "length of the warm-up", low=0)
    start_factor: float = key(0.01, "learning rate of the first step, over lr", low=0, high=1)
    end_factor: float = key(0.01, "learning rate of the last step, over lr", low=0, high=1)
    weight_decay: float = key(0.05, "not applied to one-dimensional parameters", low=0)
    layer_decay: float = key(1.0, "learning rate of a block over that of the next", low=0, high=1)
    clip_grad_norm: float = key(0.0, "largest norm of all gradients together; 0: any", low=0)
    accumulate: int = key(1, "parts that each process splits its batch into, to save memory", low=1)
    ema: float = key(0.0, "decay of the averaged weights that are tested; 0: none", low=0, high=1)


@dataclass
class TrainConfig:
    """Where and how training runs."""

    output_dir: str = key("output/video", "where the results of the run go")
    seed: int = key(0, "of weights, clips, augmentation and dropout", low=0)
    device: str = key("auto", "cuda where there is one", choices=("auto", "cuda", "cpu"))
    devices: int = key(0, "processes on this machine; 0: one for each GPU, one on the CPU", low=0)
    nodes: int = key(1, "machines", low=1)
    strategy: str = key(
        "auto", "auto: ddp where there are several", choices=("auto", "ddp", "fsdp")
    )
    precision: str = key(
        "32-true",
        "float32, or autocast to a half precision",
        choices=("32-true", "bf16-mixed", "16-mixed"),
    )
    memory: str = key(
        "reversible",
        "what blocks keep for the backward pass",
        choices=("store", "checkpoint", "reversible"),
    )
    stored_blocks: int = key(0, "how many of the last blocks store whatever the policy", low=0)
    memory_budget: str = key(
        "", "'12GB', or 'auto' on a GPU: store as many blocks as fit, instead of the two above"
    )
    log_every: int = key(20, "steps between two lines of metrics.csv", low=1)
    checkpoint_every: int = key(500, "steps between two checkpoints", low=1)
    val_every: int = key(1, "epochs between two validations (one clip, one crop)", low=1)


@dataclass
class TestConfig:
    """How videos are tested: clips x crops, whose scores are averaged."""

    __test__ = False  # no test case, whatever pytest takes its name for

    clips: int = key(5, "clips of a video, evenly spread", low=1)
    crops: int = key(1, "crops of a clip: 1 (centre) or 3 (along the longer side)", low=1, high=3)
    short_side: int = key(256, "the shorter side before cropping, in pixels", low=8)
    batch_size: int = key(8, "videos that a process tests at a time", low=1)
    published_top1: float = key(0.0, "of the paper, printed beside the own one; 0: none", low=0)


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides to it.

    Args:
        path: a YAML file; also the ``config.yaml`` that a run has saved.
        overrides: ``section.key=value``, the value in YAML.

    Raises:
        UserError: no such file, one that is no recipe, an unknown key (the message lists the near
            ones), or a value of the wrong type or out of its range.
    """
    merged = OmegaConf.structured(Config)
    sources = [*_read(Path(path), ()), *map(_parse_override, overrides)]
    for where, tree in sources:
        _check_keys(tree, where)
        for name, value in _leaves(tree):
            _set(merged, name, value, where)
    try:
        config = typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"config {str(path)!r}, with the overrides: {_one_line(error)}") from error
    _check_values(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write all settings as YAML, complete, so that it is a recipe itself."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def describe_schema() -> str:
    """Every key with its type, default and explanation, a line or two each."""
    lines = []
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        lines.append(f"\n{section.name}: {kind.__doc__}")
        for name, type_, entry in _fields(kind):
            default = _default(entry)
            shown = "''" if default == "" else default
            head = f"  {section.name}.{name} ({_type_name(type_)}, {shown})"
            text = entry.metadata["text"]
            if entry.metadata["choices"]:
                text = f"{' | '.join(entry.metadata['choices'])}: {text}"
            indent = " " * 44
            lines += textwrap.wrap(f"{head:<43} {text}", 98, subsequent_indent=indent)
    return "\n".join(lines)


def _fields(kind: type) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        yield entry.name, hints[entry.name], entry


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


def _type_name(kind: Any) -> str:
    return str((typing.get_origin(kind) or kind).__name__)


def _read(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The trees of a file and of those it is based on, the latter first."""
    if not path.is_file():
        raise UserError(f"config {str(path)!r} does not exist{_near_recipes(path)}")
    if path.resolve() in seen:
        raise UserError(f"config {str(path)!r} is its own base")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"config {str(path)!r} cannot be read: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config {str(path)!r} is no recipe: it holds no sections")
    base = tree.pop(BASE, None)
    before = [] if base is None else _read(path.parent / str(base), (*seen, path.resolve()))
    return [*before, (f"config {str(path)!r}", typing.cast(dict[str, Any], tree))]


def _parse_override(text: str) -> tuple[str, dict[str, Any]]:
    name, equals, _ = text.partition("=")
    if not equals or not name:
        raise UserError(f"override {text!r} is not of the form key=value")
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {text!r} cannot be read: {_one_line(error)}") from error
    return f"override {text!r}", typing.cast(dict[str, Any], tree)


def _sections() -> dict[str, list[str]]:
    hints = typing.get_type_hints(Config)
    return {name: [entry.name for entry in dataclasses.fields(hints[name])] for name in hints}


def _check_keys(tree: dict[str, Any], where: str) -> None:
    sections = _sections()
    for section, content in tree.items():
        if section not in sections:
            inner = next(iter(content), "") if isinstance(content, dict) else ""
            _unknown(f"{section}.{inner}" if inner else str(section), _all_keys(), where)
        if not isinstance(content, dict):
            raise UserError(
                f"{where}: {section} is a section, with keys such as "
                f"{section}.{sections[section][0]}"
            )
        for name in content:
            if name not in sections[section]:
                _unknown(f"{section}.{name}", _all_keys(), where)


def _all_keys() -> list[str]:
    return [f"{section}.{name}" for section, names in _sections().items() for name in names]


def _unknown(name: str, known: Sequence[str], where: str) -> typing.NoReturn:
    # The right name in the wrong section is as near as a misspelt one.
    last = name.rpartition(".")[2]
    near = [other for other in known if other.rpartition(".")[2] == last]
    near += [k for k in difflib.get_close_matches(name, known, n=3) if k not in near]
    same = [other for other in known if other.startswith(name.partition(".")[0] + ".")]
    choices = near or same or list(known)
    raise UserError(f"{where}: there is no key {name!r}; did you mean {', '.join(choices[:12])}?")


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, content in tree.items():
        for name, value in content.items():
            if name == "arguments" and isinstance(value, dict):
                yield from ((f"{section}.{name}.{inner}", item) for inner, item in value.items())
            else:
                yield f"{section}.{name}", value


def _set(merged: Any, name: str, value: Any, where: str) -> None:
    section, entry, *inner = name.split(".")
    kind = typing.get_type_hints(typing.get_type_hints(Config)[section])[entry]
    if value is None and kind is str:
        value = ""  # what `key=` means for a text
    try:
        OmegaConf.update(merged, name, value, force_add=bool(inner))
    except OmegaConfBaseException as error:
        raise UserError(
            f"{where}: {name} takes a value of type {_type_name(kind)}, got {value!r}"
        ) from error


def _check_values(config: Config) -> None:
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for name, _, entry in _fields(type(part)):
            value, rules = getattr(part, name), entry.metadata
            where = f"{section.name}.{name}={value}"
            if rules["choices"] and value not in rules["choices"]:
                raise UserError(f"{where}: choose one of {', '.join(rules['choices'])}")
            if rules["low"] is not None and not value >= rules["low"]:
                raise UserError(f"{where}: use a value of at least {rules['low']:g}")
            if rules["high"] is not None and not value <= rules["high"]:
                raise UserError(f"{where}: use a value of at most {rules['high']:g}")
    for name in ("scale", "ratio"):
        value = getattr(config.augment, name)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise UserError(f"augment.{name}={value}: give two numbers, the smaller one first")
    if (text := config.augment.rand_augment) and not _RAND_AUGMENT.fullmatch(text):
        raise UserError(
            f"augment.rand_augment={text}: write it as timm does, such as rand-m7-n4-mstd0.5-inc1"
        )
    crop, short_side = config.data.crop_size, config.test.short_side
    if short_side < crop:
        raise UserError(f"test.short_side={short_side}: use at least data.crop_size={crop}")
    decoded = config.data.decode_short_side
    if 0 < decoded < short_side:
        raise UserError(
            f"data.decode_short_side={decoded}: use at least test.short_side={short_side}, or 0, "
            "or frames would be enlarged again"
        )
    if config.test.crops == 2:
        raise UserError("test.crops=2: use 1 (centre) or 3 (along the longer side)")


def _near_recipes(path: Path) -> str:
    recipes = [str(p) for p in sorted(Path("configs/video").glob("*/*.yaml"))]
    near = difflib.get_close_matches(str(path), recipes, n=3, cutoff=0.5) or recipes
    return f"; there are {', '.join(near)}" if near else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
