"""What the demo clips show: a window onto a photograph that slides or turns, upright or not.

Mirrored at its borders, a photograph covers the plane and repeats. A `View` is a place on it, an
angle and a speed; `render` gives the pictures along one of the `MOTIONS`. `random_view` draws the
place evenly over one repetition and the angle evenly over the circle. Sliding and turning leave
that distribution as it is, so at any time the picture is distributed in the same way for all
motions, and no single frame tells which one it belongs to.

The photographs are image files of the ``scikit-image`` wheel, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image

from backbones.common.errors import UserError

# Name: where the picture goes (x, y), in window sides, and how it turns, counter-clockwise, in
# radians; both per unit of `View.speed` and second.
MOTIONS: dict[str, tuple[tuple[float, float], float]] = {
    "rotate_clockwise": ((0, 0), -2.5),
    "rotate_counterclockwise": ((0, 0), 2.5),
    "slide_left": ((-1, 0), 0),
    "slide_right": ((1, 0), 0),
}
# Training and validation share no photograph. All have something to see nearly everywhere: where a
# picture is plain, nothing tells how it moves.
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": (
        "astronaut.png",
        "coffee.png",
        "motorcycle_left.png",
        "hubble_deep_field.jpg",
        "camera.png",
        "retina.jpg",
        "grass.png",
        "brick.png",
        "text.png",
        "page.png",
    ),
    "val": ("chelsea.png", "ihc.png", "coins.png", "gravel.png"),
}
WINDOW = (0.35, 0.6)  # shorter side of the window over that of the photograph
SPEED = (0.25, 0.5)  # shorter sides of the window per second


@dataclass(frozen=True)
class View:
    """Where a clip starts, and how fast it is; the motion is not part of it.

    Attributes:
        photograph: its file name.
        window: the shorter side of the window over that of the photograph.
        x, y: the window's centre, in repetitions of the mirrored photograph, in [0, 1).
        angle: of the window on the photograph, in radians.
        speed: in shorter sides of the window per second.
    """

    photograph: str
    window: float
    x: float
    y: float
    angle: float
    speed: float


def random_view(rng: np.random.Generator, photograph: str) -> View:
    """Draw a start on ``photograph``."""
    return View(
        photograph=photograph,
        window=float(rng.uniform(*WINDOW)),
        x=float(rng.random()),
        y=float(rng.random()),
        angle=float(rng.uniform(0, 2 * np.pi)),
        speed=float(rng.uniform(*SPEED)),
    )


def path(
    view: View, motion: str, side: float, period: tuple[float, float], times: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the window is over time.

    Args:
        view: the start.
        motion: one of `MOTIONS`.
        side: the window's shorter side.
        period: after how far the mirrored photograph repeats, in x and y.
        times: in seconds from the start.

    Returns:
        x and y of its centre, in the unit of ``side`` and ``period``, and its angle in radians.
    """
    (right, down), turn = MOTIONS[motion]
    angles = view.angle + view.speed * turn * times
    # The window goes against the picture. On the photograph its sides are turned by the angle.
    cos, sin = np.cos(view.angle), np.sin(view.angle)
    way = view.speed * side * times
    xs = view.x * period[0] - way * (cos * right - sin * down)
    ys = view.y * period[1] - way * (sin * right + cos * down)
    return xs, ys, angles


def render(
    view: View, motion: str, size: tuple[int, int], times: np.ndarray
) -> Iterator[Image.Image]:
    """The RGB pictures, (width, height) = ``size`` px, at ``times`` in seconds from the start."""
    side = min(size)
    pixels = _scaled(view.photograph, round(side / view.window))
    height, width = pixels.shape[:2]
    xs, ys, angles = path(view, motion, side, (2 * width, 2 * height), times)
    margin = int(np.ceil(np.hypot(*size) / 2)) + 3
    left, top = int(xs.min()) - margin, int(ys.min()) - margin
    columns = _mirrored(np.arange(left, int(xs.max()) + margin), width)
    rows = _mirrored(np.arange(top, int(ys.max()) + margin), height)
    canvas = Image.fromarray(pixels[np.ix_(rows, columns)])
    half_x, half_y = size[0] / 2, size[1] / 2
    for x, y, angle in zip(xs - left, ys - top, angles, strict=True):
        cos, sin = np.cos(angle), np.sin(angle)
        # Pillow's matrix takes a place in the result to one in the source.
        matrix = (
            *(cos, -sin, x - cos * half_x + sin * half_y),
            *(sin, cos, y - sin * half_x - cos * half_y),
        )
        yield canvas.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _mirrored(places: np.ndarray, length: int) -> np.ndarray:
    """Indices into ``length`` pixels for any integer places: 0 1 2 2 1 0 0 1 … for length 3."""
    places = places % (2 * length)
    return np.minimum(places, 2 * length - 1 - places)


# All motions start from one view: the last photograph is what is asked for next.
@lru_cache(maxsize=1)
def _scaled(file: str, side: int) -> np.ndarray:
    """Photograph ``file``, its shorter side ``side`` px, as an (H, W, 3) uint8 array."""
    photo = _photo(file)
    scale = side / min(photo.size)
    width, height = (round(length * scale) for length in photo.size)
    return np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))


@cache
def _photo(file: str) -> Image.Image:
    """Photograph ``file`` of scikit-image as RGB.

    Raises UserError if scikit-image is not installed, or does not ship it.
    """
    try:
        with files("skimage.data").joinpath(file).open("rb") as stream:
            return Image.open(stream).convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"the demo needs scikit-image: pip install scikit-image ({error})"
        ) from error
