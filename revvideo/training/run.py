"""A run from a config to its results: training, testing, and what is left of both."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback

from backbones.common.errors import UserError, require_trackers
from backbones.common.files import locked, make_folder
from backbones.common.stopping import step_by_step
from revvideo.config import save_config
from revvideo.data.videos import VideoData
from revvideo.models import build_model
from revvideo.settings import Config
from revvideo.training import hardware
from revvideo.training.checkpoint import LAST, CheckpointIO, checkpoint_to_resume, saved_in
from revvideo.training.evaluation import gathered
from revvideo.training.log import ProgressBar, StepLog, set_up_log
from revvideo.training.metrics import MetricsLogger, cut_metrics, trackers
from revvideo.training.module import VideoModule
from revvideo.training.results import METRICS, write_results
from revvideo.training.saving import Averaging, Saving, stopped_at, told_to_stop
from revvideo.training.weights import read_weights

logger = logging.getLogger("revvideo")

_SAVE_MEMORY = (
    "raise optim.accumulate (in training) or lower test.batch_size (in testing); "
    "train.memory=reversible takes least, train.memory_budget=auto what there is"
)


def run(config: Config, *, resume: bool, eval_only: bool, weights: str = "") -> None:
    """Train and test, or only test; every process of the run calls this.

    ``resume`` continues from the last checkpoint, if there is one. ``eval_only`` tests ``weights``,
    or the last checkpoint, or else the weights of the config. What the user can fix is a UserError,
    mostly before anything is started.
    """
    output_dir = Path(config.train.output_dir)
    folder = last_checkpoint(output_dir).parent
    hardware.find_hardware(config)  # or a refusal
    # The other processes may come when the first one has begun to write.
    if hardware.is_first_process() and saved_in(folder) and not (resume or eval_only):
        remedy = "add --resume to continue it, or set train.output_dir to a new folder"
        raise UserError(f"{output_dir} already holds a run: {remedy}")
    last = checkpoint_to_resume(folder) if resume or (eval_only and not weights) else None
    if eval_only:
        weights = weights or (config.model.weights if last is None else str(last))
        if not weights:
            remedy = "train first, or set model.weights=FILE"
            raise UserError(f"--eval-only: {output_dir} holds no checkpoint; {remedy}")
    lock: AbstractContextManager[None] = nullcontext()
    if hardware.is_first_process():
        if not eval_only:
            build_model(config, num_classes=1)  # what it cannot be made of, before the data
            lock = locked(output_dir, "train.output_dir")
        make_folder(config.train.output_dir, "train.output_dir")
    set_up_log(output_dir)
    pl.seed_everything(config.train.seed, workers=True, verbose=False)
    facts: dict[str, Any] = {}
    try:
        with lock:
            if not eval_only:
                facts = _fit(config, last if resume else None)
                weights = str(last_checkpoint(output_dir))
            _evaluate(config, weights, facts)
    except torch.OutOfMemoryError as error:
        # Said here, because it may be this process alone that says it.
        reason = str(error).partition(". ")[0]
        print(f"error: {reason}: {_SAVE_MEMORY}", file=sys.stderr)
        raise SystemExit(2) from error


def last_checkpoint(output_dir: Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return output_dir / "checkpoints" / LAST


def _fit(config: Config, checkpoint: Path | None) -> dict[str, Any]:
    """Train from the beginning or from a checkpoint to the end; returns the facts of the run."""
    settings, optim = config.train, config.optim
    require_trackers(settings.loggers)
    output_dir = Path(settings.output_dir)
    last = last_checkpoint(output_dir)
    sharded = settings.strategy == "fsdp"
    # Of a sharded run, Lightning maps the file into memory itself.
    checkpoints = CheckpointIO(checkpoint, hand_out=not sharded)
    if checkpoint and checkpoints.averaged != bool(optim.ema):
        kind = f"a run with{'' if checkpoints.averaged else 'out'} averaged weights"
        remedy = "resume it with the optim.ema that is in its config.yaml"
        raise UserError(f"{checkpoint} is of {kind}: {remedy}")
    changed = checkpoints.changed(config)
    if sharded and "train.strategy" in changed:
        wrong = f"train.strategy=fsdp cannot take over the optimizer of {checkpoint}"
        raise UserError(f"{wrong}: resume with train.strategy={changed['train.strategy'][1]}")
    source = "" if checkpoint else config.model.weights
    weights = read_weights(source) if source else None
    data = VideoData(config, classes=checkpoints.classes, resume=checkpoint is not None)
    if not hardware.launched():
        data.prepare_data()  # before other processes are started, so that errors come at once
        data.setup("fit")
    module = VideoModule(config, weights)
    steps, saving = StepLog(settings.log_every), Saving(last, settings.checkpoint_every)
    bar = ProgressBar(refresh_rate=min(settings.log_every, 10))
    ema = [Averaging(decay=optim.ema)] if optim.ema else []
    others = trackers(settings.loggers, output_dir, checkpoints.step)

    def begin(trainer: pl.Trainer, *_: Any) -> None:  # when nothing has been refused
        if trainer.is_global_zero:
            save_config(config, output_dir / "config.yaml")
            cut_metrics(output_dir / METRICS, checkpoints.step)

    trainer = pl.Trainer(
        **hardware.trainer_arguments(config, sharded=sharded),
        plugins=[checkpoints],
        callbacks=[*ema, steps, bar, saving, LambdaCallback(on_train_start=begin)],
        logger=[MetricsLogger(output_dir / METRICS), *others],
        max_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        accumulate_grad_batches=optim.accumulate,
        gradient_clip_val=optim.clip_grad_norm or None,
        check_val_every_n_epoch=settings.val_every,
        log_every_n_steps=settings.log_every,
        num_sanity_val_steps=0 if checkpoint else 1,
    )
    what = f"continuing at step {checkpoints.step:,}" if checkpoint else "training"
    logger.info("%s; results in %s", what, output_dir)
    for key, (now, was) in changed.items():
        logger.warning("resumed with %s %s, which was %s", key, now, was)
    with step_by_step():
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except UserError:
            print(file=sys.stderr)  # behind the progress bar
            raise
        trainer.save_checkpoint(last)
    if number := told_to_stop(trainer):
        raise stopped_at(trainer, number, last)
    if not steps.seconds:
        ends = f"optim.epochs={optim.epochs}, optim.max_steps={optim.max_steps}"
        logger.info("nothing is left to train after step %s (%s)", trainer.global_step, ends)
    return {
        "steps": trainer.global_step,
        "seconds": round(steps.seconds, 1),  # in training steps, since the last resume
        "data_wait": round(steps.waited / steps.seconds, 4) if steps.seconds else None,
        **module.memory,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() or None,
        "left_out": _left_out(module),
    }


def _evaluate(config: Config, source: str, facts: dict[str, Any]) -> None:
    """Test weights and write down what came out, with the facts of the training before it."""
    weights = read_weights(source)
    data = VideoData(config, train=False, classes=weights.classes)
    if not hardware.launched():
        data.prepare_data()
    module = VideoModule(config, weights)
    shared = hardware.trainer_arguments(config, sharded=False)
    trainer = pl.Trainer(**shared, callbacks=[ProgressBar()], logger=False)
    trainer.test(module, data, verbose=False)
    left_out = {**facts.pop("left_out", {}), **_left_out(module)}
    if hardware.is_first_process():
        write_results(module, facts, left_out)


def _left_out(module: VideoModule) -> dict[str, str]:
    """What the scan could not open, and what turned out later, on any process, to be unreadable."""
    later = (problem for part in gathered(module.problems) for problem in part.items())
    return {**module.data.unreadable(), **dict(later)}
