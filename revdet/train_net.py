"""Train and evaluate a detector from a recipe.

    python revdet/train_net.py --config configs/detection/demo/mask_rcnn_rev_vit_demo.py
    revdet-train --config demo/mask_rcnn_rev_vit_demo       the same, where it is installed
    python revdet/train_net.py --config … --num-gpus 8 train.output_dir=output/mine
    python revdet/train_net.py --config … --resume          continue an interrupted run, exactly
    python revdet/train_net.py --config … --eval-only       evaluate the run in train.output_dir

Everything in a recipe can be overridden by key=value, for example:

    dataset.train_json=FILE dataset.train_images=FOLDER
    dataset.val_json=FILE dataset.val_images=FOLDER
                                               your own data in COCO format, with its classes
    train.init_checkpoint=REV_VIT_B.pyth       start from a trunk's weights, or from a detector's
    train.memory_budget=8GB                    choose what the trunk keeps so that a step fits 8 GB
    dataloader.train.total_batch_size=16       images per iteration, over all processes; the
                                               learning rate follows (linear scaling rule)
    train.max_iter=1000 optimizer.lr=1e-4      any other key, such as those below

On several machines, either of these on each:

    python revdet/train_net.py --config … --num-gpus 8 --num-machines 2 --machine-rank 0 \\
        --dist-url tcp://HOST:PORT
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
        revdet/train_net.py --config …

Results go to train.output_dir: results.json, metrics.json, TensorBoard events, log.txt,
curves.png, pictures/ and checkpoints, the best one among them (model_best.pth). Ctrl-C and SIGTERM
end a run when its iteration is finished and saved; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # else this folder's config, data and models would hide other people's

import torch.distributed as dist

from backbones.common.console import config_parser
from backbones.common.errors import MissingExtra, UserError
from backbones.common.settings import describe
from backbones.common.stopping import Stopped, stoppable
from revdet.install import RECIPES, detection_extra
from revdet.quiet import quiet
from revdet.settings import SECTIONS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, in the words that Detectron2 users know."""
    keys = "\n".join(describe(section, name) for name, section in SECTIONS.items())
    doc = f"{__doc__}\nKeys of the run and of its data:\n\n{keys}"
    parser = config_parser("revdet/train_net.py", doc, RECIPES)
    add = parser.add_argument
    add("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    add("--eval-only", action="store_true", help="evaluate train.init_checkpoint=… or the last one")
    add("--num-gpus", type=int, default=1, help="processes here, one per GPU; else on the CPU (1)")
    add("--num-machines", type=int, default=1, metavar="N", help="machines in the job")
    add("--machine-rank", type=int, default=0, metavar="K", help="this machine, from 0")
    add("--dist-url", default="auto", metavar="tcp://HOST:PORT", help="where they meet (auto)")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can fix."""
    args = parse_args(argv)
    quiet()
    try:
        with stoppable(), detection_extra(), ExitStack() as held:
            # Late: after quiet(), and --help needs none of it.
            from revdet.config import load_config
            from revdet.training.hardware import is_first_on_machine, launch
            from revdet.training.preflight import preflight

            cfg = load_config(args.config, args.overrides)
            launch(_process, cfg, preflight(cfg, args, held), args)
    except Stopped as stopped:
        if is_first_on_machine():
            print(stopped, file=sys.stderr)
        return stopped.status
    except UserError as error:
        missing = isinstance(error, MissingExtra)
        if not missing and not is_first_on_machine() and not dist.is_initialized():
            # Before torchrun's processes join, all of them find out the same, and the first one
            # says it. torchrun ends all when one ends, so the others wait for it to do so.
            time.sleep(60)
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = error.filename or cfg.train.output_dir
        remedy = "make room, or the folder writable, and continue with --resume"
        print(f"error: cannot write {where} ({error.strerror}): {remedy}", file=sys.stderr)
        return 2
    return 0


def _process(cfg: Any, device: str, args: argparse.Namespace) -> None:
    """What each process does, in one that this command has started or in its own."""
    quiet()
    from revdet.training.run import run

    if multiprocessing.parent_process() is None:
        run(cfg, device, args)
        return
    try:
        with stoppable():
            run(cfg, device, args)
    except Stopped as stopped:
        sys.exit(stopped.status)  # the process that has started this one says it


if __name__ == "__main__":
    sys.exit(main())
