"""Train and evaluate a detector from a recipe.

    python revdet/train_net.py --config configs/detection/demo/mask_rcnn_rev_vit_demo.py
    python revdet/train_net.py --config … --num-gpus 8 train.output_dir=output/mine
    python revdet/train_net.py --config … --resume          continue an interrupted run, exactly
    python revdet/train_net.py --config … --eval-only       evaluate the run in train.output_dir

Everything in a recipe can be overridden by key=value, for example:

    train.memory=store|checkpoint|reversible   what the trunk keeps for the backward pass
    train.stored_blocks=4                      … except its last four blocks, which store
    train.amp.enabled=true train.amp.dtype=bfloat16
    train.max_iter=1000 optimizer.lr=1e-4 dataloader.train.total_batch_size=4

Results go to train.output_dir: results.json, metrics.json, TensorBoard events, log.txt,
curves.png, pictures/ and checkpoints.
"""

from __future__ import annotations

import revdet  # noqa: F401  first, because it quiets the deprecations of what follows

# isort: split
import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.engine import hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch.multiprocessing.spawn import ProcessRaisedException

import backbones
from revdet.checkpoint import Checkpointer
from revdet.config import load_config
from revdet.dataloader import ResumableBatchSampler
from revdet.dataset_checks import check_dataset
from revdet.datasets import register_datasets
from revdet.errors import UserError
from revdet.evaluation import to_json
from revdet.pictures import draw_curves, draw_predictions
from revdet.trainer import AMP_DTYPES, MetricsWriter, Trainer

logger = logging.getLogger("revdet")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, in the words that Detectron2 users know."""
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="revdet/train_net.py",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--config",
        "--config-file",
        dest="config",
        required=True,
        metavar="FILE",
        help="the recipe: a file under configs/detection, or the config.yaml of an earlier run",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in train.output_dir; start anew if there is none",
    )
    add(
        "--eval-only",
        action="store_true",
        help="only evaluate: train.init_checkpoint if given here, else the last checkpoint",
    )
    add(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, one per GPU; without a GPU they run on the CPU",
    )
    add("--num-machines", type=int, default=1, metavar="N", help="machines in the job")
    add("--machine-rank", type=int, default=0, metavar="K", help="this machine, from 0")
    add(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet, such as tcp://HOST:PORT; auto on a single machine",
    )
    add("overrides", nargs="*", metavar="key=value", help="override the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can fix."""
    args = parse_args(argv)
    try:
        register_datasets()
        cfg = load_config(args.config, args.overrides)
        preflight(cfg, args)
        launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args),
        )
    except UserError as error:
        print(f"error: {_last_line(error)}", file=sys.stderr)
        return 2
    except ProcessRaisedException as error:
        # A spawned process sends its traceback, whose last line is the message.
        if "revdet.errors.UserError: " not in str(error).strip().splitlines()[-1]:
            raise
        print(f"error: {_last_line(error)}", file=sys.stderr)
        return 2
    return 0


def _last_line(error: Exception) -> str:
    """The message of a :class:`UserError`, also if other processes wrapped it in a traceback."""
    return str(error).strip().splitlines()[-1].removeprefix("revdet.errors.UserError: ")


def _device(cfg: DictConfig) -> str:
    if cfg.train.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(cfg.train.device)


def preflight(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Find out what is wrong before anything is started.

    Raises:
        UserError: with the thing and the remedy.
    """
    train = cfg.train
    on_gpu = _device(cfg).startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but no GPU is found: set train.device=cpu")
    if train.amp.enabled and train.amp.dtype not in AMP_DTYPES:
        raise UserError(f"train.amp.dtype={train.amp.dtype!r}: use {' or '.join(AMP_DTYPES)}")
    if not on_gpu and args.num_gpus > 1 and torch.cuda.is_available():
        raise UserError("several processes on the CPU: hide the GPUs with CUDA_VISIBLE_DEVICES=''")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines > 1 needs --dist-url tcp://HOST:PORT")
    if train.seed < 0:
        raise UserError(f"train.seed={train.seed}: use a number >= 0")
    if on_gpu and args.num_gpus > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(
            f"--num-gpus {args.num_gpus}, but {found} are found: set --num-gpus {found}"
        )
    if args.eval_only:
        args.weights = _weights_to_evaluate(cfg, args)
    elif not args.resume and (last := _last_checkpoint(train.output_dir)):
        raise UserError(
            f"{train.output_dir} already holds a run ({Path(last).name}): add --resume to continue "
            "it, or set train.output_dir to a new folder"
        )
    if args.machine_rank == 0:
        names = [cfg.dataloader.test.dataset.names]
        if not args.eval_only:
            names.insert(0, cfg.dataloader.train.dataset.names)
        for name in names:
            for single in [name] if isinstance(name, str) else name:
                check_dataset(
                    single,
                    num_classes=OmegaConf.select(cfg, "model.roi_heads.num_classes"),
                    decode=train.check_data,
                )


def _last_checkpoint(output_dir: str) -> str:
    tag = Path(output_dir) / "last_checkpoint"
    return str(tag.parent / tag.read_text().strip()) if tag.is_file() else ""


def _weights_to_evaluate(cfg: DictConfig, args: argparse.Namespace) -> str:
    given = any(o.startswith("train.init_checkpoint=") for o in args.overrides)
    path = cfg.train.init_checkpoint if given else _last_checkpoint(cfg.train.output_dir)
    if not path:
        raise UserError(
            f"--eval-only: {cfg.train.output_dir} holds no checkpoint; train first, or set "
            "train.init_checkpoint=FILE"
        )
    return path


def run(cfg: DictConfig, args: argparse.Namespace) -> None:
    """What each process does."""
    register_datasets()
    _set_up_output(cfg, args)
    seed_all_rng(cfg.train.seed)
    model = _build_model(cfg)
    if args.eval_only:
        Checkpointer(model).load(args.weights)
        _finish(cfg, model, evaluate(cfg, model), {"checkpoint": args.weights}, trained=False)
    else:
        train(cfg, args, model)


def _set_up_output(cfg: DictConfig, args: argparse.Namespace) -> None:
    output_dir = Path(cfg.train.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("revdet", "detectron2", "fvcore"):
        setup_logger(str(output_dir), distributed_rank=comm.get_rank(), name=name)
    # The trainer logs the traceback of any error; for one that the user can fix, a line is enough.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_not_user_error)
    if comm.is_main_process() and not args.eval_only:
        (output_dir / "environment.txt").write_text(collect_env_info() + "\n")
        LazyConfig.save(cfg, str(output_dir / "config.yaml"))
        logger.info(f"{args.config} -> {output_dir} (config.yaml, environment.txt, log.txt)")


def _is_not_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


def _build_model(cfg: DictConfig) -> torch.nn.Module:
    try:
        model = instantiate(cfg.model)
        backbones.set_memory(model.backbone, cfg.train.memory, cfg.train.stored_blocks)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the model cannot be built: {type(error).__name__}: {error}") from error
    trunk = sum(p.numel() for p in model.backbone.parameters())
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        f"model: {total / 1e6:.2f} M parameters, {trunk / 1e6:.2f} M of them in the trunk and "
        f"pyramid; memory policy {cfg.train.memory}, {cfg.train.stored_blocks} blocks stored"
    )
    return model.to(_device(cfg))


def train(cfg: DictConfig, args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Train from ``train.init_checkpoint`` or the last checkpoint to ``train.max_iter``."""
    settings = cfg.train
    cfg.optimizer.params.model = model
    try:
        optimizer = instantiate(cfg.optimizer)
        schedule = instantiate(cfg.lr_multiplier)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"the optimizer cannot be built: {error}") from error
    loader = instantiate(cfg.dataloader.train)
    ddp = dict(settings.ddp)
    if not _device(cfg).startswith("cuda"):
        ddp["device_ids"] = None
    trainer = Trainer(
        create_ddp_model(model, **ddp),
        loader,
        optimizer,
        seed=settings.seed,
        amp_dtype=AMP_DTYPES[settings.amp.dtype] if settings.amp.enabled else None,
        clip_grad_norm=settings.clip_grad_norm,
    )
    checkpointer = Checkpointer(model, settings.output_dir, trainer=trainer)
    results: dict[str, Any] = {}

    def evaluate_and_keep() -> dict[str, Any]:
        results.update(evaluate(cfg, model))
        return results

    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(scheduler=schedule)])
    resuming = args.resume and checkpointer.has_checkpoint()
    checkpointer.strict = resuming
    checkpointer.resume_or_load(settings.init_checkpoint, resume=resuming)
    start_iter = trainer.iter + 1 if resuming else 0
    if start_iter >= settings.max_iter:
        logger.info(f"{settings.output_dir} has finished its {start_iter} iterations: evaluating")
        _finish(cfg, model, evaluate(cfg, model), {"iterations": start_iter}, trained=False)
        return
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, ResumableBatchSampler):
        sampler.start_batch = start_iter
    elif start_iter:
        logger.warning("dataloader.train is not revdet's: the order of the data starts over")
    evaluation = hooks.EvalHook(settings.eval_period, evaluate_and_keep)
    if comm.is_main_process():
        metrics = MetricsWriter(Path(settings.output_dir) / "metrics.json", start_iter)
        progress = CommonMetricPrinter(settings.max_iter)
        events = TensorboardXWriter(settings.output_dir, purge_step=start_iter)

        def log_before_saving(trainer: Trainer) -> None:
            if (trainer.iter + 1) % settings.log_period == 0:
                metrics.write()

        # In this order: what is saved has been logged, and what is evaluated has been saved.
        trainer.register_hooks(
            [
                hooks.CallbackHook(after_step=log_before_saving),
                hooks.PeriodicCheckpointer(checkpointer, **settings.checkpointer),
                evaluation,
                hooks.PeriodicWriter([progress, metrics, events], period=settings.log_period),
            ]
        )
    else:
        trainer.register_hooks([evaluation])
    began = time.perf_counter()
    trainer.train(start_iter, settings.max_iter)
    seconds = time.perf_counter() - began
    facts = {
        "iterations": settings.max_iter,
        "seconds": round(seconds, 1),  # since the last resume
        "memory": settings.memory,
        "stored_blocks": settings.stored_blocks,
    }
    if _device(cfg).startswith("cuda"):
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    _finish(cfg, model, results, facts, trained=True)


def evaluate(cfg: DictConfig, model: torch.nn.Module) -> dict[str, Any]:
    """COCO metrics on the recipe's test set, in COCO points; empty but on the main process."""
    loader = instantiate(cfg.dataloader.test)
    metrics = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    return metrics or {}


def _finish(
    cfg: DictConfig,
    model: torch.nn.Module,
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
    content = {**to_json(metrics), "run": facts}
    partial = output_dir / "results.json.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, results)

    name = cfg.dataloader.test.dataset.names
    name = name if isinstance(name, str) else name[0]
    records = DatasetCatalog.get(name)[: settings.pictures]
    mapper = instantiate(cfg.dataloader.test.mapper)
    files = draw_predictions(model, records, mapper, name, output_dir / "pictures")
    if (output_dir / "metrics.json").exists():
        draw_curves(output_dir / "metrics.json", output_dir / "curves.png")
    for task, scores in metrics.items():
        line = "  ".join(f"{key} {value:.2f}" for key, value in scores.items() if "-" not in key)
        logger.info(f"{task}: {line}")
    logger.info(f"{output_dir}: results.json, curves.png and {len(files)} pictures in pictures/")


if __name__ == "__main__":
    sys.exit(main())
