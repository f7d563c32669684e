"""The house is in order: which module may import which, how large they are, and one thread for all.

Imports are read from the source, those inside functions too: an arrow upwards that is drawn late is
still one. `import a.b` runs `a/__init__.py` as well, but that is not counted as an arrow.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("backbones", "revdet", "revvideo")
# Of each part of backbones those that it may import, itself apart.
BELOW = {
    "common": set(),
    "engine": {"common"},
    "models": {"common", "engine"},
    "registry": {"common", "engine", "models"},
    "memory": {"common", "engine", "models"},
    "weights": {"common", "engine", "models", "registry"},
    "factory": {"common", "engine", "models", "registry", "weights"},
}
BELOW["timm"] = {"common", "registry", "weights"}
BELOW["commands"] = set(BELOW) - {"timm"} | {"memory"}
BELOW["__main__"] = {"common", "commands"}
BELOW["__init__"] = set(BELOW) - {"commands", "__main__", "timm"}


def name_of(path: Path) -> str:
    """``backbones.engine.policies``, and ``backbones.engine`` for its ``__init__.py``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports(module: str, late: bool = True) -> Iterator[str]:
    """The modules that a module imports, with ``late`` those that are not needed at once too."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    waiting = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in waiting and not late:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are written out"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in FILES else node.module or ""


def part_of(module: str) -> str:
    """The part of backbones that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def in_package(package: str) -> list[str]:
    return [module for module in FILES if module.split(".")[0] == package]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_no_other_but_backbones(package: str) -> None:
    own = {"demo", "benchmarks", "tests", "configs", *PACKAGES}
    for module in in_package(package):
        found = {name.split(".")[0] for name in imports(module)} & own
        assert found <= {package, "backbones"}, module


def test_backbones_needs_torch_alone() -> None:
    for module in in_package("backbones"):
        found = {name.split(".")[0] for name in imports(module, late=False)}
        assert found - sys.stdlib_module_names <= {"torch", "backbones"}, module


def test_no_arrow_upwards_in_backbones() -> None:
    for module in in_package("backbones"):
        part = part_of(module)
        found = {part_of(name) for name in imports(module) if name.split(".")[0] == "backbones"}
        assert found <= BELOW[part] | {part}, module


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package: str) -> None:
    TopologicalSorter({module: set(imports(module)) for module in in_package(package)}).prepare()


@pytest.mark.parametrize("package", PACKAGES)
def test_few_files_side_by_side_and_none_too_long(package: str) -> None:
    assert len(list((ROOT / package).glob("*.py"))) <= 12
    for module in in_package(package):
        assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 350, module


def test_the_processes_of_tests_have_one_thread() -> None:
    code = "import torch; print(torch.get_num_threads())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"
