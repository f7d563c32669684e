"""Clips per second and core: `revvideo`'s dataset against PyTorchVideo's `LabeledVideoDataset`,
that one with `revvideo`'s decoder behind it, and the decoders of decord and torchcodec where they
are installed.

    python -m benchmarks.bench_decode              # about ten minutes on two CPU cores

All read the same files, one process on one core: random clips of 16 frames with stride 4 from
videos of 340 x 256 at 30 frames per second, 10 s long, as float32 (3, 16, 256, 340), or as bytes,
as training takes them from `revvideo`'s. They take turns, A B C A B C, each once through all files;
the result is the median over the rounds of the ratio of their CPU times, so that what else the
machine does weighs on all alike.

The videos are photographs of scikit-image in front of which another one moves, with a moving
camera and the noise of a sensor, encoded with x264's defaults (a keyframe every 250 frames), then
as `python -m revvideo.transcode` writes these again, and, fewer of them, by other codecs. They have
no sound, and PyTorchVideo is told not to look for any.

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
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import skimage.data
import torch
from PIL import Image
from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm import tqdm

from backbones.common.errors import error_line
from backbones.common.files import write_json
from benchmarks.measuring import RESULTS, facts, parser_of, slug
from revvideo.data.clips import ClipDataset, Clips
from revvideo.data.manifest import VideoRecord
from revvideo.data.pytorchvideo import VideoPathHandler
from revvideo.data.transcode import Encoding, transcode

WIDTH, HEIGHT, RATE, SECONDS = 340, 256, 30, 10
FRAMES, STRIDE = 16, 4
CODECS: dict[str, tuple[Any, ...]] = {
    "HEVC": ("libx265", "mp4", {"x265-params": "log-level=error"}),
    "VP8": ("libvpx", "webm", {"deadline": "realtime", "cpu-used": "4", "b": "500k"}),
    "VP9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "6", "b": "500k"}),
    "AV1": ("libsvtav1", "mp4", {"preset": "10"}),
    "MPEG-4": ("mpeg4", "avi", {"q": "4"}),
    "MJPEG": ("mjpeg", "mov", {}, "yuvj420p"),
    "ProRes": ("prores_ks", "mov", {}, "yuv422p10le"),
    "FFV1": ("ffv1", "mkv", {}),
    "H.264 in a transport stream": ("libx264", "ts", {}),
}
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def encode_videos(
    folder: Path,
    count: int,
    codec: str = "libx264",
    ending: str = "mp4",
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
) -> None:
    """Write ``folder/moving/00.mp4``, ..., with the defaults of the encoder."""
    (folder / "moving").mkdir(parents=True)
    source = Path(skimage.data.__file__).parent
    scenes = [
        Image.open(source / name).convert("RGB").resize((2 * WIDTH, 2 * HEIGHT))
        for name in PHOTOGRAPHS
    ]
    for number in tqdm(range(count), desc=f"encoding, {codec}", disable=None):
        rng = np.random.default_rng(number)
        with av.open(folder / "moving" / f"{number:02}.{ending}", "w") as container:
            stream = container.add_stream(codec, rate=RATE, options=options or {})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
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
        [(str(path), {"label": 0}) for path in _paths(folder)],  # of all formats
        make_clip_sampler("random", Fraction(FRAMES * STRIDE, RATE)),
        video_sampler=SequentialSampler,
        transform=spread,
        decode_audio=False,
    )
    if ours:
        dataset.video_path_handler = VideoPathHandler(frames=FRAMES)
    return lambda: (sample["video"] for sample in dataset)


def _ours(folder: Path, dtype: torch.dtype = torch.float32) -> Callable[[], Iterable[Tensor]]:
    dataset = ClipDataset(
        [VideoRecord(path.name, 0) for path in _paths(folder)],
        folder / "moving",
        Clips(FRAMES, STRIDE),
        lambda clip: clip.permute(1, 0, 2, 3).to(dtype),
    )
    drawn = iter(range(sys.maxsize))

    def clips() -> Iterable[Tensor]:
        for index in range(len(dataset)):
            sample = dataset[index, next(drawn)]
            if sample["video"] is None:
                raise RuntimeError(sample["problem"])
            yield sample["video"][0]

    return clips


def _other(folder: Path, read: Callable[[str, np.random.Generator], Tensor]) -> Any:
    """A loop over the files with a decoder that has no dataset."""
    rng = np.random.default_rng(0)
    return lambda: (read(str(path), rng).float() for path in _paths(folder))


def _chosen(rng: np.random.Generator, frames: int) -> list[int]:
    start = int(rng.integers(frames - (FRAMES - 1) * STRIDE))
    return list(range(start, start + FRAMES * STRIDE, STRIDE))


def _others(folder: Path) -> dict[str, Callable[[], Iterable[Tensor]]]:
    """Decoders that happen to be installed."""
    found = {}
    with suppress(ImportError):
        import decord

        def read(path: str, rng: np.random.Generator) -> Tensor:
            reader = decord.VideoReader(path, num_threads=1)
            frames = reader.get_batch(_chosen(rng, len(reader))).asnumpy()
            return torch.from_numpy(frames).permute(3, 0, 1, 2)

        if _paths(folder)[0].suffix != ".ts":  # of which it never comes back
            found["decord"] = _other(folder, read)
    with suppress(ImportError, RuntimeError):  # the latter: it finds no FFmpeg
        from torchcodec.decoders import VideoDecoder

        def read_exactly(path: str, rng: np.random.Generator) -> Tensor:
            decoder = VideoDecoder(path, num_ffmpeg_threads=1)
            return decoder.get_frames_at(_chosen(rng, len(decoder))).data.permute(1, 0, 2, 3)

        found["torchcodec"] = _other(folder, read_exactly)
    return found


def _paths(folder: Path) -> list[Path]:
    return sorted((folder / "moving").iterdir())


def _cpu_seconds(clips: Iterable[Tensor], count: int) -> float:
    start = time.process_time()
    for clip in clips:
        if clip.shape != (3, FRAMES, HEIGHT, WIDTH):
            raise RuntimeError(f"a clip is {tuple(clip.shape)}")
        count -= 1
    if count:
        raise RuntimeError(f"{count} clips are missing")
    return time.process_time() - start


def _in_turn(
    runs: dict[str, Callable[[], Iterable[Tensor]]], count: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each in each round; those that cannot read the files are left out."""
    seconds: dict[str, list[float]] = {}
    for name, run in runs.items():
        try:
            _cpu_seconds(run(), count)  # warm up
            seconds[name] = []
        except Exception as error:
            tqdm.write(f"{name}: {error_line(error)}")
    for _ in tqdm(range(rounds), desc="decoding", disable=None):
        for name, values in seconds.items():
            values.append(_cpu_seconds(runs[name](), count))
    return seconds


def _rates(seconds: dict[str, list[float]], count: int) -> dict[str, float]:
    return {name: round(count / statistics.median(each), 2) for name, each in seconds.items()}


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Clips per second of a core for each, and ours relative to theirs and to transcoded files."""
    encode_videos(folder / "h264", count)
    new = folder / "new"
    outcome = transcode(folder / "h264", new, "", Encoding(), workers=0)
    h264 = folder / "h264"
    runs = {
        "pytorchvideo": _theirs(h264, ours=False),
        "pytorchvideo with revvideo's decoder": _theirs(h264, ours=True),
        "revvideo": _ours(h264),
        **_others(h264),
        "revvideo, as bytes": _ours(h264, torch.uint8),
        "revvideo, transcoded, as bytes": _ours(new, torch.uint8),
    }
    seconds = _in_turn(runs, count, rounds)
    ratios = [a / b for a, b in zip(seconds["pytorchvideo"], seconds["revvideo"], strict=True)]
    faster = [
        a / b
        for a, b in zip(
            seconds["revvideo, as bytes"], seconds["revvideo, transcoded, as bytes"], strict=True
        )
    ]
    return {
        "bits_per_second": round(8 * outcome.before / count / SECONDS),
        "clips_per_second_per_core": _rates(seconds, count),
        "revvideo_relative_to_pytorchvideo": round(statistics.median(ratios), 3),
        "lowest_and_highest_ratio": [round(min(ratios), 3), round(max(ratios), 3)],
        "transcoded_relative_to_not": round(statistics.median(faster), 3),
        "transcoded_bytes": round(outcome.after / outcome.before, 2),
        "transcoded_psnr": round(statistics.mean(outcome.psnr.values()), 1),
    }


def measure_codecs(folder: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Clips per second of a core from files of other codecs."""
    found = {}
    for number, (name, how) in enumerate(CODECS.items()):
        own = folder / str(number)
        encode_videos(own, count, *how)
        runs = {"pytorchvideo": _theirs(own, ours=False), "revvideo": _ours(own), **_others(own)}
        found[name] = _rates(_in_turn(runs, count, rounds), count)
    return found


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
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # to one core, so that nobody decodes with more
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        decoding = measure(Path(folder, "main"), args.videos, args.rounds)
        few = max(1, args.videos // 4)
        codecs = measure_codecs(Path(folder), few, args.rounds)
    results = {
        **facts("bench_decode", argv, device),
        "threads": 1,
        "python": platform.python_version(),
        "av": av.__version__,
        "videos": args.videos,
        "video": f"{WIDTH} x {HEIGHT}, {RATE} fps, {SECONDS} s, H.264",
        "videos_by_codec": few,
        "clip": f"{FRAMES} frames, stride {STRIDE}",
        "rounds": args.rounds,
        "decoding": decoding,
        "codecs": codecs,
    }
    write_json(args.output, results)
    print(f"wrote {args.output}")
    for name, rate in decoding["clips_per_second_per_core"].items():
        print(f"{name:40} {rate:7.2f} clips per second and core")
    print(f"{decoding['revvideo_relative_to_pytorchvideo']:.2f} times PyTorchVideo")
    print(f"{decoding['transcoded_relative_to_not']:.2f} times as fast transcoded")
    for name, rates in codecs.items():
        print(f"{name:30} " + ", ".join(f"{who} {rate:.2f}" for who, rate in rates.items()))


if __name__ == "__main__":
    main()
