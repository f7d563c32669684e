"""Classify videos: the five best classes of each, as JSON, pictures and labelled copies.

    python revvideo/predict.py --config output/motion/config.yaml \\
        --weights output/motion/checkpoints/last.ckpt \\
        --input clip.mp4 holiday/ 'films/*.mkv' --output output/predictions

--input takes files, folders (searched in depth) and patterns. --output gets:

    predictions.json   the classes and scores of each video, over time if it is long
    results.json       how many videos, which could not be read and why, and the facts of the run
    strips/            frames of each video with its best classes
    videos/            copies with the label drawn on every frame, H.264
    curves/            for videos of three clips or more: their scores over time

A video gets the mean score of the clips and crops that the config tests with (test.clips,
test.crops); over time, each window is one clip, and begins half a clip (or, in long videos, more)
after the one before. Weights that hold no names of classes, such as released ones, are given them
by --classes, in the order of their numbers. Everything in the config can be overridden by
key=value after the options, as for run.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # else this folder's config, data and models would hide other people's

from backbones.common.console import config_parser, parse_inputs, run_stoppable
from backbones.common.errors import extra
from revvideo.settings import RECIPES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can fix."""
    parser = config_parser("revvideo/predict.py", __doc__, RECIPES)
    add, processes = parser.add_argument, min(4, os.cpu_count() or 1)
    add("--weights", required=True, metavar="FILE", help="a checkpoint of that run or recipe")
    add("--input", required=True, nargs="+", metavar="PATH", help="videos, folders, patterns")
    add("--output", required=True, metavar="DIR", help="a folder, made if it is not there")
    add("--batch-size", type=int, default=16, metavar="N", help="clips at a time (16)")
    add("--step", type=float, metavar="SECONDS", help="over time: from one window to the next")
    add("--classes", metavar="FILE", help="names, one a line, where the weights hold none")
    add("--device", metavar="NAME", help="cuda, cpu, … (train.device of the config)")
    add("--workers", type=int, default=processes, metavar="N", help="that decode (%(default)s)")
    add("--no-drawings", action="store_true", help="write the JSON files only")
    args = parse_inputs(parser, argv)

    def predict() -> None:
        with extra("video"):
            from revvideo.prediction.run import run  # late: --help needs none of it

            run(args)

    return run_stoppable(predict)


if __name__ == "__main__":
    sys.exit(main())
