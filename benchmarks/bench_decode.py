"""Clips per second and core: `revvideo`'s dataset against PyTorchVideo's `LabeledVideoDataset`, and
that one with `revvideo`'s decoder behind it.

    python -m benchmarks.bench_decode              # about two minutes on two CPU cores

All read the same files, one process on one core: random clips of 16 frames with stride 4 from
H.264 videos of 340 x 256 at 30 frames per second, 10 s long, as float32 (3, 16, 256, 340). They
take turns, A B C A B C, each once through all files; the result is the median over the rounds of
the ratio of their CPU times, so that what else the machine does weighs on all alike.

The videos are photographs of scikit-image in front of which another one moves, with a moving
camera and the noise of a sensor, encoded with x264's defaults (a keyframe every 250 frames). They
have no sound, and PyTorchVideo is told not to look for any.

Writes a JSON file that names the hardware.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import skimage.data
import torch
from PIL import Image
from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm import tqdm

from backbones.common.files import write_json
from benchmarks.measuring import RESULTS, facts, parser_of, slug
from revvideo.data.clips import ClipDataset, RandomClip
from revvideo.data.layouts import find_videos
from revvideo.data.manifest import VideoRecord
from revvideo.data.pytorchvideo import VideoPathHandler

WIDTH, HEIGHT, RATE, SECONDS = 340, 256, 30, 10
FRAMES, STRIDE = 16, 4
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def encode_videos(folder: Path, count: int) -> None:
    """Write ``folder/moving/00.mp4``, ..., with x264's defaults."""
    (folder / "moving").mkdir(parents=True)
    source = Path(skimage.data.__file__).parent
    scenes = [
        Image.open(source / name).convert("RGB").resize((2 * WIDTH, 2 * HEIGHT))
        for name in PHOTOGRAPHS
    ]
    for number in tqdm(range(count), desc="encoding", disable=None):
        rng = np.random.default_rng(number)
        with av.open(folder / "moving" / f"{number:02}.mp4", "w") as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            back, front = (scenes[i] for i in rng.choice(len(scenes), 2, replace=False))
            for picture in _moving(back, front, rng):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode(None))


def _moving(
    back: Image.Image, front: Image.Image, rng: np.random.Generator
) -> Iterable[np.ndarray]:
    """RGB pictures: a camera that wanders over ``back``, a smaller ``front`` that crosses it."""
    front = front.resize((WIDTH // 3, HEIGHT // 2))
    speed = rng.uniform(0.5, 3, 4) * rng.choice([-1, 1], 4)  # pixels per frame, in 1/30 s
    phase = rng.uniform(0, 2 * np.pi, 4)
    shake = np.cumsum(rng.normal(0, 0.3, (SECONDS * RATE, 2)), axis=0)
    reach = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT]) / 2
    noise = rng.normal(0, 2, (8, HEIGHT, WIDTH, 3))
    for t in range(SECONDS * RATE):
        x, y, u, v = reach * (1 + np.sin(phase + speed * t / reach))
        x, y = np.clip([x + shake[t, 0], y + shake[t, 1]], 0, [WIDTH, HEIGHT])
        view = back.transform(
            (WIDTH, HEIGHT), Image.Transform.AFFINE, (1, 0, x, 0, 1, y), Image.Resampling.BILINEAR
        )
        view.paste(front, (round(u) - WIDTH // 6, round(v) - HEIGHT // 4))
        yield (np.asarray(view) + noise[rng.integers(8)]).clip(0, 255).astype(np.uint8)


def _theirs(folder: Path, *, ours: bool) -> Callable[[], Iterable[Tensor]]:
    """Their dataset; with our decoder behind it, which converts the frames of the clip alone."""

    def spread(sample: dict[str, Any]) -> dict[str, Any]:
        video = sample["video"]  # of its own transforms, those that thin out do not import
        chosen = torch.linspace(0, video.shape[1] - 1, FRAMES).long()
        return sample | {"video": video[:, chosen]}

    dataset = LabeledVideoDataset(
        LabeledVideoPaths.from_path(str(folder)),
        make_clip_sampler("random", Fraction(FRAMES * STRIDE, RATE)),
        video_sampler=SequentialSampler,
        transform=spread,
        decode_audio=False,
    )
    if ours:
        dataset.video_path_handler = VideoPathHandler(frames=FRAMES)
    return lambda: (sample["video"] for sample in dataset)


def _ours(folder: Path) -> Callable[[], Iterable[Tensor]]:
    _, entries = find_videos(folder, "", layout="folders")
    dataset = ClipDataset(
        [VideoRecord(path, label) for path, label in entries],
        folder,
        RandomClip(FRAMES, STRIDE),
        lambda clip: clip.permute(1, 0, 2, 3).float(),
    )
    drawn = iter(range(sys.maxsize))
    return lambda: (dataset[index, next(drawn)]["video"][0] for index in range(len(dataset)))


def _cpu_seconds(clips: Iterable[Tensor], count: int) -> float:
    start = time.process_time()
    for clip in clips:
        if clip.shape != (3, FRAMES, HEIGHT, WIDTH) or clip.dtype != torch.float32:
            raise RuntimeError(f"a clip is {clip.dtype} {tuple(clip.shape)}")
        count -= 1
    if count:
        raise RuntimeError(f"{count} clips are missing")
    return time.process_time() - start


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Clips per second of a core for each, and ours relative to theirs."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # to one core, so that nobody decodes with more
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    runs = {
        "pytorchvideo": _theirs(folder, ours=False),
        "pytorchvideo with revvideo's decoder": _theirs(folder, ours=True),
        "revvideo": _ours(folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        _cpu_seconds(run(), count)  # warm up
    for _ in tqdm(range(rounds), desc="decoding", disable=None):
        for name, run in runs.items():
            seconds[name].append(_cpu_seconds(run(), count))
    ratios = [a / b for a, b in zip(seconds["pytorchvideo"], seconds["revvideo"], strict=True)]
    return {
        "clips_per_second_per_core": {
            name: round(count / statistics.median(values), 2) for name, values in seconds.items()
        },
        "revvideo_relative_to_pytorchvideo": round(statistics.median(ratios), 3),
        "lowest_and_highest_ratio": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Encode the videos, measure, write the JSON file, and print the ratio."""
    parser = parser_of("bench_decode", __doc__)
    add = parser.add_argument
    add("--videos", type=int, default=16, help="files (16)")
    add("--rounds", type=int, default=9, help="rounds of runs through all files (9)")
    device = torch.device("cpu")
    path = RESULTS / f"decode_{slug(device)}.json"
    add("--output", type=Path, default=path, help="JSON file (named after the CPU)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        encode_videos(Path(folder), args.videos)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.mp4"))
        decoding = measure(Path(folder), args.videos, args.rounds)
    results = {
        **facts("bench_decode", argv, device),
        "threads": 1,
        "python": platform.python_version(),
        "av": av.__version__,
        "videos": args.videos,
        "video": f"{WIDTH} x {HEIGHT}, {RATE} fps, {SECONDS} s, H.264",
        "bits_per_second": round(8 * size / args.videos / SECONDS),
        "clip": f"{FRAMES} frames, stride {STRIDE}",
        "rounds": args.rounds,
        "decoding": decoding,
    }
    write_json(args.output, results)
    print(f"wrote {args.output}")
    for name, rate in decoding["clips_per_second_per_core"].items():
        print(f"{name:40} {rate:7.2f} clips per second and core")
    print(f"{decoding['revvideo_relative_to_pytorchvideo']:.2f} times PyTorchVideo")


if __name__ == "__main__":
    main()
