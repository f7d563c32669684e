"""What the commands have in common: help that teaches, and one line per error."""

from __future__ import annotations

import argparse
import runpy
import sys
import warnings

import pytest

from backbones.common.console import make_parser, parse_device, run_command

COMMANDS = ("", ".memory", ".probe", ".evaluate", ".predict")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``python -m`` runs it, which warns about a module that is imported already."""
    module = f"backbones{command}"
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", [module, "--help"])
    if command != ".memory":  # of these, no other module of the package imports one
        monkeypatch.delitem(sys.modules, f"backbones{command or '.__main__'}", raising=False)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        warnings.simplefilter("error")
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    captured = capsys.readouterr()
    assert stop.value.code == 0 and captured.err == ""
    usage, examples = captured.out.split("examples:\n")
    assert usage.startswith(f"usage: python -m {module} ")
    assert f"  python -m {module}" in examples
    assert max(map(len, captured.out.splitlines())) <= 100


@pytest.mark.parametrize(
    "error, line",
    (
        (ValueError("this\nand that"), "this"),
        (OSError(), "OSError"),
        (ImportError("pip install it"), "pip install it"),
    ),
)
def test_an_error_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_options: argparse.Namespace) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(make_parser("x", ""), work, [])
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"


def test_an_error_of_the_code_is_no_line() -> None:
    with pytest.raises(KeyError):
        run_command(make_parser("x", ""), lambda _options: {}["missing"], [])


def test_the_exit_status() -> None:
    assert run_command(make_parser("x", ""), lambda _options: 1, []) == 1
    assert run_command(make_parser("x", ""), lambda _options: None, []) == 0


def test_devices() -> None:
    assert parse_device("cpu").type == "cpu"
    for text in ("cuda:99", "nothing"):
        with pytest.raises(ValueError, match=f"cannot use --device {text}: "):
            parse_device(text)
