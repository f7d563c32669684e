"""The one kind of error that is the user's to fix, and errors in one line."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, then the remedy.

    The commands print it without a traceback and exit with status 2.
    """


class MissingExtra(UserError, ImportError):
    """A package is not installed; the message names the extra that brings it."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def error_line(error: BaseException) -> str:
    """Like :func:`first_line`, without the path, which every message about a file names already."""
    return getattr(error, "strerror", None) or first_line(error)


def some_of(names: Sequence[str]) -> str:
    """The first three of many names, and how many more there are."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def near_names(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three known names that a misspelt one may mean; none if no name is near."""
    return difflib.get_close_matches(name[:200], list(known), cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What an error message on a misspelt name ends with, if another name is near."""
    near = ", ".join(near_names(name, known))
    return f"; did you mean {near}?" if near else ""


@contextmanager
def extra(name: str, purpose: str = "", also: str = "") -> Iterator[None]:
    """A part that imports what an extra of this package brings, and what ``also`` brings: a
    :class:`MissingExtra` if a module is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        needs = f"{purpose or name} needs {(error.name or '').partition('.')[0]}"
        raise MissingExtra(f"{needs}: pip install 'revvit-toolkit[{name}]'{also}") from error


def require_trackers(names: Iterable[str]) -> None:
    """Import the libraries of ``train.loggers``, within :func:`extra`, those but TensorBoard, which
    an adapter has."""
    for name in names:
        if name != "tensorboard":
            optional_import(name, "trackers", f"train.loggers=[{name}]")


def optional_import(module: str, name: str, purpose: str) -> Any:
    """Import a module within :func:`extra`."""
    with extra(name, purpose):
        return importlib.import_module(module)
