"""A demo dataset is made once, whole or not at all, and nothing else is touched."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from backbones.common.errors import UserError
from demo import folder
from demo.folder import command, make_once

DOC = "Make it.\n\nIn detail."


def write(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "train" / "0.jpg").write_text("a picture")


def test_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "nested" / "set"
    for word in ("made", "up to date"):
        assert make_once(output, "this", write) == output
        assert word in capsys.readouterr().out
        (output / "train" / "manifest.csv").write_text("what a scan leaves")
    assert (output / "train" / "0.jpg").read_text() == "a picture"
    assert [path.name for path in output.parent.iterdir()] == ["set"], "no scratch folder is left"
    with pytest.raises(UserError, match="not made by that"):
        make_once(output, "that", write)
    (output / "train" / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"has lost train/0\.jpg: remove it"):
        make_once(output, "this", write)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def stop(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(tmp_path / "set", "this", stop)
    assert not any(tmp_path.iterdir())


def test_what_is_not_ours_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(output: Path) -> Path:
        return make_once(output, "this", write)

    mine = tmp_path / "mine"
    mine.mkdir()
    assert command("set", DOC, build, ["--output", str(mine)]) == 0, "an empty folder will do"
    (tmp_path / "thesis.txt").write_text("years of work")
    for taken in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(SystemExit) as stop:
            command("set", DOC, build, ["--output", str(taken)])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        assert "another folder" in message
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_missing_photographs_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    folder.photograph.cache_clear()
    with pytest.raises(ImportError, match=r"needs skimage: pip install .*\[dev\]"):
        folder.photograph("coins.png")


@pytest.mark.parametrize("name", ["detection", "motion"])
def test_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"demo.{name}", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(f"demo.{name}", run_name="__main__")
    shown = capsys.readouterr().out
    assert f"python -m demo.{name} --output datasets/" in shown and "OUTPUT/train" in shown
