"""Every command of the pages is one that its own parser takes, with keys that its recipe has."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md"))]
SCRIPTS = {
    "revdet-train": "revdet.train_net",
    "revdet-predict": "revdet.predict",
    "revvideo": "revvideo.run",
    "revvideo-predict": "revvideo.predict",
    "revvideo-scan": "revvideo.scan",
    "revvideo-transcode": "revvideo.transcode",
    "backbones": "backbones.__main__",
}


def commands() -> list[tuple[str, str]]:
    """Page and command, of all indented lines that are commands of ours."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True) if "=" in line or "-" in line else []
            if words and (words[0] == "python" or words[0] in SCRIPTS):
                found.append((page, shlex.join(words)))
    return found


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


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_parses_and_its_keys_are_there(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] in SCRIPTS:
        module, arguments = SCRIPTS[words[0]], words[1:]
    elif words[1] == "-c":
        compile(words[2], page, "exec")
        return
    elif words[1] == "-m":
        module, arguments = words[2], words[3:]
    else:
        module, arguments = words[1].removesuffix(".py").replace("/", "."), words[2:]
    module = {"backbones": "backbones.__main__"}.get(module, module)
    if arguments[-2:] == ["--config", "list"] or module.startswith("demo."):
        return  # tested by itself
    options = parsed(module, arguments, monkeypatch)
    adapter = module.partition(".")[0]
    recipe = getattr(options, "config", None)
    if recipe is None or recipe.startswith("output/") or "RECIPE" in recipe or "…" in recipe:
        return  # of a run, or for the reader to fill in
    importlib.import_module(f"{adapter}.config").load_config(recipe, options.overrides)


def test_they_were_found():
    assert len(commands()) > 40
    assert {"README.md", "docs/video.md", "docs/package.md"} < {page for page, _ in commands()}
