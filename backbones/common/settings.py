"""Typed settings: dataclasses whose fields are keys, each with default, meaning and bounds.

The fields of a section are made by :func:`key`; a section may hold sections. What is written there
is the key's help, its type and its check, for recipes and for ``key=value`` on the command line.
OmegaConf holds the values (``OmegaConf.structured``) and refuses other types; it is imported late,
by those who have settings.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from backbones.common.errors import UserError, near_names


def key(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field: its default (copied, if it is a list), its line of help, its bounds, inclusive."""
    rules = {"text": text, "choices": tuple(choices), "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=rules)
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    path: str  # its name from the root on, such as "train.amp.enabled"
    kind: Any  # its type, such as list[float]
    default: Any  # what it is if nobody sets it
    rules: typing.Mapping[str, Any]  # what key() was told

    @property
    def type_name(self) -> str:
        """The type in one word."""
        return str((typing.get_origin(self.kind) or self.kind).__name__)


def keys_of(section: type, prefix: str = "") -> Iterator[Key]:
    """Every key below a section, a dataclass, whose own name is ``prefix``."""
    hints = typing.get_type_hints(section)
    for entry in dataclasses.fields(section):
        path, kind = f"{prefix}.{entry.name}".lstrip("."), hints[entry.name]
        if dataclasses.is_dataclass(kind):
            yield from keys_of(typing.cast(type, kind), path)
        else:
            made = entry.default_factory
            default = entry.default if made is dataclasses.MISSING else made()
            yield Key(path, kind, default, entry.metadata)


def describe(section: type, prefix: str = "") -> str:
    """Every key of a section with its type, default and meaning, a line or two each."""
    lines = []
    for entry in keys_of(section, prefix):
        shown = "''" if entry.default == "" else entry.default
        head = f"  {entry.path} ({entry.type_name}, {shown})"
        text = entry.rules["text"]
        if entry.rules["choices"]:
            text = f"{' | '.join(entry.rules['choices'])}: {text}"
        lines += textwrap.wrap(f"{head:<43} {text}", 98, subsequent_indent=" " * 44)
    return "\n".join(lines)


def check_values(settings: Any, section: type, prefix: str = "") -> None:
    """Compare the values in ``settings`` (an instance of the dataclass ``section``, or a config
    node of its shape) with the choices and bounds of its keys; a UserError has what may be used."""
    for entry in keys_of(section):
        value = attrgetter(entry.path)(settings)
        choices, low, high = (entry.rules[rule] for rule in ("choices", "low", "high"))
        where = f"{prefix}.{entry.path}={value}".lstrip(".")
        values = value if typing.get_origin(entry.kind) is list else [value]
        if choices and not set(values) <= set(choices):
            raise UserError(f"{where}: choose one of {', '.join(choices)}")
        # Written so that NaN is refused too.
        if low is not None and not value >= low:
            raise UserError(f"{where}: use a value of at least {low:g}")
        if high is not None and not value <= high:
            raise UserError(f"{where}: use a value of at most {high:g}")


def split_override(text: str) -> tuple[str, str]:
    """``"section.key=value"`` -> key and value as it was typed, which may hold more ``=``; a
    UserError if it is not of this form."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or name != name.strip():
        raise UserError(f"override {text!r} is not of the form key=value")
    return name, value


def verbatim(text: str) -> str:
    """What to give OmegaConf, so that it is read back as typed: ``${`` has no meaning of its own.
    A UserError for ``"???"``, by which OmegaConf means that a value is missing."""
    if text == "???":
        raise UserError("'???' can be no value")
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def unknown_key(name: str, known: Iterable[str], where: str = "") -> UserError:
    """The error for a key that does not exist (its whole name, and the file or the override where
    it stands), with those of all ``known`` that may be meant."""
    known, last = list(known), name.rpartition(".")[2]
    # The right name in the wrong section is as near as a misspelt one.
    near = [other for other in known if other.rpartition(".")[2] == last]
    section = [other for other in known if other.startswith(name.partition(".")[0] + ".")]
    near += [other for other in near_names(name, section or known) if other not in near]
    place = f"{where}: " if where else ""
    hint = f"; did you mean {', '.join(near[:12])}?" if near else ": --help lists the keys"
    return UserError(f"{place}there is no key {name!r}{hint}")
