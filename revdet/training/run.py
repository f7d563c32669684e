"""A run in one process: set up, trained with its hooks, evaluated."""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter
from omegaconf import DictConfig, OmegaConf
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from backbones.common.errors import UserError
from backbones.common.files import remove_partials
from backbones.common.sharding import shard, whole
from backbones.common.stopping import step_by_step
from backbones.engine.policies import blocks_of
from revdet.data.loader import ResumableBatchSampler
from revdet.data.normalise import use_normalised
from revdet.models import build_model, find_trunk
from revdet.training.budget import apply_memory_budget
from revdet.training.checkpoint import Checkpointer, checkpoint_to_resume, load_initial_weights
from revdet.training.evaluation import Evaluations, evaluate
from revdet.training.hardware import is_of_a_lost_process
from revdet.training.metrics import MetricsWriter
from revdet.training.optim import build_optimizer
from revdet.training.preflight import log_to
from revdet.training.results import Facts, finish
from revdet.training.saving import Evaluating, Saving, was_evaluated
from revdet.training.trackers import trackers
from revdet.training.trainer import Trainer

logger = logging.getLogger("revdet")
_CONFIG = "config.yaml.partial"


def run(cfg: DictConfig, device: str, args: argparse.Namespace) -> None:
    """Do what the command line says, after its preflight, as one of the processes of the job."""
    _set_up_output(cfg, args)
    use_normalised(cfg, evaluation_only=args.eval_only)
    if cfg.train.deterministic:
        # What a GPU needs to give the same bits is read when its libraries start, which they do
        # later. An operation that cannot is an error.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    seed_all_rng(cfg.train.seed)
    model = build_model(cfg, device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no GPU"
    logger.info(f"on {device} ({name}), {comm.get_world_size()} processes")
    if args.eval_only:
        Checkpointer(model).load(args.weights)
        finish(cfg, model, evaluate(cfg, model), {"checkpoint": args.weights}, trained=False)
    else:
        train(cfg, model, resume=args.resume)


def _set_up_output(cfg: DictConfig, args: argparse.Namespace) -> None:
    output_dir = Path(cfg.train.output_dir)
    log_to(str(output_dir), comm.get_rank())
    # The trainer logs the traceback of any error; for one that the user can fix, a line is enough.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_not_for_the_user)
    if comm.is_main_process() and not args.eval_only:
        remove_partials(output_dir)
        (output_dir / "environment.txt").write_text(collect_env_info() + "\n")
        # As it stands now, under its name when the checkpoint that it resumes has taken it.
        LazyConfig.save(cfg, str(output_dir / _CONFIG))
        logger.info(f"{args.config} -> {output_dir} (config.yaml, environment.txt, log.txt)")


def _is_not_for_the_user(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, UserError | FloatingPointError) and not is_of_a_lost_process(error)


def train(cfg: DictConfig, model: nn.Module, *, resume: bool) -> None:
    """Train to ``train.max_iter``, evaluate, and write ``results.json``.

    With ``resume`` from the last checkpoint in ``train.output_dir`` on, if there is one. A
    UserError says that weights, budget or optimizer settings do not fit the model, or that the
    processes would not resume from the same checkpoint.
    """
    settings, output_dir = cfg.train, Path(cfg.train.output_dir)
    last = checkpoint_to_resume(output_dir) if resume and comm.is_main_process() else None
    last = comm.all_gather(last)[0]
    resume = last is not None
    if settings.init_checkpoint and not resume:
        load_initial_weights(model, settings.init_checkpoint)
    loader = instantiate(cfg.dataloader.train)
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, ResumableBatchSampler):  # the loader is revdet's
        _set_length(cfg, len(sampler.groups))
    elif settings.epochs or settings.warmup_iters:
        raise UserError("train.epochs and train.warmup_iters need revdet's loader: set max_iter")
    amp_dtype = getattr(torch, settings.amp.dtype) if settings.amp.enabled else None
    if settings.memory_budget:
        apply_memory_budget(cfg, model, loader.dataset.records, amp_dtype)
    trainer = _trainer(cfg, model, loader, amp_dtype)
    result, trained = model, {}
    if settings.ema_decay:
        average = ModelEmaV3(model, settings.ema_decay, use_warmup=True)
        # The decay grows with the iteration, so that a short run too forgets how it started.
        update = hooks.CallbackHook(after_step=lambda trainer: average.update(model, trainer.iter))
        trainer.register_hooks([update])
        result, trained = average.module, {"training_model": model}
    checkpointer = Checkpointer(result, settings.output_dir, trainer=trainer, **trained)
    start_iter, facts = 0, _facts_to_compare(cfg)
    if last is not None:
        if not last.exists():
            remedy = "put it where all machines see it, to resume"
            raise UserError(f"not every process finds the checkpoint {last}: {remedy}")
        before = checkpointer.load(str(last)).get("facts", {})
        start_iter = trainer.iter + 1
        for name, value in facts.items():
            if name in before and before[name] != value:
                logger.warning(f"resumed with {name} {value}, which was {before[name]}")
    if comm.is_main_process():
        (output_dir / _CONFIG).replace(output_dir / "config.yaml")
    evaluations = Evaluations(cfg, checkpointer, resume=resume)
    if finished := start_iter >= settings.max_iter:
        logger.info(f"{output_dir} has finished its {start_iter} iterations: evaluating")
        evaluations.run(trainer.iter)
        facts = {"iterations": start_iter}
    else:
        if isinstance(sampler, ResumableBatchSampler):
            sampler.start_step = start_iter
        elif start_iter:
            logger.warning("dataloader.train is not revdet's: the order of the data starts over")
        trainer.register_hooks(_reporting(evaluations, start_iter, facts))
        began = time.perf_counter()
        with step_by_step():
            trainer.train(start_iter, settings.max_iter)
        seconds = round(time.perf_counter() - began, 1)  # since the last resume
        names = ["memory", "stored_blocks", "memory_keep", "memory_slices"]
        policy: Any = OmegaConf.to_container(OmegaConf.masked_copy(settings, names))
        facts = {"iterations": settings.max_iter, "seconds": seconds, **policy}
        if next(model.parameters()).is_cuda:
            facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    facts["best"] = evaluations.best
    with whole(result):  # of which the main process draws what it finds
        finish(cfg, result, evaluations.last, facts, trained=not finished)


def _trainer(cfg: DictConfig, model: nn.Module, loader: Any, amp: torch.dtype | None) -> Trainer:
    settings = cfg.train
    sharded = settings.strategy == "fsdp" and comm.get_world_size() > 1
    if sharded:  # each process has a part of the weights of the first; the blocks are units
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(next(model.parameters()).device.type, (comm.get_world_size(),))
        shard(model, blocks_of(find_trunk(model)[1]).values(), mesh)
        logger.info("every process holds a part of the weights (train.strategy=fsdp)")
    optimizer, schedule = build_optimizer(cfg, model)
    of_cpu = {} if next(model.parameters()).is_cuda else {"device_ids": None}
    model = model if sharded else create_ddp_model(model, **settings.ddp, **of_cpu)
    same = {name: settings[name] for name in ("seed", "accumulate", "clip_grad_norm")}
    trainer = Trainer(model, loader, optimizer, amp_dtype=amp, **same)
    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(scheduler=schedule)])
    return trainer


def _set_length(cfg: DictConfig, images: int) -> None:
    """Make iterations of epochs, and the part of them that is warm-up; say how long a run it is."""
    settings, batch = cfg.train, cfg.dataloader.train.total_batch_size
    if settings.epochs:
        settings.max_iter = max(1, round(settings.epochs * images / batch))
    if settings.warmup_iters:
        if "warmup_length" not in cfg.lr_multiplier:
            raise UserError("train.warmup_iters needs an lr_multiplier with a warmup_length")
        cfg.lr_multiplier.warmup_length = min(1.0, settings.warmup_iters / settings.max_iter)
    total, processes, batches = settings.max_iter, comm.get_world_size(), settings.accumulate
    steps = f"{total} iterations of {batch} images, {total * batch / images:.4g} epochs of {images}"
    parts = f"{processes} × {batches} × {batch // (processes * batches)}"
    logger.info(f"{steps}; an iteration is {parts} (processes, batches of each, images of each)")


def _facts_to_compare(cfg: DictConfig) -> Facts:
    """What a resumed run may have other than before, and does not say by itself."""
    return {
        "train.seed": cfg.train.seed,
        "images in an iteration": cfg.dataloader.train.total_batch_size,
        "train.accumulate": cfg.train.accumulate,
        "processes": comm.get_world_size(),
        "classes": cfg.model.get("roi_heads", {}).get("num_classes", 0),
    }


def _reporting(evaluations: Evaluations, start: int, facts: Facts) -> list[hooks.HookBase]:
    """Logs, checkpoints and evaluations: what is evaluated has been saved, and that been logged."""
    cfg, checkpointer = evaluations.cfg, evaluations.checkpointer
    settings, file = cfg.train, Path(cfg.train.output_dir) / "metrics.json"
    main, period = comm.is_main_process(), settings.eval_period
    pending = period > 0 and start % period == 0 and 0 < start < settings.max_iter
    pending = comm.all_gather(pending and main and not was_evaluated(file, start - 1))[0]
    metrics = MetricsWriter(file, start) if main else None
    saving = Saving(checkpointer, **settings.checkpointer, facts=facts, metrics=metrics)
    evaluation = Evaluating(evaluations, saving, pending=pending)
    if metrics is None:
        return [saving, evaluation]
    writers = [CommonMetricPrinter(settings.max_iter), metrics, *trackers(cfg, start)]
    return [saving, evaluation, hooks.PeriodicWriter(writers, settings.log_period)]
