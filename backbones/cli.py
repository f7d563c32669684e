"""What the commands of the package have in common: options, progress, and one line per error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from backbones.files import first_line

__all__ = [
    "add_device",
    "make_parser",
    "not_negative",
    "parse_device",
    "positive",
    "run_command",
    "show_progress",
]

# What a command ends with one line about: something that the user gave, or that is not installed.
_ERRORS = (ValueError, OSError, ImportError, torch.OutOfMemoryError)


def make_parser(
    module: str, description: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """A parser for ``python -m MODULE``. Lines of its texts stay as they are."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None,
) -> int:
    """Do the work of a command; return its exit status, 0 if it has none.

    Args:
        arguments: of the command line; None for those that the process was given.

    Raises:
        SystemExit: with status 2, after a usage error or one line on stderr about what is wrong.
    """
    options = parser.parse_args(arguments)
    try:
        return work(options) or 0
    except _ERRORS as error:
        show_progress("")
        parser.exit(2, f"error: {first_line(error)}\n")


def positive(text: str) -> int:
    """The type of an option that is a number from 1 on.

    Raises:
        argparse.ArgumentTypeError: it is none, which argparse makes a usage error.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def not_negative(text: str) -> int:
    """Like :func:`positive`, from 0 on."""
    return 0 if text == "0" else positive(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option ``--device``, for :func:`parse_device`."""
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="such as cuda:1 (default: %(default)s)",
    )


def parse_device(text: str) -> torch.device:
    """Try a device.

    Raises:
        ValueError: it does not exist, or cannot be used here.
    """
    try:
        device = torch.device(text)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"cannot use --device {text}: {first_line(error)}") from error
    return device


def show_progress(text: str) -> None:
    """One line that replaces the one before, on a stderr that is a terminal."""
    if sys.stderr.isatty():
        # \033[K clears what a longer text left of the line.
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
