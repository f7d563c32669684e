"""Videos through a classifier: what is predicted, drawn and written."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backbones.common.console import name_unreadable, try_device
from backbones.common.errors import UserError
from backbones.common.files import find_files, printable, read_class_names, write_json
from revvideo.config import load_config
from revvideo.data.decode import Video
from revvideo.data.layouts import has_video_extension
from revvideo.data.stills import IMAGES
from revvideo.errors import VideoError
from revvideo.prediction.media import frame_labels, write_labelled
from revvideo.prediction.pictures import draw_curve, draw_strip, some_frames
from revvideo.prediction.predictor import Predictor
from revvideo.prediction.results import drawing, drawing_names

STRIP_FRAMES = 8
Entry = dict[str, Any]  # what predictions.json says about a video


def run(args: Namespace) -> None:
    """Do what the command line of ``predict.py`` says; a UserError if it cannot be done."""
    _check_options(args)
    config = load_config(args.config, args.overrides)
    if config.data.layout == IMAGES:
        command = "python -m backbones predict IMAGES"
        of = f"--model {config.model.name} --weights {args.weights}"
        raise UserError(f"{args.config} is of images: {command} {of}")
    output = Path(args.output)
    paths = find_files(args.input, has_video_extension, "video", passed_over=output)
    name = args.device or config.train.device
    setting = f"--device {name}" if args.device else f"train.device={name}"
    device = try_device(name, setting, "try --device cpu")
    predictor = Predictor(config, args.weights, device=device, batch_size=args.batch_size)
    if args.classes:
        predictor.classes = read_class_names(args.classes, len(predictor.classes))
    names, began = drawing_names(paths), time.perf_counter()
    videos: list[Entry] = []
    unreadable: dict[str, str] = {}  # why; also of a video that breaks off
    # Starting a process takes longer than decoding a few videos.
    found = predictor.videos(paths, min(args.workers, len(paths) // 4))
    shown = {"total": len(paths), "desc": "predicting", "unit": "video", "disable": None}
    try:
        for path, scores, problem in tqdm(found, **shown):
            if scores is None:
                unreadable[str(path)] = problem
                continue
            best = predictor.best(scores)
            videos.append(entry := {"path": str(path), "top": best})
            try:
                look_closer(predictor, path, entry, names[path], args)
            except VideoError as error:  # in frames that the scores did not need
                unreadable[str(path)] = str(error)
            words = (f"{top['class']} {100 * top['score']:.1f}%" for top in best)
            tqdm.write(f"{printable(path)}: {', '.join(words)}")
    finally:
        write_json(output / "predictions.json", videos)  # also where it is stopped
    facts = {"config": args.config, "weights": args.weights, "device": str(device)}
    facts |= {"clips": config.test.clips, "crops": config.test.crops}
    facts["seconds"] = round(time.perf_counter() - began, 1)
    results = {"inputs": len(paths), "videos": len(videos), "unreadable": unreadable}
    results |= {"classes": predictor.classes, "run": facts}
    write_json(output / "results.json", results)
    print(f"{len(videos)} of {len(paths)} videos -> {output}")
    name_unreadable(unreadable, output / "results.json")
    if not videos:
        raise UserError(f"not one of the {len(paths)} inputs can be read")


def _check_options(args: Namespace) -> None:
    for option, value, least in (("batch-size", args.batch_size, 1), ("workers", args.workers, 0)):
        if value < least:
            raise UserError(f"--{option} {value}: use a number from {least} on")
    if args.step is not None and not args.step > 0:
        raise UserError(f"--step {args.step}: use a number of seconds above 0")
    if Path(args.output).is_file():
        raise UserError(f"--output {args.output} is a file: name a folder")


def look_closer(predictor: Predictor, path: Path, entry: Entry, name: str, args: Namespace) -> None:
    """Add the facts of a video and its classes over time to its ``entry``, and draw them.

    After a VideoError, for a frame that does not decode, what was done before is in ``entry``.
    """
    with Video(path) as video:
        entry |= {key: fact for key, fact in asdict(video.info).items() if key != "index"}
        windows = predictor.windows(video, args.step)
        if windows is not None:
            entry["windows"] = [
                {"start": round(start, 3), "end": round(end, 3), "top": predictor.best(scores)}
                for start, end, scores in zip(*windows, strict=True)
            ]
        if args.no_drawings:
            return
        drawings = entry["drawings"] = {}
        output = Path(args.output)
        frames = some_frames(video, STRIP_FRAMES)
        best = [(top["class"], top["score"]) for top in entry["top"]]
        draw_strip(frames, best, strip := drawing(output, "strips", f"{name}.png"))
        drawings["strip"] = str(strip)
        if windows is not None:
            curve = drawing(output, "curves", f"{name}.png")
            draw_curve(windows, predictor.classes, frames, curve)
            drawings["curve"] = str(curve)
        labels = frame_labels(video.timestamps, entry)
        write_labelled(video, labels, copy := drawing(output, "videos", f"{name}.mp4"))
        drawings["video"] = str(copy)
