"""Settings of every test of video, and the difficult files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.revvideo.make_videos import KINDS


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The models here are so small that a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``make(name)``: the file of that one of the ``KINDS``, made once."""
    folder = tmp_path_factory.mktemp("videos")

    def make(name: str) -> Path:
        return folder / name if (folder / name).exists() else KINDS[name](folder / name)

    return make
