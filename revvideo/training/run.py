"""A run from a config to its results: training, testing, and what is left of both."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from backbones.common.errors import UserError
from revvideo.config import Config, save_config
from revvideo.data.videos import VideoData
from revvideo.training.callbacks import MetricsLogger, ProgressBar, StepLog
from revvideo.training.checkpoint import RunInfo, read_run_info
from revvideo.training.hardware import check_hardware, is_first_process, launched, trainer_arguments
from revvideo.training.module import VideoModule
from revvideo.training.results import METRICS, gathered, write_results

logger = logging.getLogger("revvideo")

# What Lightning says that users of this command cannot act on.
_NOISE = (
    ".*isinstance.treespec, LeafSpec.. is deprecated",
    "The dirpath has changed from",
    "Checkpoint directory .* exists and is not empty",  # of a run that is resumed
    "You're using the WeightAveraging callback with a model that overrides",
    "The '.*_dataloader' does not have many workers",
)

_SAVE_MEMORY = (
    "raise optim.accumulate (in training) or lower test.batch_size (in testing); "
    "train.memory=reversible takes least, train.memory_budget=auto what there is"
)


def run(config: Config, *, resume: bool, eval_only: bool, weights: str = "") -> None:
    """Train and test, or only test. Every process of the run calls this.

    Args:
        config: of the run.
        resume: whether to continue from the last checkpoint, if there is one.
        eval_only: whether to test without training.
        weights: to test with ``eval_only``; "" for those of the last checkpoint or, where there is
            none, of the config.

    Raises:
        UserError: for what the user can fix; most of it before anything is started.
    """
    output_dir = Path(config.train.output_dir)
    last = last_checkpoint(output_dir)
    check_hardware(config)
    # The other processes may come when the first one has begun to write.
    if is_first_process() and last.exists() and not (resume or eval_only):
        raise UserError(
            f"{output_dir} already holds a run: add --resume to continue it, or set "
            "train.output_dir to a new folder"
        )
    if eval_only:
        weights = weights or (str(last) if last.is_file() else config.model.weights)
        if not weights:
            raise UserError(
                f"--eval-only: {output_dir} holds no checkpoint; train first, or set "
                "model.weights=FILE"
            )
    set_up_log(output_dir)
    pl.seed_everything(config.train.seed, workers=True, verbose=False)
    facts: dict[str, Any] = {}
    try:
        if not eval_only:
            facts = _fit(config, last if resume and last.is_file() else None)
            weights = str(last)
        _evaluate(config, weights, facts)
    except torch.OutOfMemoryError as error:
        # Said here, because it may be this process alone that says it.
        reason = str(error).partition(". ")[0]
        print(f"error: {reason}: {_SAVE_MEMORY}", file=sys.stderr)
        raise SystemExit(2) from error


def last_checkpoint(output_dir: Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return output_dir / "checkpoints" / "last.ckpt"


def _fit(config: Config, checkpoint: Path | None) -> dict[str, Any]:
    """Train from the beginning or from a checkpoint to the end; returns the facts of the run."""
    settings, optim = config.train, config.optim
    output_dir = Path(settings.output_dir)
    info = None if checkpoint is None else _run_info(checkpoint)
    data = VideoData(config, classes=info.classes if info else None, resume=info is not None)
    if not launched():
        data.prepare_data()  # before other processes are started, so that errors come at once
        data.setup("fit")
    weights = "" if info else config.model.weights
    module = VideoModule(config, weights)
    steps = StepLog(settings.log_every)
    callbacks: list[pl.Callback] = [
        steps,
        ProgressBar(refresh_rate=min(settings.log_every, 10)),
        ModelCheckpoint(
            last_checkpoint(output_dir).parent,
            filename=last_checkpoint(output_dir).stem,
            every_n_train_steps=settings.checkpoint_every,
            save_top_k=-1,  # all of them, in one file
            enable_version_counter=False,
        ),
    ]
    if optim.ema:
        callbacks.insert(0, EMAWeightAveraging(decay=optim.ema))
    start = info.step if info else 0
    trainer = pl.Trainer(
        **trainer_arguments(config),
        callbacks=callbacks,
        logger=[
            MetricsLogger(output_dir / METRICS, start),
            TensorBoardLogger(output_dir, name="", version="tensorboard", purge_step=start or None),
        ],
        max_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        accumulate_grad_batches=optim.accumulate,
        gradient_clip_val=optim.clip_grad_norm or None,
        check_val_every_n_epoch=settings.val_every,
        log_every_n_steps=settings.log_every,
        num_sanity_val_steps=0 if info else 1,
    )
    if is_first_process():
        output_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, output_dir / "config.yaml")
    where = f"continuing at step {start:,}" if info else "training"
    logger.info("%s; results in %s", where, output_dir)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(last_checkpoint(output_dir))
    return {
        "steps": trainer.global_step,
        "seconds": round(steps.seconds, 1),  # in training steps, since the last resume
        "data_wait": round(steps.waited / steps.seconds, 4) if steps.seconds else None,
        "memory": module.memory,
        "stored_blocks": module.stored_blocks,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() or None,
        "left_out": {**data.unreadable(), **gathered(module.problems)},
    }


def _evaluate(config: Config, weights: str, facts: dict[str, Any]) -> None:
    """Test weights and write down what came out, with the facts of the training before it."""
    info = read_run_info(Path(weights).expanduser())
    data = VideoData(config, train=False, classes=info.classes if info else None)
    if not launched():
        data.prepare_data()
    module = VideoModule(config, weights, complete=True)
    trainer = pl.Trainer(
        **trainer_arguments(config, sharded=False),
        callbacks=[ProgressBar()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.test(module, data, verbose=False)
    left_out = {**data.unreadable(), **facts.pop("left_out", {}), **gathered(module.problems)}
    if is_first_process():
        write_results(config, data, module, facts, left_out)


def _run_info(checkpoint: Path) -> RunInfo:
    info = read_run_info(checkpoint)
    if info is None:
        raise UserError(f"{checkpoint} is damaged or no checkpoint of a run: move it away")
    return info


# ---- The log


class _Console(logging.Handler):
    """To stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_log(output_dir: Path) -> None:
    """The first process writes to the console and to ``log.txt``, the others are quiet."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for handler in logger.handlers[:]:  # of a run before in this process
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    if not is_first_process():
        logger.setLevel(logging.CRITICAL)
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    logger.setLevel(logging.INFO)
    for handler in (_Console(), logging.FileHandler(output_dir / "log.txt")):
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%m/%d %H:%M:%S"))
        logger.addHandler(handler)
