"""The difficult files, a small set of videos, and the command run inside the test process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

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
    # A second each time.
    monkeypatch.setattr("revvideo.training.results.draw_curves", lambda *_: None)
    monkeypatch.setattr("revvideo.training.module.complexity_table", lambda *_: "")

    def call(output: Path, *more: str, root: Path = videos) -> int:
        return main(arguments(root, output, *more))

    return call


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the checkpoints that are opened."""
    monkeypatch.setattr(torch, "load", Mock(wraps=torch.load))
    return torch.load
