"""The processes of a run: one, several that this command starts, or several of torchrun's."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable
from signal import SIGINT, SIGTERM
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as spawn
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from backbones.common.console import try_device
from backbones.common.errors import UserError
from backbones.common.stopping import Stopped, step_by_step

# What torchrun tells each process that it starts.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What gloo and NCCL say when the process at the other end has gone.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "process exited", "was aborted")
# Seconds in which the process that has gone is found to have, before those that miss it are.
_CAUSE_FIRST = 5
_USER_ERROR = f"{UserError.__module__}.{UserError.__name__}: "


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return all(name in os.environ for name in _TORCHRUN)


def is_first_on_machine() -> bool:
    """Whether this process does what is done once on each machine, before it joins the others."""
    return not under_torchrun() or os.environ["LOCAL_RANK"] == "0"


def resolve_device(name: str, num_gpus: int) -> str:
    """The device that ``train.device`` stands for in this process or the ``num_gpus`` it starts.

    The key itself stays: a config.yaml may be used on another machine. A device that cannot be
    used is a UserError.
    """
    given = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if num_gpus > 1 and torch.cuda.is_available():
        return name  # not tried here: that would hold memory of the first one's GPU
    if under_torchrun() and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return str(try_device(name, f"train.device={given}", "set train.device=cpu or auto"))


def launch(function: Callable[..., None], cfg: DictConfig, device: str, args: Namespace) -> None:
    """Call ``function(cfg, device, args)`` in every process of the job, in one process group.

    Under torchrun this process is one of them already, and the counts are torchrun's. Otherwise
    the processes are started that the command line asks for. A UserError and Stopped come through,
    in whichever process they were raised.
    """
    if not under_torchrun():
        try:
            counts = args.num_gpus, args.num_machines, args.machine_rank, args.dist_url
            # They hear a signal too, and the first of them that has ended says so.
            with step_by_step(patient=args.num_gpus > 1):
                spawn(_call, *counts, args=(function, cfg, device, args))
        except ProcessRaisedException as error:
            if _USER_ERROR not in _last_line(error):
                raise
            raise UserError(_last_line(error).removeprefix(_USER_ERROR)) from error
        except ProcessExitedException as error:
            if name := error.signal_name:  # by the system, as for memory, or by a person
                what = f"process {error.error_index} was killed ({name}), which has ended the run"
                raise UserError(f"{what}: continue with --resume") from error
            if (error.exit_code or 0) - 128 not in (SIGINT, SIGTERM):
                raise
            what = f"what is done is saved in {cfg.train.output_dir}; --resume continues"
            raise Stopped(error.exit_code - 128, what) from error
        return
    if int(os.environ["WORLD_SIZE"]) > 1:
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        comm.synchronize()
    _call(function, cfg, device, args)


def _call(function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except UserError as error:  # of this very class; one of a loader's process is a text too
        raise UserError(_last_line(error).removeprefix(_USER_ERROR)) from error
    except RuntimeError as error:
        if not is_of_a_lost_process(error):
            raise
        time.sleep(_CAUSE_FIRST)
        ended = "another process of the run has ended, and no line if it was killed"
        raise UserError(f"{ended}: look for its error, and continue with --resume") from error
    if dist.is_initialized():
        dist.destroy_process_group()


def is_of_a_lost_process(error: BaseException | None) -> bool:
    """Whether an error of a collective operation is that a process does not answer any more."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def _last_line(error: Exception) -> str:
    """Of another process comes its traceback as text, which ends with class and message."""
    return str(error).strip().splitlines()[-1]
