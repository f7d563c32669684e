"""One command: help that teaches, what bare and misspelt ones say, one line per error."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import pytest

from backbones.__main__ import main
from backbones.common.console import make_parser, run_command, try_device
from tests.backbones.helpers import Capture

COMMANDS = ("zoo", "memory", "drift", "evaluate", "predict")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    captured = capsys.readouterr()
    assert stop.value.code == 0 and captured.err == ""
    usage, examples = captured.out.split("examples:\n")
    assert usage.startswith(f"usage: python -m backbones {command} ")
    assert examples.startswith(f"  python -m backbones {command}")
    assert max(map(len, captured.out.splitlines())) <= 100


def test_the_commands_are_listed(capsys: Capture) -> None:
    """By --help; on stderr by the bare command, which did nothing, and for an unknown one."""
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for command in COMMANDS:
        assert f"\n    {command} " in shown and f"\n  python -m backbones {command}" in shown
    assert main([]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", shown)
    with pytest.raises(SystemExit) as stop:
        main(["probe"])
    assert stop.value.code == 2 and "choose from 'zoo', 'memory'" in capsys.readouterr().err


def test_only_the_chosen_command_is_imported() -> None:
    """As a user types it; what it prints is the table, aligned, and nothing on stderr."""
    code = (
        "import runpy, sys; sys.argv = ['backbones', 'zoo', 'vit_tiny']\n"
        "try: runpy.run_module('backbones', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'backbones.commands.zoo' in sys.modules\n"
        "assert 'backbones.commands.predict' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("vit_tiny ")


def test_the_exit_status_and_errors_in_one_line(capsys: Capture) -> None:
    def run(work: Callable[[argparse.Namespace], int | None]) -> int:
        return run_command(make_parser("x", ""), work, [])

    def fail(error: Exception) -> None:
        raise error

    assert run(lambda _options: None) == 0 and run(lambda _options: 1) == 1
    for error, line in (
        (ValueError("this\nand that"), "this"),
        (OSError(), "OSError"),
        (ImportError("pip install it"), "pip install it"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(lambda _options, error=error: fail(error))
        assert stop.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"
    with pytest.raises(KeyError):  # of the code
        run(lambda _options: fail(KeyError()))


def test_devices() -> None:
    assert try_device("cpu", "", "").type == "cpu"
    for name in ("cuda:99", "nothing"):
        with pytest.raises(ValueError, match=f"^x={name} cannot be used here .*: try another$"):
            try_device(name, f"x={name}", "try another")


NO_READER = """
import os, runpy, sys
read, write = os.pipe()
os.dup2(write, 1), os.close(write), os.close(read)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "command", ("revvideo.run --config list", "backbones drift --model rev_vit_tiny --img-size 32")
)
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    """As `| head` does."""
    started = [sys.executable, "-c", NO_READER, *command.split()]
    done = subprocess.run(started, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")
