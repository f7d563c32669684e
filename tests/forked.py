"""Processes that have imported everything already, which takes ten seconds each time."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

_start_processes = torch.multiprocessing.start_processes


def start(
    main: Callable[[list[str]], int], arguments: Sequence[str], log: Path, **environment: str
) -> BaseProcess:
    """A command in a new process, which exits with its status; its output goes to ``log``."""
    _server()
    args = (main, list(arguments), str(log), {**os.environ, **environment})
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=args)
    process.start()
    return process


def start_processes(
    function: Callable[..., None], args: tuple[Any, ...] = (), nprocs: int = 1, **options: Any
) -> Any:
    """In the place of ``torch.multiprocessing.start_processes``, which starts them from nothing."""
    _server()
    args = (function, dict(os.environ), *args)
    return _start_processes(_call, args, nprocs, **options, start_method="forkserver")


def _server() -> None:
    """Where processes are forked from: here, autograd would have its threads already."""
    forkserver.set_forkserver_preload(["revdet.training.run", "revvideo.training.run", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()


def _call(
    rank: int, function: Callable[..., None], environment: Mapping[str, str], *args: Any
) -> None:
    _settle(environment)
    function(rank, *args)


def _run(
    main: Callable[[list[str]], int], arguments: list[str], log: str, environment: Mapping[str, str]
) -> None:
    with open(log, "w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    _settle(environment)
    # It has no threads yet that a fork would lose.
    torch.multiprocessing.start_processes = partial(_start_processes, start_method="fork")
    sys.exit(main(arguments))


def _settle(environment: Mapping[str, str]) -> None:
    gc.freeze()  # a million objects, which a test that looks at all of them would look at too
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    # Of loaders: workers from a server of this process would not notice when it is killed.
    multiprocessing.set_start_method("fork", force=True)
    # Found out by Lightning when it was imported, before there were these variables.
    if lightning := sys.modules.get("lightning.pytorch.utilities"):
        lightning.rank_zero_only.rank = int(environment.get("RANK", 0))
