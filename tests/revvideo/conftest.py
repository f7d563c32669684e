"""The difficult files, a small set of videos, and the command run inside the test process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from revvideo.run import main
from tests.revvideo.make_videos import KINDS
from tests.revvideo.tiny_set import arguments, build_set


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``make(name)``: the file of that one of the ``KINDS``, made once."""
    folder = tmp_path_factory.mktemp("videos")

    def make(name: str) -> Path:
        return folder / name if (folder / name).exists() else KINDS[name](folder / name)

    return make


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 + 7 videos of three classes."""
    return build_set(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def run(videos: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``run(output, *arguments)``: the command, in this process; returns its status."""
    monkeypatch.setattr(
        "revvideo.training.results.draw_curves", lambda *_: None
    )  # a second each time

    def call(output: Path, *more: str, root: Path = videos, config: str | None = None) -> int:
        return main(arguments(root, output, *more, config=config))

    return call
