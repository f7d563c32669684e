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

import revdet  # noqa: F401  first, because it quiets the deprecations of what follows

# isort: split
import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.data.catalog import Metadata
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones.common.console import config_parser
from backbones.common.errors import UserError, error_line
from revdet.config import load_config
from revdet.data.classes import categories_of
from revdet.prediction.media import (
    UnreadableError,
    VideoReader,
    VideoWriter,
    find_inputs,
    header_size,
    import_av,
    is_video,
)
from revdet.prediction.predictor import Detector, Frame, PictureFiles, Preparation, batches
from revdet.prediction.results import Predictions

NAMED = 20  # unreadable inputs that are printed; results.json has all


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = config_parser("revdet/predict.py", __doc__ or "", "configs/detection")
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="a checkpoint of that run or recipe")
    add("--input", required=True, nargs="+", metavar="PATH", help="pictures, videos, folders, …")
    add("--output", required=True, metavar="DIR", help="a folder, made if it is not there")
    add(
        "--threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="leave out what scores less, from 0 to 1 (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="pictures or frames of one size that go through the model together "
        "(default: %(default)s)",
    )
    add("--device", metavar="NAME", help="cuda, cpu, … (default: a GPU if there is one)")
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read pictures, 0 for none but this (default: %(default)s)",
    )
    add("--no-drawings", action="store_true", help="write the JSON files only")
    args = parser.parse_intermixed_args(argv)
    # argparse takes what follows --input PATH… for paths, up to the next option.
    overrides = [text for text in args.input if "=" in text and not Path(text).exists()]
    args.input = [text for text in args.input if text not in overrides]
    args.overrides += overrides
    return args


def main(argv: list[str] | None = None) -> int:
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
    device = _check_options(args)
    inputs = find_inputs(args.input)
    pictures = [path for path in inputs if not is_video(path)]
    videos = [path for path in inputs if is_video(path)]
    if videos:
        import_av()
    cfg = load_config(args.config, args.overrides)
    predictions = Predictions(Path(args.output), categories_of(cfg))
    detector = Detector(cfg, args.weights, device=device, threshold=args.threshold)
    prepare = Preparation(cfg.dataloader.test.mapper)

    began = time.perf_counter()
    ids = {path: number for number, path in enumerate(pictures)}
    pictures.sort(key=header_size)  # equal sizes go together, so that batches are full
    next_id = len(pictures)
    with tqdm(total=len(pictures), unit="frame", desc="detecting") as bar:
        files = PictureFiles(pictures, prepare)
        detect_pictures(detector, files, [ids[p] for p in pictures], predictions, args, bar)
        for path in videos:
            try:
                next_id += detect_video(detector, path, prepare, next_id, predictions, args, bar)
            except UnreadableError as error:
                predictions.unreadable[str(path)] = str(error)
    if not predictions.pictures and not predictions.videos:
        path, reason = next(iter(predictions.unreadable.items()))
        raise UserError(f"none of the {len(inputs)} inputs can be read; {path}: {reason}")
    predictions.write(
        config=args.config,
        weights=args.weights,
        device=device,
        threshold=args.threshold,
        batch_size=args.batch_size,
        seconds=round(time.perf_counter() - began, 1),
    )
    _report(predictions)


def _check_options(args: argparse.Namespace) -> str:
    """Check the options, and try the device, whose name is returned."""
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: use a score from 0 to 1")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: use a number from 1 on")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: use a number from 0 on")
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output} is no folder ({error_line(error)})") from error
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"--device {device} cannot be used ({error_line(error)}): try --device cpu"
        ) from error
    return device


def detect_pictures(
    detector: Detector,
    files: PictureFiles,
    ids: list[int],
    predictions: Predictions,
    args: argparse.Namespace,
    bar: tqdm[Any],
) -> None:
    """Go through picture files.

    Args:
        detector: the model.
        files: the files. Those of one size that follow each other go through the model together.
        ids: the image id of each.
        predictions: gets what is found, and what cannot be read.
        args: the command line.
        bar: is advanced by one for each file.
    """
    metadata = _metadata(predictions)

    def readable() -> Iterator[Frame]:
        # Without a batch size, worker processes hand over one item at a time.
        for path, item in zip(files.paths, _loader(files, args.workers), strict=True):
            if isinstance(item, Frame):
                yield item
            else:
                predictions.unreadable[str(path)] = item
                bar.update()

    for batch in batches(readable(), args.batch_size):
        for frame, instances in zip(batch, detector(batch), strict=True):
            path = files.paths[frame.index]
            facts = {
                "image_id": ids[frame.index],
                "file_name": str(path),
                "width": frame.model_input["width"],
                "height": frame.model_input["height"],
                "objects": len(instances),
            }
            predictions.add(facts["image_id"], instances, file_name=str(path))
            if not args.no_drawings:
                drawing = predictions.drawing("pictures", path, ".jpg")
                drawn = Visualizer(frame.pixels, metadata).draw_instance_predictions(instances)
                Image.fromarray(drawn.get_image()).save(drawing, quality=92)
                facts["drawing"] = str(drawing)
            predictions.pictures.append(facts)
            bar.update()


def detect_video(
    detector: Detector,
    path: Path,
    prepare: Preparation,
    first_id: int,
    predictions: Predictions,
    args: argparse.Namespace,
    bar: tqdm[Any],
) -> int:
    """Go through the frames of a video; what comes before damage is kept.

    Args:
        detector: the model.
        path: the video.
        prepare: what comes before the model.
        first_id: image id of the first frame; the others follow.
        predictions: gets what is found, and why the video cannot be read, or not to its end.
        args: the command line.
        bar: is advanced by one for each frame.

    Returns:
        The number of frames.
    """
    painter = VideoVisualizer(_metadata(predictions))
    facts: dict[str, Any] = {"file_name": str(path), "first_image_id": first_id, "objects": 0}
    number = 0
    with VideoReader(path) as video, contextlib.ExitStack() as stack:
        bar.total += video.num_frames
        writer = None
        frames = (prepare(when, pixels) for pixels, when in video)
        for batch in batches(frames, args.batch_size):
            for frame, instances in zip(batch, detector(batch), strict=True):
                predictions.add(first_id + number, instances, file_name=str(path), frame=number)
                if not args.no_drawings:
                    drawn = painter.draw_instance_predictions(frame.pixels, instances).get_image()
                    if writer is None:
                        drawing = predictions.drawing("videos", path, ".mp4")
                        size = drawn.shape[1], drawn.shape[0]
                        writer = stack.enter_context(VideoWriter(drawing, video.time_base, size))
                        facts["drawing"] = str(drawing)
                    writer.write(drawn, frame.index)
                facts["objects"] += len(instances)
                number += 1
                bar.update()
    if video.error:
        predictions.unreadable[str(path)] = f"{video.error}, after {number} frames"
    if number:
        predictions.videos.append({**facts, "frames": number})
    elif not video.error:
        predictions.unreadable[str(path)] = "holds no frame"
    return number


def _metadata(predictions: Predictions) -> Metadata:
    return Metadata(thing_classes=[category["name"] for category in predictions.categories])


def _loader(files: PictureFiles, workers: int) -> DataLoader[Frame | str]:
    return DataLoader(files, batch_size=None, num_workers=min(workers, len(files) // 4))


def _report(predictions: Predictions) -> None:
    """Say what was done, and name what could not be read."""
    unreadable = predictions.unreadable
    frames = sum(video["frames"] for video in predictions.videos)
    print(
        f"{len(predictions.pictures)} pictures, {len(predictions.videos)} videos of {frames} "
        f"frames: {len(predictions.objects)} objects -> {predictions.folder}"
    )
    if unreadable:
        print(f"{len(unreadable)} unreadable:", file=sys.stderr)
        for path, reason in list(unreadable.items())[:NAMED]:
            print(f"  {path}: {reason}", file=sys.stderr)
        if len(unreadable) > NAMED:
            print(f"  and {len(unreadable) - NAMED} more, see results.json", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
