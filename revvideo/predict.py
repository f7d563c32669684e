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

import sys
from pathlib import Path

if not __package__:  # run by path: this folder came first, where `models`, `data`, … hide others'
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from backbones.common.console import config_parser, name_unreadable, try_device
from backbones.common.errors import UserError, error_line
from backbones.common.files import find_files, printable
from revvideo.config import load_config
from revvideo.data.layouts import has_video_extension
from revvideo.errors import VideoError
from revvideo.prediction.results import Predictions

if TYPE_CHECKING:
    from revvideo.prediction.predictor import Predictor

STRIP_FRAMES = 8


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = config_parser("revvideo/predict.py", __doc__, "configs/video")
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
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for what the user can fix."""
    args = parse_args(argv)
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        UserError: a wrong option, input, config or checkpoint, or not one input can be read.
    """
    _check_options(args)
    config = load_config(args.config, args.overrides)
    output = Path(args.output)
    paths = find_files(args.input, has_video_extension, "video", passed_over=output)
    name = args.device or config.train.device
    setting = f"--device {name}" if args.device else f"train.device={name}"
    device = try_device(name, setting, "try --device cpu")
    # Late, because it takes seconds to import: a mistake above shows at once.
    from revvideo.prediction.predictor import Predictor

    predictor = Predictor(config, args.weights, device=device, batch_size=args.batch_size)
    if args.classes:
        predictor.classes = _read_classes(args.classes, len(predictor.classes))
    predictions = Predictions(output, paths)
    began = time.perf_counter()
    # Starting a process takes longer than decoding a few videos.
    found = predictor.videos(paths, min(args.workers, len(paths) // 4))
    try:
        for path, scores, problem in tqdm(
            found, total=len(paths), desc="predicting", unit="video", disable=None
        ):
            if scores is None:
                predictions.unreadable[str(path)] = problem
                continue
            best = predictor.best(scores)
            entry: dict[str, Any] = {"path": str(path), "top": best}
            predictions.videos.append(entry)
            try:
                look_closer(predictor, path, entry, predictions, args)
            except VideoError as error:  # in frames that the scores did not need
                predictions.unreadable[str(path)] = error.reason
            words = (f"{top['class']} {100 * top['score']:.1f}%" for top in best)
            tqdm.write(f"{printable(path)}: {', '.join(words)}")
    finally:
        predictions.write_videos()  # also where it is stopped
    predictions.write(
        predictor.classes,
        config=args.config,
        weights=args.weights,
        device=str(device),
        clips=config.test.clips,
        crops=config.test.crops,
        seconds=round(time.perf_counter() - began, 1),
    )
    print(f"{len(predictions.videos)} of {len(paths)} videos -> {output}")
    name_unreadable(predictions.unreadable, output / "results.json")
    if not predictions.videos:
        raise UserError(f"not one of the {len(paths)} inputs can be read")


def look_closer(
    predictor: Predictor,
    path: Path,
    entry: dict[str, Any],
    predictions: Predictions,
    args: argparse.Namespace,
) -> None:
    """Add the facts of a video and its classes over time to its ``entry``, and draw them.

    Raises:
        VideoError: a frame does not decode. What was done before that is in ``entry``.
    """
    from revvideo.data.decode import Video
    from revvideo.prediction.media import frame_labels, write_labelled
    from revvideo.prediction.pictures import draw_curve, draw_strip, some_frames

    with Video(path) as video:
        entry |= asdict(video.info)
        windows = predictor.windows(video, args.step)
        if windows is not None:
            entry["windows"] = [
                {"start": round(start, 3), "end": round(end, 3), "top": predictor.best(scores)}
                for start, end, scores in zip(*windows, strict=True)
            ]
        if args.no_drawings:
            return
        drawings = entry["drawings"] = {}
        frames = some_frames(video, STRIP_FRAMES)
        best = [(top["class"], top["score"]) for top in entry["top"]]
        draw_strip(frames, best, strip := predictions.drawing("strips", path, ".png"))
        drawings["strip"] = str(strip)
        if windows is not None:
            curve = predictions.drawing("curves", path, ".png")
            draw_curve(windows, predictor.classes, frames, curve)
            drawings["curve"] = str(curve)
        labels = frame_labels(video.timestamps, entry)
        write_labelled(video, labels, copy := predictions.drawing("videos", path, ".mp4"))
        drawings["video"] = str(copy)


def _read_classes(file: str, count: int) -> list[str]:
    try:
        names = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {file} cannot be read ({error_line(error)})") from error
    if len(names) != count:
        raise UserError(f"--classes {file} has {len(names)} lines, the model {count} classes")
    return names


def _check_options(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: use a number from 1 on")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: use a number from 0 on")
    if args.step is not None and not args.step > 0:
        raise UserError(f"--step {args.step}: use a number of seconds above 0")
    if Path(args.output).is_file():
        raise UserError(f"--output {args.output} is a file: name a folder")


if __name__ == "__main__":
    sys.exit(main())
