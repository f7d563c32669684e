"""Pictures and videos through a detector: what is found, drawn and written."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones.common.console import name_unreadable, try_device
from backbones.common.errors import UserError, first_line
from backbones.common.files import find_files, make_folder, replacing
from backbones.common.images import header_size
from backbones.common.stopping import Stopped
from backbones.common.videos import h264_writer
from revdet.config import load_config
from revdet.prediction import media
from revdet.prediction.media import SUFFIXES, VIDEO_SUFFIXES, UnreadableError
from revdet.prediction.predictor import Detector, Frame, batches
from revdet.prediction.results import Predictions

LARGEST = 4096  # px: larger pictures are drawn smaller
matplotlib.rcParams["text.parse_math"] = False  # the names of classes and pictures are no formulas


def run(args: argparse.Namespace) -> None:
    """Do what the command line of ``predict.py`` says; a UserError if no input can be read."""
    _check_options(args)
    device = str(try_device(args.device, f"--device {args.device}", "try --device cpu"))
    videos_are = " ".join(sorted(VIDEO_SUFFIXES))
    what = f"picture or video (.jpg, .png and what else Pillow reads; {videos_are})"
    inputs = find_files(
        args.input, lambda path: path.suffix.lower() in SUFFIXES, what, passed_over=args.output
    )
    videos = [path for path in inputs if path.suffix.lower() in VIDEO_SUFFIXES]
    pictures = [path for path in inputs if path.suffix.lower() not in VIDEO_SUFFIXES]
    if videos:
        media.import_av()
    cfg = load_config(args.config, args.overrides)
    detector = Detector(cfg, args.weights, device=device, threshold=args.threshold)
    facts = {"config": args.config, "weights": args.weights, "device": device}
    facts |= {"threshold": args.threshold, "batch_size": args.batch_size}
    predictions = Predictions(args.output, detector.categories, facts)
    try:
        with tqdm(total=len(pictures), unit="frame", desc="detecting") as bar:
            inference = Inference(detector, predictions, args, bar)
            inference.pictures(pictures)
            next_id = len(pictures)
            for path in videos:
                try:
                    next_id += inference.video(path, next_id)
                except (UnreadableError, EOFError) as error:
                    predictions.unreadable[str(path)] = first_line(error)
    except Stopped as stopped:
        predictions.write(stopped=True)
        done = f"{len(predictions.pictures)} pictures and {len(predictions.videos)} videos"
        stopped.message = f"{done} of {len(inputs)} inputs are in {predictions.folder}"
        raise
    if not predictions.pictures and not predictions.videos:
        name, reason = next(iter(predictions.unreadable.items()))
        raise UserError(f"none of the {len(inputs)} inputs can be read; {name}: {reason}")
    predictions.write()
    frames = sum(video["frames"] for video in predictions.videos)
    videos_of = f"{len(predictions.videos)} videos of {frames} frames"
    found = f"{len(predictions.objects)} objects -> {predictions.folder}"
    print(f"{len(predictions.pictures)} pictures, {videos_of}: {found}")
    name_unreadable(predictions.unreadable, predictions.folder / "results.json")


def _check_options(args: argparse.Namespace) -> None:
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: use a score from 0 to 1")
    for option, value, least in (("batch-size", args.batch_size, 1), ("workers", args.workers, 0)):
        if value < least:
            raise UserError(f"--{option} {value}: use a number from {least} on")
    make_folder(args.output, "--output")


@dataclass
class Inference:
    """A detector at work: ``predictions`` gets what is found, and what cannot be read."""

    detector: Detector
    predictions: Predictions
    args: argparse.Namespace
    bar: tqdm[Any]

    def pictures(self, paths: Sequence[Path]) -> None:
        """Go through picture files, those of one size together. Image ids are their numbers."""
        for frame, instances in self._detect(self._readable(paths)):
            path = paths[frame.index]
            where = {"image_id": frame.index, "file_name": str(path)}
            size = {side: frame.model_input[side] for side in ("width", "height")}
            facts = {**where, **size, "objects": len(instances)}
            self.predictions.add(frame.index, instances, file_name=str(path))
            if not self.args.no_drawings:
                drawing = self.predictions.drawing("pictures", path, ".jpg")
                scale = min(1.0, LARGEST / max(frame.pixels.shape))
                painter = Visualizer(frame.pixels, self.detector.metadata, scale)
                drawn = painter.draw_instance_predictions(instances).get_image()
                Image.fromarray(drawn).save(drawing, quality=92)
                facts["drawing"] = str(drawing)
            self.predictions.pictures.append(facts)

    def _readable(self, paths: Sequence[Path]) -> Iterator[Frame]:
        files: Any = sorted(enumerate(paths), key=lambda numbered: header_size(numbered[1]))
        read: Any = self.detector.prepare.read
        workers = min(self.args.workers, len(files) // 4)
        # Without a batch size, worker processes read and hand over one file at a time.
        loader = DataLoader(files, batch_size=None, num_workers=workers, collate_fn=read)
        for (_, path), item in zip(files, loader, strict=True):
            if isinstance(item, Frame):
                yield item
            else:
                self.predictions.unreadable[str(path)] = item
                self.bar.update()

    def video(self, path: Path, first_id: int) -> int:
        """Go through the frames of a video, those before damage; an UnreadableError if it is none.

        Their image ids count from ``first_id`` on; how many they are is returned.
        """
        painter = VideoVisualizer(self.detector.metadata)
        facts: dict[str, Any] = {"file_name": str(path), "first_image_id": first_id, "objects": 0}
        number, write = 0, None
        with media.VideoReader(path) as video, contextlib.ExitStack() as stack:
            self.bar.total += video.num_frames
            frames = (self.detector.prepare(when, pixels) for pixels, when in video)
            for frame, found in self._detect(frames):
                where = {"file_name": str(path), "frame": number}
                self.predictions.add(first_id + number, found, **where)
                if not self.args.no_drawings:
                    drawn = painter.draw_instance_predictions(frame.pixels, found).get_image()
                    if write is None:
                        drawing = self.predictions.drawing("videos", path, ".mp4")
                        partial = stack.enter_context(replacing(drawing))
                        writer = h264_writer(partial, video.time_base, {"crf": "20"})
                        write = stack.enter_context(writer)
                        facts["drawing"] = str(drawing)
                    write(drawn, frame.index)
                facts["objects"] += len(found)
                number += 1
        if video.error:
            self.predictions.unreadable[str(path)] = f"{video.error}, after {number} frames"
        if number:
            self.predictions.videos.append({**facts, "frames": number})
        elif not video.error:
            self.predictions.unreadable[str(path)] = "holds no frame"
        return number

    def _detect(self, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Instances]]:
        for batch in batches(frames, self.args.batch_size):
            for frame, instances in zip(batch, self.detector.detect(batch), strict=True):
                yield frame, instances
                self.bar.update()
