"""Make a small video dataset: photographs that move in four ways. The class is the motion.

    python -m demo.motion --output datasets/motion

A clip is a window onto a photograph that slides or turns. Mirrored at its borders, a photograph
covers the plane and repeats: a clip starts anywhere on one repetition, at any angle, all equally
likely. Sliding and turning leave it so, and no single frame tells the motion. Clips of the same
number begin with the very same picture, whatever their class, and share size, frame rate and
length; training and validation share no photograph. They are H.264 files in the folders of their
classes: OUTPUT/train/slide_left/0000.mp4 ..., and the same for val.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from demo.folder import command, make_once, photograph

# Name: where the picture goes (x, y), in window sides, and how it turns, counter-clockwise, in
# radians; both per unit of `Start.speed` and second.
MOTIONS: dict[str, tuple[tuple[float, float], float]] = {
    "rotate_clockwise": ((0, 0), -2.5),
    "rotate_counterclockwise": ((0, 0), 2.5),
    "slide_left": ((-1, 0), 0),
    "slide_right": ((1, 0), 0),
}
# All have something to see nearly everywhere: where a picture is plain, nothing tells how it moves.
PHOTOGRAPHS = {
    "train": "astronaut.png coffee.png motorcycle_left.png hubble_deep_field.jpg camera.png "
    "retina.jpg grass.png brick.png text.png page.png",
    "val": "chelsea.png ihc.png coins.png gravel.png",
}
SIZES = ((128, 96), (160, 120), (144, 108), (96, 128))  # (width, height) in px
FRAME_RATES = (Fraction(15), Fraction(24), Fraction(25), Fraction(30000, 1001))


class Start:
    """What the clips of one number share, drawn at random for a photograph."""

    def __init__(self, rng: np.random.Generator, photograph: str) -> None:
        self.photograph = photograph
        self.rate = FRAME_RATES[rng.integers(len(FRAME_RATES))]
        self.window = rng.uniform(0.35, 0.6)  # its shorter side over that of the photograph
        # Its centre, in repetitions of the mirrored photograph, and the angle of it on that.
        self.x, self.y, self.angle = rng.random(), rng.random(), rng.uniform(0, 2 * np.pi)
        self.speed = rng.uniform(0.25, 0.5)  # in shorter sides of the window per second
        self.size = SIZES[rng.integers(len(SIZES))]
        self.frames = round(rng.uniform(1.6, 2.4) * self.rate)


def path(
    start: Start, motion: str, side: float, period: tuple[float, float], times: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the window is over time: x and y of its centre and its angle in radians.

    ``side`` is its shorter side; ``period`` after how far the mirrored photograph repeats, in x
    and y, in the same unit; ``times`` are seconds from the start.
    """
    (right, down), turn = MOTIONS[motion]
    # The window goes against the picture. On the photograph its sides are turned by the angle.
    cos, sin = np.cos(start.angle), np.sin(start.angle)
    way = start.speed * side * times
    xs = start.x * period[0] - way * (cos * right - sin * down)
    ys = start.y * period[1] - way * (sin * right + cos * down)
    return xs, ys, start.angle + start.speed * turn * times


def render(start: Start, motion: str) -> Iterator[Image.Image]:
    """The RGB pictures of a clip."""
    side = min(start.size)
    photo = photograph(start.photograph).convert("RGB")
    scale = round(side / start.window) / min(photo.size)
    width, height = (round(length * scale) for length in photo.size)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))
    times = np.arange(start.frames) / float(start.rate)
    xs, ys, angles = path(start, motion, side, (2 * width, 2 * height), times)
    margin = int(np.ceil(np.hypot(*start.size) / 2)) + 3
    left, top = int(xs.min()) - margin, int(ys.min()) - margin
    rows = range(top, int(ys.max()) + margin)
    columns = range(left, int(xs.max()) + margin)
    mirrored = np.pad(pixels, ((0, height), (0, width), (0, 0)), mode="symmetric")
    canvas = Image.fromarray(mirrored.take(rows, 0, mode="wrap").take(columns, 1, mode="wrap"))
    half_x, half_y = start.size[0] / 2, start.size[1] / 2
    for x, y, angle in zip(xs - left, ys - top, angles, strict=True):
        cos, sin = np.cos(angle), np.sin(angle)
        # Pillow's matrix takes a place in the result to one in the source.
        across = (cos, -sin, x - cos * half_x + sin * half_y)
        down = (sin, cos, y - sin * half_x - cos * half_y)
        affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        yield canvas.transform(start.size, affine, (*across, *down), bilinear)


def write_clip(file: Path, start: Start, motion: str) -> None:
    """Encode a clip; the same start gives the same bytes, with the same PyAV and Pillow."""
    with av.open(file, "w") as container:
        # A constant quantiser: any other way the encoder looks ahead, and the motion shows in what
        # it makes of the first picture. Nor would the same pictures always give the same bytes.
        stream = container.add_stream("libx264", start.rate, {"qp": "24", "preset": "veryfast"})
        stream.width, stream.height = start.size
        stream.pix_fmt = "yuv420p"
        # The default is as many as there are cores, and the bytes depend on that.
        stream.codec_context.thread_count = 1
        for picture in render(start, motion):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def build(output: Path, train_clips: int = 60, val_clips: int = 20) -> Path:
    """Make the dataset, so many clips of each motion, in a folder; see `demo.folder.make_once`."""
    counts = {"train": train_clips, "val": val_clips}

    def write(folder: Path) -> None:
        for place, (split, count) in enumerate(counts.items()):
            photographs = PHOTOGRAPHS[split].split()
            for motion in MOTIONS:
                (folder / split / motion).mkdir(parents=True)
            for number in tqdm(range(count), desc=split, unit="start", disable=None):
                rng = np.random.default_rng([0, place, number])
                start = Start(rng, photographs[number % len(photographs)])
                for motion in MOTIONS:
                    write_clip(folder / split / motion / f"{number:04d}.mp4", start, motion)

    return make_once(output, f"demo.motion 3, {counts}", write)


if __name__ == "__main__":
    sys.exit(command("motion", __doc__, build))
