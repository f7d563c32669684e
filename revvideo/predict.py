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
test.crops); over time, each window is one clip. Everything in the config can be overridden by
key=value after the options, as for run.py.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from backbones.common.errors import UserError
from revvideo.config import load_config
from revvideo.data.layouts import has_video_extension
from revvideo.errors import VideoError

if TYPE_CHECKING:
    from revvideo.prediction.predictor import Predictor

NAMED = 20  # unreadable inputs that are printed; results.json has all
STRIP_FRAMES = 8


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="revvideo/predict.py",
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
        help="the config.yaml of a run, or a recipe",
    )
    add("--weights", required=True, metavar="FILE", help="a checkpoint of that run or recipe")
    add("--input", required=True, nargs="+", metavar="PATH", help="videos, folders, patterns")
    add("--output", required=True, metavar="DIR", help="a folder, made if it is not there")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="clips that go through the model together (default: %(default)s)",
    )
    add(
        "--step",
        type=float,
        metavar="SECONDS",
        help="over time: from one window to the next, at most (default: half a clip; in videos of "
        "more than 240 such windows, more)",
    )
    add(
        "--classes",
        metavar="FILE",
        help="names of the classes, one a line in the order of their numbers, for weights that do "
        "not hold them, such as released ones",
    )
    add(
        "--device",
        metavar="NAME",
        help="cuda, cpu, … (default: train.device of the config; auto: a GPU if there is one)",
    )
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that decode, 0 for none but this (default: %(default)s)",
    )
    add("--no-drawings", action="store_true", help="write the JSON files only")
    add("overrides", nargs="*", metavar="key=value", help="override the config")
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
    config = load_config(args.config, args.overrides)
    output = Path(args.output)
    _check_options(args)
    paths = find_inputs(args.input, output)
    # Late, because torch takes seconds to import: a mistake above shows at once.
    from revvideo.prediction.predictor import Predictor, choose_device

    device = choose_device(args.device or config.train.device)
    predictor = Predictor(config, args.weights, device=device, batch_size=args.batch_size)
    if args.classes:
        predictor.classes = read_classes(args.classes, len(predictor.classes))
    names = drawing_names(paths)
    output.mkdir(parents=True, exist_ok=True)
    predictions: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    began = time.perf_counter()
    # Starting a process takes longer than decoding a few videos.
    found = predictor.videos(paths, min(args.workers, len(paths) // 4))
    try:
        for path, scores, problem in tqdm(
            found, total=len(paths), desc="predicting", unit="video", disable=None
        ):
            if scores is None:
                unreadable[str(path)] = problem
                continue
            best = predictor.best(scores)
            prediction: dict[str, Any] = {"path": str(path), "top": best}
            predictions.append(prediction)
            try:
                _look_closer(predictor, path, names[path], prediction, args)
            except VideoError as error:  # in frames that the scores did not need
                unreadable[str(path)] = error.reason
            tqdm.write(f"{_printable(path)}: {_in_words(best)}")
    finally:  # also where it is stopped
        _write_json(output / "predictions.json", predictions)
    facts = {
        "config": args.config,
        "weights": args.weights,
        "device": device,
        "clips": config.test.clips,
        "crops": config.test.crops,
        "seconds": round(time.perf_counter() - began, 1),
    }
    results = {
        "inputs": len(paths),
        "videos": len(predictions),
        "unreadable": unreadable,
        "classes": predictor.classes,
        "run": facts,
    }
    _write_json(output / "results.json", results)
    print(f"{len(predictions)} of {len(paths)} videos -> {output}")
    _name_unreadable(unreadable)
    if not predictions:
        raise UserError(f"not one of the {len(paths)} inputs can be read")


def _look_closer(
    predictor: Predictor,
    path: Path,
    name: str,
    prediction: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Add the facts of a video and its classes over time to ``prediction``, and draw them.

    Raises:
        VideoError: a frame does not decode. What was done before that is in ``prediction``.
    """
    from revvideo.data.decode import Video
    from revvideo.prediction.media import write_labelled
    from revvideo.prediction.pictures import draw_curve, draw_strip, some_frames

    with Video(path) as video:
        prediction |= asdict(video.info)
        windows = predictor.windows(video, args.step)
        if windows is not None:
            prediction["windows"] = [
                {"start": round(start, 3), "end": round(end, 3), "top": predictor.best(scores)}
                for start, end, scores in zip(
                    windows.starts, windows.ends, windows.scores, strict=True
                )
            ]
        if args.no_drawings:
            return
        drawings = prediction["drawings"] = {}

        def drawing(kind: str, suffix: str) -> Path:
            file = Path(args.output, kind, name + suffix)
            file.parent.mkdir(parents=True, exist_ok=True)
            return file

        frames = some_frames(video, STRIP_FRAMES)
        best = [(top["class"], top["score"]) for top in prediction["top"]]
        draw_strip(frames, best, strip := drawing("strips", ".png"))
        drawings["strip"] = str(strip)
        if windows is not None:
            scores, classes = windows.scores.numpy(), predictor.classes
            draw_curve(windows.middles, scores, classes, frames, curve := drawing("curves", ".png"))
            drawings["curve"] = str(curve)
        labels = frame_labels(video.timestamps, prediction)
        write_labelled(path, video, labels, copy := drawing("videos", ".mp4"))
        drawings["video"] = str(copy)


def frame_labels(times: Sequence[float], prediction: dict[str, Any]) -> list[str]:
    """What to write on each frame: the best class of the nearest window, or else of the video.

    Args:
        times: of the frames, in seconds, ascending.
        prediction: an entry of ``predictions.json``.
    """
    windows = prediction.get("windows") or [{"start": 0, "end": 0, "top": prediction["top"]}]
    middles = [(window["start"] + window["end"]) / 2 for window in windows]
    borders = [(a + b) / 2 for a, b in pairwise(middles)]
    best = [windows[bisect_right(borders, time)]["top"][0] for time in times]
    return [f"{top['class']}  {100 * top['score']:.0f}%" for top in best]


def read_classes(file: str, count: int) -> list[str]:
    """The lines of a text file.

    Raises:
        UserError: it cannot be read, or has not ``count`` lines.
    """
    try:
        names = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {file} cannot be read ({error})") from error
    if len(names) != count:
        raise UserError(f"--classes {file} has {len(names)} lines, the model {count} classes")
    return names


def find_inputs(arguments: Sequence[str], output: Path) -> list[Path]:
    """The videos that are meant, in the order of the arguments, each once.

    Args:
        arguments: files of any name; folders, searched in depth for the extensions of videos; and
            patterns (``*``, ``?``, ``[…]``, ``**``) of such.
        output: what lies in this folder is passed over: copies of an earlier run.

    Raises:
        UserError: an argument that names nothing.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        exists = Path(argument).exists()
        matches = [argument] if exists else sorted(glob.glob(argument, recursive=True))
        if not matches:
            raise UserError(f"--input {argument}: no such file or folder, and nothing matches it")
        files = [file for match in matches for file in _videos_at(Path(match))]
        files = [file for file in files if output.resolve() not in file.resolve().parents]
        if not files:
            raise UserError(f"--input {argument}: holds no video, or only those in --output")
        found.update(dict.fromkeys(files))
    return list(found)


def _videos_at(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [
        file for file in sorted(path.rglob("*")) if file.is_file() and has_video_extension(file)
    ]


def drawing_names(paths: Sequence[Path]) -> dict[Path, str]:
    """For each path one of its own: without suffix, relative to the folder that all are in."""
    absolute = {path: path.absolute() for path in paths}
    common = os.path.commonpath([path.parent for path in absolute.values()])
    names = {path: str(full.relative_to(common)) for path, full in absolute.items()}
    stems = {path: str(Path(name).with_suffix("")) for path, name in names.items()}
    taken = Counter(stems.values())
    return {path: names[path] if taken[stem] > 1 else stem for path, stem in stems.items()}


def _check_options(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: use a number from 1 on")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: use a number from 0 on")
    if args.step is not None and not args.step > 0:
        raise UserError(f"--step {args.step}: use a number of seconds above 0")
    if "://" not in args.weights and not Path(args.weights).expanduser().is_file():
        raise UserError(f"--weights {args.weights}: there is no such file")
    if Path(args.output).is_file():
        raise UserError(f"--output {args.output} is a file: name a folder")


def _printable(path: str | Path) -> str:
    """Names of files may hold bytes that are no characters."""
    return os.fsencode(path).decode(errors="replace")


def _in_words(best: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{top['class']} {100 * top['score']:.1f}%" for top in best)


def _write_json(path: Path, content: Any) -> None:
    from backbones.weights.checkpoint import replacing  # brings torch

    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def _name_unreadable(unreadable: dict[str, str]) -> None:
    if unreadable:
        print(f"{len(unreadable)} unreadable:", file=sys.stderr)
        for path, reason in list(unreadable.items())[:NAMED]:
            print(f"  {_printable(path)}: {reason}", file=sys.stderr)
        if len(unreadable) > NAMED:
            print(f"  and {len(unreadable) - NAMED} more, see results.json", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
