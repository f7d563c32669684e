"""What ``import backbones`` brings along: torch, and nothing that torch does not bring itself."""

from __future__ import annotations

import subprocess
import sys

import backbones


def added_by(*imported: str, to: str) -> set[str]:
    """The modules that come with these imports, in a new process in which warnings are errors."""
    code = f"import sys, {to}; there = set(sys.modules); import {', '.join(imported)}"
    code += "; print(*set(sys.modules) - there)"
    torchs = "ignore:Failed to initialize NumPy"  # torch 2.11, where NumPy is missing
    command = [sys.executable, "-W", "error", "-W", torchs, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not run.stderr
    return set(run.stdout.split())


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_the_library_brings_itself_alone() -> None:
    added = added_by("backbones", to="torch")
    assert "backbones.memory.simulation" in added
    assert packages(added) - sys.stdlib_module_names == {"backbones"}
    assert not {"argparse", "backbones.common.console"} & added


def test_the_commands_need_torch_and_nothing_above_it() -> None:
    names = ("zoo", "memory", "drift", "evaluate", "predict")
    commands = (f"backbones.commands.{name}" for name in names)
    added = added_by(*commands, to="torch, torch.utils.flop_counter")
    assert packages(added) - sys.stdlib_module_names == {"backbones"}


def test_public_names_exist() -> None:
    assert all(hasattr(backbones, name) for name in backbones.__all__)
