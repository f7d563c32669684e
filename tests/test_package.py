"""What `pip install` gives: recipes by name, commands, versions, types, and true extras."""

from __future__ import annotations

import ast
import configparser
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import backbones
import revdet
import revvideo
from backbones.common.errors import UserError
from revdet.install import RECIPES

ROOT = Path(__file__).parents[1]
PACKAGES = ("backbones", "revdet", "revvideo")
# The folders of recipes, and the package that they are installed in.
CONFIGS = {
    folder: "revdet" if folder.name == "detection" else "revvideo"
    for folder in (ROOT / "configs").iterdir()
}

# Distributions of which the module has another name.
MODULES = {
    "opencv-python-headless": "cv2",
    "faster-coco-eval": "faster_coco_eval",
    "hydra-core": "hydra",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "setuptools": "pkg_resources",
}
FOR_US = {"tensorboard"}  # imported by torch.utils.tensorboard and Lightning's logger


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (*PACKAGES, "configs", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    build = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_recipes_commands_and_a_page_without_dead_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        text = {
            Path(name).name: file.read(name).decode() for name in names if ".dist-info/" in name
        }
    assert {name.split("/")[0].removesuffix(".dist-info") for name in names} == {
        *PACKAGES,
        f"revvit_toolkit-{backbones.__version__}",
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert "revdet/detectron2-requirements.txt" in names
    for folder, package in CONFIGS.items():
        ours = [path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")]
        inside = {f"{package}/recipes/{path.relative_to(folder)}" for path in ours}
        assert inside and inside <= set(names)
    scripts = configparser.ConfigParser()
    scripts.read_string(text["entry_points.txt"])
    for target in scripts["console_scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), target
    metadata = Parser().parsestr(text["METADATA"])
    page = metadata.get_payload()
    assert "revdet-train --config list" in page
    assert all(url.startswith("https://") for url in re.findall(r"\]\(([^)]*)\)", page))


def test_recipes_are_found_by_name_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from revdet import config, install
from revvideo import config as video, settings
for load, recipes in (config.load_config, install.RECIPES), (video.load_config, settings.RECIPES):
    for name, path in recipes.files().items():
        assert path.is_relative_to(sys.argv[1]), path
        load(name)
        print(name)
"""
    command = [sys.executable, "-c", code, str(site)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ours = [path for folder in CONFIGS for path in folder.glob("*/*.*")]
    names = [f"{p.parent.name}/{p.stem}" for p in ours if p.parent.name != "common"]
    assert sorted(run.stdout.split()) == sorted(names)


def test_a_path_is_taken_as_it_is_and_a_name_by_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "coco/mask_rcnn_rev_vit_base_100ep"
    monkeypatch.chdir(tmp_path)
    assert RECIPES.find(name) == RECIPES.find(f"{name}.py") != name
    (tmp_path / "coco").mkdir()
    (tmp_path / f"{name}.py").write_text("")
    assert RECIPES.find(f"{name}.py") == f"{name}.py"
    with pytest.raises(UserError, match=f"there are {name}"):
        RECIPES.find("coco/mask_rcnn_rev_vit_base_10ep")
    with pytest.raises(UserError, match="--config list"):
        RECIPES.find("/somewhere/else.yaml")
    from revdet.train_net import main

    with pytest.raises(SystemExit, match="0"):
        main(["--config", "list"])
    assert name in capsys.readouterr().out.split()


def test_versions_are_the_same() -> None:
    assert backbones.__version__ == revdet.__version__ == revvideo.__version__
    assert f"\nversion: {backbones.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_missing_extra_is_one_line_that_names_it(tmp_path: Path) -> None:
    code = """
import sys
sys.modules |= dict.fromkeys(("detectron2", "omegaconf", "av"))
from revdet import predict, train_net
from revvideo import run, scan
print(train_net.main(["--config", "list.py"]), file=sys.stderr)
print(predict.main("--config x --weights x --input x --output x".split()), file=sys.stderr)
print(run.main(["--config", "x"]), file=sys.stderr)
scan.main(sys.argv[1:])
"""
    (tmp_path / "val").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = [
        f"error: {extra} needs {module}: pip install 'revvit-toolkit[{extra}]'"
        for module, extra in (("detectron2", "detection"), ("omegaconf", "video"), ("av", "video"))
    ]
    lines[0] += f", and Detectron2 itself as {ROOT / 'detectron2-requirements.txt'} says"
    assert run.stderr.split("\n") == [lines[0], "2", lines[0], "2", lines[1], "2", lines[2], ""]
    assert run.returncode == 2


def imported(folder: Path) -> Iterator[str]:
    """The packages that the files below a folder import, by statements or by name."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield (node.module or "").partition(".")[0]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional_import":
                yield ast.unparse(node.args[0]).strip("'").partition(".")[0]


@pytest.mark.parametrize(("extra", "package"), [("detection", "revdet"), ("video", "revvideo")])
def test_an_extra_lists_what_is_imported_and_nothing_else(extra: str, package: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.extras_require"][extra].split()
    names = [re.split(r"[<>=]", line)[0].lower() for line in lines]
    listed = {MODULES.get(name, name) for name in names}
    ours = set(imported(ROOT / package)) - sys.stdlib_module_names - {"torch", "detectron2"}
    ours -= {"name", *setup["options.extras_require"]["trackers"].split()}  # of train.loggers
    assert ours - listed <= set(PACKAGES)
    theirs = {"torchvision"}  # by backbones.common.images, which the adapters call
    if extra == "detection":
        theirs |= set(imported(Path(importlib.import_module("detectron2").__file__ or "").parent))
    assert listed <= ours | theirs | FOR_US


def test_every_set_of_versions_is_pinned_and_tried() -> None:
    rows = re.findall(r"^(\S+) +(3\.\d+) +\S+$", (ROOT / "scripts/matrix.sh").read_text(), re.M)
    pinned = {path.stem for path in (ROOT / "constraints").iterdir()}
    assert {name for name, _ in rows} == pinned | {"py311-newest"}  # whose set is constraints.txt
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    tried = re.findall(r"\{set: (\S+), python: \"(\S+)\"\}", workflow)
    assert set(tried) == {(name, python) for name, python in rows if name in pinned}
    assert "http" not in workflow
