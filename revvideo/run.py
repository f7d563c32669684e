"""Train and test a video classifier from a recipe.

    python revvideo/run.py --config configs/video/demo/motion.yaml
    python revvideo/run.py --config configs/video/kinetics400/rev_mvit_b_16x4.yaml data.root=DIR
    python revvideo/run.py --config … --resume          continue an interrupted run, exactly
    python revvideo/run.py --config … --eval-only       test the run in train.output_dir
    python revvideo/run.py --config … --eval-only model.weights=REV_MVIT_B_16x4.pyth
    torchrun --nproc-per-node 8 --nnodes 4 … revvideo/run.py --config … train.nodes=4

On one machine nothing else is needed: it takes all GPUs (train.devices). Under torchrun and SLURM
it takes the place it is given. `python -m revvideo.scan DATA` opens every video beforehand.

Results go to train.output_dir: results.json, predictions.csv, curves.png, metrics.csv, log.txt,
config.yaml, TensorBoard events and checkpoints.

A recipe is a YAML file of the keys below; `base: FILE` in it names another one to start from. Each
key can be given as key=value, lists as augment.scale=[0.5,1], a key within arguments as
model.arguments.depth=8.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from backbones.common.errors import UserError
from revvideo.config import describe_schema, load_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="revvideo/run.py",
        description=summary,
        epilog=f"{examples}{describe_schema()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--config",
        "--config-file",
        dest="config",
        required=True,
        metavar="FILE",
        help="the recipe: a file under configs/video, or the config.yaml of an earlier run",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in train.output_dir; start anew if there is none",
    )
    add(
        "--eval-only",
        action="store_true",
        help="only test: model.weights if given here, else the last checkpoint",
    )
    add("overrides", nargs="*", metavar="key=value", help="override the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can fix."""
    args = parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        # Late, because torch and Lightning take seconds to import: a misspelt key shows at once.
        from revvideo.training.run import run

        weights = [o for o in args.overrides if o.startswith("model.weights=")]
        run(
            config,
            resume=args.resume,
            eval_only=args.eval_only,
            weights=config.model.weights if weights else "",
        )
    except UserError as error:
        if _rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _rank() -> int:
    """Of this process, by the variables of torchrun, Lightning and SLURM."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


if __name__ == "__main__":
    sys.exit(main())
