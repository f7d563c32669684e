"""Train and test a video classifier from a recipe.

    python revvideo/run.py --config configs/video/demo/motion.yaml
    revvideo --config demo/motion                       the same, where it is installed
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

import os
import sys
from collections.abc import Sequence

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # else this folder's config, data and models would hide other people's

from backbones.common.console import config_parser, run_stoppable
from backbones.common.errors import extra
from revvideo.settings import RECIPES, describe_schema


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can fix."""
    parser = config_parser("revvideo/run.py", f"{__doc__}{describe_schema()}", RECIPES)
    add = parser.add_argument
    add("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    add("--eval-only", action="store_true", help="test model.weights=…, or the last checkpoint")
    args = parser.parse_intermixed_args(argv)
    ranks = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # of torchrun, Lightning and SLURM
    first = int(next((os.environ[name] for name in ranks if name in os.environ), 0)) == 0

    def train() -> None:
        with extra("video"):
            from revvideo.config import load_config  # late: --help needs none of it

            config = load_config(args.config, args.overrides)
            # Later still, because Lightning takes seconds to import: a misspelt key shows at once.
            from revvideo.training.run import run

            given = any(override.startswith("model.weights=") for override in args.overrides)
            weights = config.model.weights if given else ""
            run(config, resume=args.resume, eval_only=args.eval_only, weights=weights)

    return run_stoppable(train, speaks=first)


if __name__ == "__main__":
    sys.exit(main())
