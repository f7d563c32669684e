"""Runs in processes of their own that have imported everything already, which takes ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from revvideo.run import main

_context = multiprocessing.get_context("forkserver")


def start(arguments: Sequence[str], log: Path, **environment: str) -> BaseProcess:
    """``run.py`` in a new process, which exits with its status; its output goes to ``log``."""
    process = _context.Process(target=_run, args=(list(arguments), str(log), environment))
    _context.set_forkserver_preload(["revvideo.training.run", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the server that processes are forked from
        process.start()
    return process


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    with open(log, "w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    # Of loaders: workers from a server of this process would not notice when it is killed.
    multiprocessing.set_start_method("fork", force=True)
    # Found out by Lightning when it was imported, before there were these variables.
    rank_zero_only.rank = int(environment.get("RANK", 0))
    sys.exit(main(arguments))
