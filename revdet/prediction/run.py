"""Pictures and videos through a detector: what is found, drawn and written."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.data.catalog import Metadata
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones.common.console import name_unreadable, try_device
from backbones.common.errors import UserError, error_line
from backbones.common.files import find_files
from revdet.config import load_config
from revdet.data.classes import categories_of
from revdet.prediction.media import (
    SUFFIXES,
    UnreadableError,
    VideoReader,
    header_size,
    import_av,
    is_video,
    video_writer,
)
from revdet.prediction.predictor import Detector, Frame, PictureFiles, batches
from revdet.prediction.results import Predictions


def run(args: argparse.Namespace) -> None:
    """Do what the command line of ``predict.py`` says.

    Raises:
        UserError: a wrong option, input, config or checkpoint, or not one input can be read.
    """
    _check_options(args)
    device = try_device(args.device, f"--device {args.device}", "try --device cpu")
    what = f"picture or video ({' '.join(sorted(SUFFIXES))})"
    inputs = find_files(
        args.input, lambda path: path.suffix.lower() in SUFFIXES, what, passed_over=args.output
    )
    videos = [path for path in inputs if is_video(path)]
    if videos:
        import_av()
    cfg = load_config(args.config, args.overrides)
    predictions = Predictions(args.output, categories_of(cfg))
    detector = Detector(cfg, args.weights, device=str(device), threshold=args.threshold)

    began = time.perf_counter()
    pictures = [path for path in inputs if not is_video(path)]
    next_id = len(pictures)
    with tqdm(total=len(pictures), unit="frame", desc="detecting") as bar:
        detect_pictures(detector, pictures, predictions, args, bar)
        for path in videos:
            try:
                next_id += detect_video(detector, path, next_id, predictions, args, bar)
            except UnreadableError as error:
                predictions.unreadable[str(path)] = str(error)
    if not predictions.pictures and not predictions.videos:
        name, reason = next(iter(predictions.unreadable.items()))
        raise UserError(f"none of the {len(inputs)} inputs can be read; {name}: {reason}")
    predictions.write(
        config=args.config,
        weights=args.weights,
        device=str(device),
        threshold=args.threshold,
        batch_size=args.batch_size,
        seconds=round(time.perf_counter() - began, 1),
    )
    frames = sum(video["frames"] for video in predictions.videos)
    print(
        f"{len(predictions.pictures)} pictures, {len(predictions.videos)} videos of {frames} "
        f"frames: {len(predictions.objects)} objects -> {predictions.folder}"
    )
    name_unreadable(predictions.unreadable, predictions.folder / "results.json")


def _check_options(args: argparse.Namespace) -> None:
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: use a score from 0 to 1")
    for option, value, least in (("batch-size", args.batch_size, 1), ("workers", args.workers, 0)):
        if value < least:
            raise UserError(f"--{option} {value}: use a number from {least} on")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output} is no folder ({error_line(error)})") from error


def detect_pictures(
    detector: Detector,
    paths: Sequence[Path],
    predictions: Predictions,
    args: argparse.Namespace,
    bar: tqdm[Any],
) -> None:
    """Go through picture files, whose numbers are their image ids.

    Args:
        detector: the model.
        paths: the files. Those of one size go through the model together.
        predictions: gets what is found, and what cannot be read.
        args: the command line.
        bar: is advanced by one for each file.
    """
    ids = {path: number for number, path in enumerate(paths)}
    files = PictureFiles(sorted(paths, key=header_size), detector.prepare)
    metadata = _metadata(predictions)
    # Without a batch size, worker processes hand over one item at a time.
    workers = min(args.workers, len(files) // 4)
    loader: DataLoader[Frame | str] = DataLoader(files, batch_size=None, num_workers=workers)

    def readable() -> Iterator[Frame]:
        for path, item in zip(files.paths, loader, strict=True):
            if isinstance(item, Frame):
                yield item
            else:
                predictions.unreadable[str(path)] = item
                bar.update()

    for batch in batches(readable(), args.batch_size):
        for frame, instances in zip(batch, detector(batch), strict=True):
            path = files.paths[frame.index]
            facts: dict[str, Any] = {
                "image_id": ids[path],
                "file_name": str(path),
                "width": frame.model_input["width"],
                "height": frame.model_input["height"],
                "objects": len(instances),
            }
            predictions.add(ids[path], instances, file_name=str(path))
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
    first_id: int,
    predictions: Predictions,
    args: argparse.Namespace,
    bar: tqdm[Any],
) -> int:
    """Go through the frames of a video; what comes before damage is kept.

    Args:
        detector: the model.
        path: the video.
        first_id: image id of the first frame; the others follow.
        predictions: gets what is found, and why the video cannot be read, or not to its end.
        args: the command line.
        bar: is advanced by one for each frame.

    Returns:
        The number of frames.

    Raises:
        UnreadableError: the file is no video.
    """
    painter = VideoVisualizer(_metadata(predictions))
    facts: dict[str, Any] = {"file_name": str(path), "first_image_id": first_id, "objects": 0}
    number = 0
    with VideoReader(path) as video, contextlib.ExitStack() as stack:
        bar.total += video.num_frames
        write = None
        frames = (detector.prepare(when, pixels) for pixels, when in video)
        for batch in batches(frames, args.batch_size):
            for frame, instances in zip(batch, detector(batch), strict=True):
                predictions.add(first_id + number, instances, file_name=str(path), frame=number)
                if not args.no_drawings:
                    drawn = painter.draw_instance_predictions(frame.pixels, instances).get_image()
                    if write is None:
                        drawing = predictions.drawing("videos", path, ".mp4")
                        size = drawn.shape[1], drawn.shape[0]
                        write = stack.enter_context(video_writer(drawing, video.time_base, size))
                        facts["drawing"] = str(drawing)
                    write(drawn, frame.index)
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
