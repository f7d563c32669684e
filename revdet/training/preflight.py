"""What is wrong with a run, found out before anything is started."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from backbones.common.errors import UserError, require_trackers
from backbones.common.files import locked, make_folder
from backbones.memory.budget import parse_budget
from revdet.data.normalise import normalise
from revdet.training import hardware
from revdet.training.checkpoint import checkpoint_to_resume, holds_a_run
from revdet.training.weights import fetch_weights


def preflight(cfg: DictConfig, args: argparse.Namespace, held: ExitStack) -> str:
    """Check the settings; then, in one process of each machine, have the weights and the data.

    Returns the device to run on. ``held`` gets the lock of the output folder, to be held as long.
    """
    train = cfg.train
    device = hardware.resolve_device(train.device, args.num_gpus)
    _check_budget(train, device, args)
    require_trackers([] if args.eval_only else train.loggers)
    _check_processes(train, device, args)
    if args.eval_only:
        args.weights = _weights_to_evaluate(train, args)
    elif not args.resume and (run := holds_a_run(Path(train.output_dir))):
        remedy = "add --resume to continue it, or set train.output_dir to a new folder"
        raise UserError(f"{train.output_dir} already holds a run ({run}): {remedy}")
    if hardware.is_first_on_machine():
        rank = int(os.environ["RANK"]) if hardware.under_torchrun() else args.machine_rank
        make_folder(train.output_dir, "train.output_dir")
        if rank == 0 and not args.eval_only:
            held.enter_context(locked(Path(train.output_dir), "train.output_dir"))
        log_to(train.output_dir, rank)
        last = None if args.eval_only else checkpoint_to_resume(Path(train.output_dir))
        weights = args.weights if args.eval_only else str(last or train.init_checkpoint)
        if weights and not last:
            fetch_weights(weights)
        normalise(cfg, evaluation_only=args.eval_only, weights=weights)
    return device


def log_to(output_dir: str, rank: int) -> None:
    """Log to ``log.txt`` there and, from the first process, to the terminal, and nowhere else."""
    for name in ("revdet", "detectron2", "fvcore"):
        # An earlier run in this process has its own log. Detectron2 remembers whom it has set up.
        logging.getLogger(name).handlers.clear()
        setup_logger.__wrapped__(output_dir, distributed_rank=rank, name=name)


def _check_budget(train: DictConfig, device: str, args: argparse.Namespace) -> None:
    budget = train.memory_budget
    for name, free in (("stored_blocks", 0), ("memory_keep", []), ("heads_memory", "auto")):
        if budget and train[name] != free:
            chosen = f"train.memory_budget={budget} chooses what is kept"
            raise UserError(f"{chosen}, and so does train.{name}={train[name]}: set one of the two")
    if budget == "auto" and not device.startswith("cuda") and not args.eval_only:
        needs = "train.memory_budget=auto needs a GPU that tells what it has free"
        remedy = "set a size such as 12GB, or train.memory_budget= for none"
        raise UserError(f"{needs}, and the run is on {device}: {remedy}")
    if budget not in ("", "auto"):
        try:
            parse_budget(budget)
        except ValueError as error:
            raise UserError(f"train.memory_budget: {error}") from error


def _check_processes(train: DictConfig, device: str, args: argparse.Namespace) -> None:
    if train.strategy == "fsdp" and train.ema_decay:
        raise UserError("train.ema_decay does not go with train.strategy=fsdp: set 0, or ddp")
    if train.strategy == "fsdp" and train.amp.enabled and train.amp.dtype == "float16":
        raise UserError("train.amp.dtype=float16 does not go with fsdp: set bfloat16")
    if hardware.under_torchrun():
        if args.num_gpus != 1 or args.num_machines != 1:
            raise UserError("torchrun starts the processes: leave out --num-gpus, --num-machines")
        return
    if args.num_gpus < 1:
        raise UserError(f"--num-gpus {args.num_gpus}: use a number >= 1")
    if not 0 <= args.machine_rank < args.num_machines:
        which = f"--machine-rank {args.machine_rank} of --num-machines {args.num_machines}"
        raise UserError(f"{which}: machines are counted from 0")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines > 1 needs --dist-url tcp://HOST:PORT")
    found, on_gpu = torch.cuda.device_count(), device.startswith("cuda")
    if args.num_gpus > 1 and found and not on_gpu:
        raise UserError("several processes on the CPU: hide the GPUs with CUDA_VISIBLE_DEVICES=''")
    if on_gpu and args.num_gpus > found:
        raise UserError(f"--num-gpus {args.num_gpus}, but {found} are found: set {found}")


def _weights_to_evaluate(train: DictConfig, args: argparse.Namespace) -> str:
    given = any(o.startswith("train.init_checkpoint=") for o in args.overrides)
    path = train.init_checkpoint if given else checkpoint_to_resume(Path(train.output_dir))
    if not path:
        remedy = "train first, or set train.init_checkpoint=FILE"
        raise UserError(f"--eval-only: {train.output_dir} holds no checkpoint; {remedy}")
    return str(path)
