"""What the commands have in common: parsers, options, progress, and one line per error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from backbones.common.errors import UserError, first_line
from backbones.common.files import printable
from backbones.common.recipes import Recipes
from backbones.common.stopping import Stopped, stoppable

_NAMED = 20  # files that are printed where a JSON file has all

# What a command ends with one line about: something that the user gave, or that is not installed.
_ERRORS = (ValueError, OSError, ImportError, torch.OutOfMemoryError)


def make_parser(prog: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of ``prog``, or of the script that is run, with the help of :func:`explain`."""
    called = Path(sys.argv[0])
    ours = called.name.startswith(("backbones", "revdet", "revvideo")) and not called.suffix
    parser = argparse.ArgumentParser(prog=called.name if ours else prog)
    explain(parser, doc)
    return parser


def explain(parser: argparse.ArgumentParser, doc: str | None) -> None:
    """Give a parser its help: a summary and, after an empty line, what follows the options."""
    parser.description, _, parser.epilog = (doc or "").partition("\n\n")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # lines stay as they are


def config_parser(prog: str, doc: str | None, recipes: Recipes) -> argparse.ArgumentParser:
    """:func:`make_parser` for a command that takes one of ``recipes`` and overrides of it, the
    options ``config`` and ``overrides``.

    Parse with ``parse_intermixed_args``, so that overrides may stand between options.
    """

    def config(text: str) -> str:
        if text == "list":
            with readable_in_part():
                print(*recipes.files(), sep="\n")
            parser.exit()
        return text

    parser = make_parser(prog, doc)
    add = parser.add_argument
    told = "a recipe by name, a file, or the config.yaml of a run; list prints the names"
    add("--config", "--config-file", required=True, type=config, metavar="FILE", help=told)
    add("overrides", nargs="*", metavar="key=value", help="override the recipe")
    return parser


def parse_inputs(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """The options of a :func:`config_parser` with ``--input PATH…``; of what follows that up to the
    next option, all of which argparse takes for paths, ``key=value`` are overrides."""
    options = parser.parse_intermixed_args(arguments)
    overrides = [text for text in options.input if "=" in text and not Path(text).exists()]
    options.input = [text for text in options.input if text not in overrides]
    options.overrides += overrides
    return options


def run_command(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None,
) -> int:
    """Do the work of a command, whose arguments are those of the process if None; return its exit
    status, 0 if it has none. A usage error, or what the user can fix, is a SystemExit of status 2,
    after a line on stderr."""
    options = parser.parse_args(arguments)
    try:
        with readable_in_part():
            return work(options) or 0
    except _ERRORS as error:
        show_progress("")
        parser.exit(2, f"error: {first_line(error)}\n")


@contextmanager
def readable_in_part() -> Iterator[None]:
    """A part of a command that prints; whose reader has gone (``| head``), it ends without a word,
    with the status that a shell has for that signal."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        raise SystemExit(128 + 13) from None


def run_stoppable(work: Callable[[], None], speaks: bool = True) -> int:
    """As :func:`run_command`, for work that signals stop, of whose processes one ``speaks``."""
    try:
        with stoppable():
            work()
    except Stopped as stopped:
        if speaks:
            print(f"\n{stopped}", file=sys.stderr)  # behind the progress bar, if there is one
        return stopped.status
    except UserError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def positive(text: str) -> int:
    """The type of an option that is a number from 1 on; anything else is a usage error."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def not_negative(text: str) -> int:
    """Like :func:`positive`, from 0 on."""
    return 0 if text == "0" else positive(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option ``--device``, whose value is for :func:`try_device`."""
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="such as cuda:1 (default: %(default)s)",
    )


def try_device(name: str, setting: str = "", remedy: str = "--device cpu") -> torch.device:
    """The device of a name (``"cuda:1"``), on which something has been computed; ``"auto"``: a GPU
    if there is. A UserError if it cannot be used here: ``setting`` is what the user has written
    (default: ``--device name``), ``remedy`` what can be written instead."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        given = setting or f"--device {name}"
        raise UserError(f"{given} cannot be used here ({first_line(error)}): {remedy}") from error
    return device


def show_progress(text: str) -> None:
    """One line that replaces the one before, on a stderr that is a terminal."""
    if sys.stderr.isatty():
        # \033[K clears what a longer text left of the line.
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def name_unreadable(unreadable: Mapping[str, str], whole_list: str | Path | None) -> None:
    """Count and name on stderr, with its reason, what could not be read; nothing if all could.

    Of many the first ones, if the file ``whole_list`` has them all.
    """
    if not unreadable:
        return
    print(f"{len(unreadable):,} unreadable:", file=sys.stderr)
    named = list(unreadable.items())[: _NAMED if whole_list else None]
    for path, reason in named:
        print(f"  {printable(path)}: {reason}", file=sys.stderr)
    if len(unreadable) > len(named):
        print(f"  and {len(unreadable) - len(named):,} more, see {whole_list}", file=sys.stderr)
