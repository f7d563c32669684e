"""Detect objects in pictures and videos: drawn results, and COCO-format JSON.

    python revdet/predict.py --config output/run/config.yaml --weights output/run/model_final.pth \\
        --input photo.jpg holiday/ 'frames/*.png' clip.mp4 --output output/predictions

--input takes files, folders (searched in depth) and patterns, of pictures and videos alike.
--output gets:

    predictions.json   COCO results: image_id, category_id, bbox, score, segmentation (RLE); and
                       file_name, and for videos frame (from 0)
    results.json       each input with its image_id and its drawing, the categories, and what
                       could not be read and why
    pictures/          the pictures with what was found drawn on them
    videos/            the videos likewise, H.264

Names and ids of the classes come from the run's config.yaml, or from the recipe's dataset.
Everything in a recipe can be overridden by key=value after the options, as for train_net.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # else this folder's config, data and models would hide other people's

from backbones.common.console import config_parser, parse_inputs, run_stoppable
from revdet.install import RECIPES, detection_extra
from revdet.quiet import quiet


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can fix."""
    parser = config_parser("revdet/predict.py", __doc__, RECIPES)
    add, processes = parser.add_argument, min(4, os.cpu_count() or 1)
    add("--weights", required=True, metavar="FILE", help="a checkpoint of that run or recipe")
    add("--input", required=True, nargs="+", metavar="PATH", help="pictures, videos, folders, …")
    add("--output", required=True, type=Path, metavar="DIR", help="a folder, made if need be")
    add("--threshold", type=float, default=0.5, help="leave out lower scores, 0 to 1 (0.5)")
    add("--batch-size", type=int, default=1, help="pictures or frames of one size at a time (1)")
    add("--device", default="auto", metavar="NAME", help="cuda, cpu, … (auto)")
    add("--workers", type=int, default=processes, help="processes that read pictures (%(default)s)")
    add("--no-drawings", action="store_true", help="write the JSON files only")
    args = parse_inputs(parser, argv)
    quiet()

    def predict() -> None:
        with detection_extra():
            from revdet.prediction.run import run  # late: after quiet(); none of it for --help

            run(args)

    return run_stoppable(predict)


if __name__ == "__main__":
    sys.exit(main())
