"""What the package and its commands do to the program and the folders that they run in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

IMPORTS = """
import logging, sys, warnings
import torch
before = warnings.filters[:]
import revdet
assert "detectron2" not in sys.modules
from revdet import TrunkBackbone
assert TrunkBackbone.__module__ == "revdet.models" and not hasattr(revdet, "Trunk")
assert [f for f in warnings.filters if f not in before and f[1]] == [], "filters by message"
assert logging.getLogger("detectron2.data.datasets.coco").level == logging.NOTSET
"""


def test_importing_the_package_silences_nobody():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


@pytest.mark.parametrize("command", ["train_net", "predict"])
def test_a_command_run_by_its_path_hides_no_module_of_the_user(tmp_path, command):
    # Of names that the folder of the command has too.
    for name in ("config", "models", "data"):
        (tmp_path / f"{name}.py").write_text(f"MINE = 'my {name}'")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import config, data, models\nassert 0, (config.MINE, data.MINE, models.MINE)"
    )
    line = [sys.executable, f"revdet/{command}.py", "--config", str(recipe)]
    if command == "predict":
        (tmp_path / "photo.jpg").touch()
        line += ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--weights", "none"]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(tmp_path)]))
    done = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "('my config', 'my data', 'my models')" in done.stderr
    assert len(done.stderr.splitlines()) == 1  # no deprecations of Detectron2's either
