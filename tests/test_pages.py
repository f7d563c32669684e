"""Every command and every piece of Python of the pages runs, or says what it needs.

What needs a GPU or the network has a comment above it in the page ("# needs …"): of that the parser
takes the arguments and the recipe the keys. All others run as they stand, on small files of the
names that they have, with models that are small under their own names, and of runs with settings
that make them short. The tutorials are walked in test_road.py of each adapter.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import runpy
import shlex
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from iopath.common.file_io import g_pathmgr
from PIL import Image

import backbones
from backbones.__main__ import main as command
from backbones.registry import MODELS
from demo.detection import build
from revdet.train_net import main as train_net
from revvideo.run import main as run_video
from tests.revdet.conftest import DEMO, FEW
from tests.revdet.conftest import SMALL as SMALL_DETECTOR
from tests.revvideo.tiny_set import SMALL, arguments, build_set

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md"))]
WALKED = {"docs/tutorial_detection.md", "docs/tutorial_video.md"}
SCRIPTS = {
    "revdet-train": "revdet.train_net",
    "revdet-predict": "revdet.predict",
    "revvideo": "revvideo.run",
    "revvideo-predict": "revvideo.predict",
    "revvideo-scan": "revvideo.scan",
    "revvideo-transcode": "revvideo.transcode",
    "backbones": "backbones.__main__",
}
OTHERS = {"make", "pip", "torchrun", "srun"}  # of which no parser is ours

# In the place of a GPU and of hours.
BRIEF = {
    "configs/video/demo": ("optim.max_steps=2", *SMALL[: SMALL.index("optim.epochs=2")]),
    "kinetics400/": (
        *SMALL,
        "optim.max_steps=2",
        "train.precision=32-true",
        "model.num_classes=3",
        "test.clips=5",
    ),
    "configs/image/": (
        "model.num_classes=2",
        "data.workers=0",
        "optim.batch_size=4",
        "optim.max_steps=2",
        "train.device=cpu",
        "train.precision=32-true",
    ),
    "output/own_images": ("optim.max_steps=3",),
}


class Command(NamedTuple):
    page: str
    line: str
    needs: str


def commands() -> list[Command]:
    """All indented lines that are commands; of those in a block after a comment, what they need."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"(?:^    \S.*\n)+", text, re.MULTILINE):
            needs = ""
            for line in block.splitlines():
                if comment := re.match(r" +# needs (.+)", line):
                    needs = comment[1]
                first = line.split()[0]
                if first in {"python", *SCRIPTS, *OTHERS}:
                    words = shlex.split(line, comments=True)
                    found.append(Command(page, shlex.join(words), needs))
    return found


def target(line: str) -> tuple[str, list[str]]:
    """The module of a command, and its arguments."""
    words = shlex.split(line)
    if words[0] in SCRIPTS:
        return SCRIPTS[words[0]], words[1:]
    module, given = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    module = module.removesuffix(".py").replace("/", ".")
    return {"backbones": "backbones.__main__"}.get(module, module), given


class Parsed(BaseException):
    """What a parser has made of a command line."""


def parsed(module: str, arguments: list[str], patch: pytest.MonkeyPatch) -> argparse.Namespace:
    def then_stop(name: str) -> Any:
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: Any, *args: Any, **more: Any) -> None:
            raise Parsed(original(self, *args, **more))

        return parse

    main = importlib.import_module(module).main
    with patch.context() as own:
        for name in ("parse_args", "parse_intermixed_args"):
            own.setattr(argparse.ArgumentParser, name, then_stop(name))
        with pytest.raises(Parsed) as found:
            main(arguments)
    return found.value.args[0]


OURS = [c for c in commands() if c.line.split()[0] not in OTHERS and "-c" not in c.line.split()]


@pytest.mark.parametrize(("page", "line", "needs"), [c for c in OURS if c.needs])
def test_a_command_parses_and_its_keys_are_there(page, line, needs, monkeypatch):
    monkeypatch.chdir(ROOT)
    module, arguments = target(line)
    options = parsed(module, arguments, monkeypatch)
    recipe = getattr(options, "config", None)
    if recipe is not None and "RECIPE" not in recipe:
        adapter = module.partition(".")[0]
        importlib.import_module(f"{adapter}.config").load_config(recipe, options.overrides)


@pytest.fixture(scope="module")
def small_models():
    """The ViTs of all names, small."""
    tiny = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, record in [*MODELS.items()]:
            if "mvit" not in name:
                patch.setitem(MODELS, name, replace(record, arguments={**record.arguments, **tiny}))
        yield


@pytest.fixture(scope="module")
def house(small_models, tmp_path_factory):
    """A folder where the commands find what they name."""
    root = tmp_path_factory.mktemp("house")
    (root / "configs").symlink_to(ROOT / "configs")
    build(root / "datasets/demo", train_images=4, val_images=2)
    pictures = sorted((root / "datasets/demo/train").glob("*.jpg"))
    for folder in product(("imagenet", "flowers"), ("train", "val"), "ab"):
        root.joinpath(*folder).mkdir(parents=True)
        for picture in pictures[:2]:
            shutil.copy(picture, root.joinpath(*folder))
    for number, folder in enumerate(("photos", "holiday", "frames")):
        (root / folder).mkdir()
        Image.open(pictures[number]).save(root / folder / "1.png")
    shutil.copy(pictures[0], root / "photo.jpg")
    shutil.copy(ROOT / "tests/golden/rev_vit_tiny.pyth", root / "REV_VIT_B.pyth")
    backbones.save_weights(backbones.create_model("rev_vit_base"), root / "mine.safetensors")
    build_set(root / "kinetics400")
    shutil.copy(next((root / "kinetics400").glob("val/bright/*.mp4")), root / "clip.mp4")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root / "datasets"))
        patch.chdir(root)
        patch.setattr("revdet.training.results.draw_curves", lambda *_: None)
        patch.setattr("revvideo.training.results.draw_curves", lambda *_: None)
        short = [*SMALL_DETECTOR, *FEW, "train.max_iter=1", "train.output_dir=runs/revdet"]
        assert train_net(["--config", DEMO, *short]) == 0
        video = arguments(root / "kinetics400", root / "runs/revvideo", "optim.max_steps=1")
        assert run_video([*video]) == 0
        images = ["--config", "configs/image/finetune/rev_vit_base.yaml", "data.root=flowers"]
        brief = [*BRIEF["configs/image/"], "model.weights="]
        assert run_video([*images, *brief, "train.output_dir=runs/images"]) == 0
        shutil.copytree("runs/images", "output/own_images/rev_vit_base")
        command(["predict", "photos", "--weights", "REV_VIT_B.pyth", "--features", "photos.npz"])
        yield root


RUNNING = [c for c in OURS if not c.needs and (c.page not in WALKED or "motion" in c.line)]


@pytest.mark.parametrize("page", sorted({command.page for command in RUNNING}))
def test_the_commands_of_a_page_run_in_their_order(page, house, monkeypatch):
    monkeypatch.setattr("revvideo.training.module.complexity_table", lambda *_: "")
    shutil.rmtree("output/kinetics400", ignore_errors=True)  # of the page before
    for _, line, _ in (each for each in RUNNING if each.page == page):
        module, given = target(line)
        of, run = module.partition(".")[0], Path("output/run")
        run.unlink(missing_ok=True)
        run.symlink_to(house / "runs" / {"backbones": "images"}.get(of, of))
        if module == "revvideo.run" and "list" not in given:
            given += next(more for part, more in BRIEF.items() if part in line)
        if "data.root=kinetics400_256" in given:
            shutil.rmtree("output/kinetics400")  # of the set as it was
        script = ROOT / f"{module.replace('.', '/')}.py"
        monkeypatch.setattr("sys.argv", [str(script), *given])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
            raise SystemExit(0)  # a script without a status
        assert not end.value.code, line


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.M | re.S)


ADAPTERS = [
    pytest.param(code, id=f"{page}:{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page))
    if page not in WALKED and re.search(r"revdet|revvideo|iopath|numpy", code)
]


@pytest.mark.parametrize("code", ADAPTERS)
def test_python_that_needs_more_than_torch(code, house):
    """The rest runs in backbones/test_docs.py."""
    try:
        exec(compile(code, "page", "exec"), {"__name__": "page"})
    finally:
        g_pathmgr._path_handlers.pop("lab://", None)


def test_what_stands_in_a_sentence_is_there():
    """Modules that are run, in the middle of a line."""
    found = []
    for page in PAGES:
        found += re.findall(r"`python -m ([\w.]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(found) > 20
    for module in found:
        assert importlib.util.find_spec(module), module


def test_nothing_was_overlooked():
    assert len(commands()) > 60 and len(RUNNING) > 20 and len(ADAPTERS) > 3
    assert {"README.md", "docs/video.md", "docs/package.md"} < {c.page for c in commands()}
    for page in PAGES:  # Python stands in fences, which are run
        text = (ROOT / page).read_text(encoding="utf-8")
        lines = re.findall(
            r"^    (?:import|from) .*", re.sub(r"```.*?```", "", text, flags=re.S), re.M
        )
        assert not lines, (page, lines)
    for each in commands():  # what others install or start has its needs above it
        assert each.needs or each.line.split()[0] not in OTHERS, each
