"""A run in one process: training with its hooks, evaluation, and what is left on disk."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.engine import hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, TensorboardXWriter
from omegaconf import DictConfig
from timm.utils import ModelEmaV3
from torch import nn

from backbones.common.errors import UserError
from revdet.data.datasets import dataset_facts, dataset_names
from revdet.data.loader import ResumableBatchSampler
from revdet.training.budget import apply_memory_budget
from revdet.training.build import amp_dtype, build_optimizer
from revdet.training.checkpoint import Checkpointer, load_initial_weights
from revdet.training.evaluation import to_json
from revdet.training.pictures import draw_curves, draw_predictions
from revdet.training.trainer import MetricsWriter, Trainer

logger = logging.getLogger("revdet")

# The score by which the best checkpoint is told.
BEST = "bbox/AP"


def train(cfg: DictConfig, model: nn.Module, *, resume: bool) -> None:
    """Train to ``train.max_iter``, evaluate, and write ``results.json``.

    Args:
        cfg: the recipe.
        model: its detector, on its device.
        resume: go on from the last checkpoint in ``train.output_dir``, if there is one, instead of
            starting from ``train.init_checkpoint``.

    Raises:
        UserError: weights, budget or optimizer settings do not fit the model, or the processes
            would not resume from the same checkpoint.
    """
    settings = cfg.train
    output_dir = Path(settings.output_dir)
    resume = resume and (output_dir / "last_checkpoint").is_file()
    if settings.init_checkpoint and not resume:
        load_initial_weights(model, settings.init_checkpoint)
    loader = instantiate(cfg.dataloader.train)
    _log_schedule(cfg, loader)
    if settings.memory_budget:
        apply_memory_budget(cfg, model, loader.dataset.records, amp_dtype(cfg))
    average = ModelEmaV3(model, settings.ema_decay, use_warmup=True) if settings.ema_decay else None
    trainer = _trainer(cfg, model, loader, average)
    result, trained = model, {}
    if average is not None:
        result, trained = average.module, {"training_model": model}
    checkpointer = Checkpointer(result, settings.output_dir, trainer=trainer, **trained)
    start_iter = 0
    if resume:
        checkpointer.load(checkpointer.get_checkpoint_file())
        start_iter = trainer.iter + 1
    if len(set(comm.all_gather(start_iter))) > 1:
        raise UserError(
            f"the processes find different checkpoints in {output_dir}: put it where all machines "
            "see it, to resume"
        )
    evaluations = Evaluations(cfg, result, checkpointer, resume=resume)
    if start_iter >= settings.max_iter:
        logger.info(f"{output_dir} has finished its {start_iter} iterations: evaluating")
        evaluations.set_iteration(trainer)
        metrics = evaluations.run()
        facts = {"iterations": start_iter, "best": evaluations.best}
        finish(cfg, result, metrics, facts, trained=False)
        return
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, ResumableBatchSampler):
        sampler.start_step = start_iter
    elif start_iter:
        logger.warning("dataloader.train is not revdet's: the order of the data starts over")
    trainer.register_hooks(_reporting(cfg, checkpointer, evaluations, start_iter))
    began = time.perf_counter()
    trainer.train(start_iter, settings.max_iter)
    facts = {
        "iterations": settings.max_iter,
        "seconds": round(time.perf_counter() - began, 1),  # since the last resume
        "memory": settings.memory,
        "stored_blocks": settings.stored_blocks,
        "best": evaluations.best,
    }
    if next(model.parameters()).is_cuda:
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    finish(cfg, result, evaluations.last, facts, trained=True)


def _trainer(cfg: DictConfig, model: nn.Module, loader: Any, average: ModelEmaV3 | None) -> Trainer:
    """The trainer of a recipe, with the hooks that belong to a step."""
    settings = cfg.train
    optimizer, schedule = build_optimizer(cfg, model)
    trainer = Trainer(
        _distributed(cfg, model),
        loader,
        optimizer,
        seed=settings.seed,
        accumulate=settings.accumulate,
        amp_dtype=amp_dtype(cfg),
        clip_grad_norm=settings.clip_grad_norm,
    )
    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(scheduler=schedule)])
    if average is not None:
        # The decay grows with the iteration, so that a short run too forgets how it started.
        trainer.register_hooks(
            [hooks.CallbackHook(after_step=lambda trainer: average.update(model, trainer.iter))]
        )
    return trainer


def _log_schedule(cfg: DictConfig, loader: Any) -> None:
    dataset = getattr(loader, "dataset", None)
    if not hasattr(dataset, "records"):
        return
    settings, batch = cfg.train, cfg.dataloader.train.total_batch_size
    images, processes = len(dataset.records), comm.get_world_size()
    each = batch // (processes * settings.accumulate)
    logger.info(
        f"{settings.max_iter} iterations of {batch} images, "
        f"{settings.max_iter * batch / images:.4g} epochs of {images}; an iteration is "
        f"{processes} × {settings.accumulate} × {each} (processes, batches of each, images of each)"
    )


def _distributed(cfg: DictConfig, model: nn.Module) -> nn.Module:
    options = dict(cfg.train.ddp)
    if not next(model.parameters()).is_cuda:
        options["device_ids"] = None
    return create_ddp_model(model, **options)


def _reporting(
    cfg: DictConfig, checkpointer: Checkpointer, evaluations: Evaluations, start_iter: int
) -> list[hooks.HookBase]:
    """Logs, checkpoints and evaluations: what is evaluated has been saved, and that been logged."""
    settings = cfg.train
    evaluation = hooks.EvalHook(settings.eval_period, evaluations.run)
    if not comm.is_main_process():
        return [evaluation]
    metrics = MetricsWriter(Path(settings.output_dir) / "metrics.json", start_iter)
    writers = [
        CommonMetricPrinter(settings.max_iter),  # with the time left, and the memory of a GPU
        metrics,
        TensorboardXWriter(settings.output_dir, purge_step=start_iter),
    ]

    def log_before_saving(trainer: Trainer) -> None:
        if (trainer.iter + 1) % settings.log_period == 0:
            metrics.write()

    return [
        hooks.CallbackHook(before_step=evaluations.set_iteration, after_step=log_before_saving),
        hooks.PeriodicCheckpointer(checkpointer, **settings.checkpointer),
        evaluation,
        hooks.PeriodicWriter(writers, period=settings.log_period),
    ]


class Evaluations:
    """Evaluates during training and keeps the best weights in ``model_best.pth``.

    Attributes:
        last: the metrics of the last evaluation; empty but on the main process.
        best: iteration and score of the best one; empty if there is none.
    """

    def __init__(
        self, cfg: DictConfig, model: nn.Module, checkpointer: Checkpointer, *, resume: bool
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.checkpointer = checkpointer
        self.iteration = 0
        self.last: dict[str, Any] = {}
        self.best: dict[str, float] = {}
        file = Path(cfg.train.output_dir) / "model_best.pth"
        if resume and file.is_file():
            # The file itself says what it scored, so that the two cannot disagree.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            self.best = {key: content[key] for key in ("iteration", BEST)}

    def set_iteration(self, trainer: Trainer) -> None:
        self.iteration = trainer.iter

    def run(self) -> dict[str, Any]:
        """Evaluate, and save the weights if they are better than any before."""
        self.last = evaluate(self.cfg, self.model)
        score = self.last.get("bbox", {}).get("AP", float("nan"))
        if score > self.best.get(BEST, float("-inf")):  # never true for NaN
            self.best = {"iteration": self.iteration + 1, BEST: score}
            self.checkpointer.save_weights("model_best", **self.best)
        return self.last


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """COCO metrics on the recipe's test set, in COCO points; empty but on the main process."""
    loader = instantiate(cfg.dataloader.test)
    metrics = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    return metrics or {}


def finish(
    cfg: DictConfig,
    model: nn.Module,
    metrics: dict[str, Any],
    facts: dict[str, Any],
    *,
    trained: bool,
) -> None:
    """Write results.json and the pictures, and say where they are.

    What an earlier session wrote about its training is kept where this one has only evaluated.
    """
    if not comm.is_main_process():
        return
    settings = cfg.train
    output_dir = Path(settings.output_dir)
    results = output_dir / "results.json"
    if not trained and results.is_file():
        facts = {**json.loads(results.read_text()).get("run", {}), **facts}
    content = {**to_json(metrics), "dataset": dataset_facts(cfg), "run": facts}
    partial = output_dir / "results.json.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, results)

    name = dataset_names(cfg, evaluation_only=True)[0]
    records = DatasetCatalog.get(name)[: settings.pictures]
    mapper = instantiate(cfg.dataloader.test.mapper)
    files = draw_predictions(model, records, mapper, name, output_dir / "pictures")
    written = ["results.json", f"{len(files)} pictures in pictures/"]
    if (output_dir / "metrics.json").exists():
        draw_curves(output_dir / "metrics.json", output_dir / "curves.png")
        written.append("curves.png")
    for task, scores in metrics.items():
        line = "  ".join(f"{key} {value:.2f}" for key, value in scores.items() if "-" not in key)
        logger.info(f"{task}: {line}")
    logger.info(f"{output_dir}: {', '.join(written)}")
