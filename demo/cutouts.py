"""Where the demo dataset's objects and backgrounds come from: photographs inside scikit-image.

Everything is read from the image files that the ``scikit-image`` wheel installs next to
``skimage.data``, so nothing is downloaded. `cutouts` gives the objects, cut out of their
photographs with a transparent surrounding; `random_object` and `random_pile` give some of them in a
new pose and light, and `random_background` a scene to paste them on.

* The cat, the cups and the rockets were outlined by hand (`OUTLINES`, pixel coordinates).
* The coins stand apart on a dark cloth, so a watershed finds them.
* The motorcycle comes with a measured disparity (inverse depth) for each pixel: the machine is
  what stands nearer than the garage's floor and wall. The same disparity carries the mask over to
  the second photograph of the stereo pair.

`BACKGROUNDS` lists, for each split, the photographs and the boxes in them that show none of the
objects. Training and validation share no photograph.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageStat
from skimage import filters, measure, morphology, segmentation

Box = tuple[int, int, int, int]

LARGEST_SIDE = 240  # px, of a stored cutout

# Category, file and the object's outline, "x,y x,y ..." in pixels of that photograph.
OUTLINES: list[tuple[str, str, str]] = [
    (
        "cat",
        "chelsea.png",
        "37,2 68,0 92,3 110,12 135,9 180,4 230,2 280,4 312,10 328,4 345,0 396,0 388,14 "
        "380,28 373,44 366,58 357,72 354,84 356,98 360,112 361,128 359,145 355,162 350,178 "
        "341,192 330,203 321,213 317,224 317,240 313,256 305,267 292,275 275,279 256,281 "
        "235,283 214,281 194,277 176,270 160,261 142,252 124,240 107,225 90,210 75,195 "
        "62,178 52,160 45,140 40,118 35,95 33,70 37,45 41,25",
    ),
    (
        "cup",  # with its saucer and spoon
        "coffee.png",
        "285,19 255,21 228,29 206,42 189,59 181,73 165,79 147,90 126,106 108,125 94,146 "
        "84,170 79,195 78,220 83,248 92,273 105,297 122,320 144,341 170,359 200,374 230,382 "
        "260,387 295,388 330,385 362,376 392,362 418,343 441,318 458,292 470,265 477,238 "
        "478,212 473,184 464,160 452,140 437,124 418,108 421,92 424,76 419,68 408,67 398,71 "
        "386,56 368,41 345,29 316,21",
    ),
    (
        "cup",  # alone
        "coffee.png",
        "285,19 255,21 228,29 206,42 189,59 178,80 174,100 174,125 177,150 181,175 189,198 "
        "200,219 214,234 204,250 197,270 197,290 206,301 222,306 233,299 244,284 262,281 "
        "285,284 308,281 322,270 336,258 350,245 364,235 376,217 386,196 395,170 402,145 "
        "407,122 407,102 399,76 386,56 368,41 345,29 316,21",
    ),
    (
        "rocket",  # the nose and second stage of the launcher, down to the joint
        "rocket.jpg",
        "322.3,127.5 325.5,129 328.8,134 331.2,140 332.6,148 332.6,176 330.3,179.5 "
        "330.2,242.5 314.5,242.5 314.4,179.5 312,176 312,148 313.4,140 315.8,134 319,129",
    ),
    (
        "rocket",  # the space shuttle model, down to the edge of its stand
        "astronaut.png",
        "408,1 418,1 424,7 430,16 434,26 436.5,38 437,50 441,42 444,40 447,43 450,52 453,62 "
        "453.5,80 453.5,212 449,213 356,213 357,208 362,199 369,191 376,184 378.5,178 "
        "379,120 380.5,100 381.5,66 384,52 387,43 390,45 393,54 396,58 397,44 399,28 402,14",
    ),
]

# File and boxes (left, top, right, bottom) without any object; None is the whole picture.
BACKGROUNDS: dict[str, list[tuple[str, list[Box] | None]]] = {
    "train": [
        ("astronaut.png", [(0, 0, 345, 335)]),
        ("brick.png", None),
        ("clock_motion.png", None),
        ("coffee.png", [(484, 0, 600, 400)]),
        ("grass.png", None),
        ("hubble_deep_field.jpg", None),
        ("motorcycle_left.png", [(0, 0, 325, 138), (587, 0, 741, 250)]),
        ("retina.jpg", [(215, 215, 1195, 1195)]),
        ("rocket.jpg", [(0, 0, 284, 427), (376, 0, 640, 427)]),
        ("text.png", None),
    ],
    "val": [
        ("camera.png", None),
        ("gravel.png", None),
        ("ihc.png", None),
        ("moon.png", None),
        ("page.png", None),
    ],
}


@cache
def _picture(file: str) -> Image.Image:
    """Photograph ``file`` of scikit-image, mode RGB or L (grey).

    Raises FileNotFoundError if the installed scikit-image does not ship it.
    """
    path = Path(skimage.data.__file__).parent / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall scikit-image from its wheel")
    with Image.open(path) as image:
        image.load()
        return image


def _photo(file: str) -> np.ndarray:
    """Photograph ``file`` as an (H, W, 3) uint8 RGB array; a grey channel is repeated."""
    return np.asarray(_picture(file).convert("RGB"))


@cache
def cutouts() -> dict[str, list[Image.Image]]:
    """All objects by category: RGBA images, cropped to the object, transparent around it.

    Categories: ``cat``, ``coin``, ``cup``, ``motorcycle``, ``rocket``. Sides are at most
    ``LARGEST_SIDE`` px.
    """
    found: dict[str, list[Image.Image]] = {
        "cat": [],
        "cup": [],
        "rocket": [],
        "coin": [_cut(_photo("coins.png"), mask) for mask in _coin_masks()],
        "motorcycle": [
            _cut(_photo(f"motorcycle_{side}.png"), mask)
            for side, mask in zip(("left", "right"), _motorcycle_masks(), strict=True)
        ],
    }
    for category, file, outline in OUTLINES:
        height, width = _photo(file).shape[:2]
        # Drawn four times too large and averaged, so that the edge is anti-aliased.
        large = Image.new("L", (4 * width, 4 * height))
        vertices = [4 * float(number) for number in outline.replace(",", " ").split()]
        ImageDraw.Draw(large).polygon(vertices, fill=255)
        mask = np.asarray(large.resize((width, height), Image.Resampling.BOX)) / 255
        found[category].append(_cut(_photo(file), mask))
    return found


def random_object(
    rng: np.random.Generator, category: str, side: tuple[int, int], tilt: float
) -> Image.Image:
    """Draw an object of ``category``: RGBA, scaled, flipped, turned, its colours varied.

    ``side`` is the range of its longer side before turning, in pixels; ``tilt`` the largest angle
    to either side, in degrees.
    """
    choices = cutouts()[category]
    source = choices[rng.integers(len(choices))]
    scale = rng.uniform(*side) / max(source.size)
    size = [max(1, round(length * scale)) for length in source.size]
    small = source.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    metal = np.ones(3)
    if category == "coin":
        # The coins' photograph is grey: tint from silver (0) to gold or copper (1).
        metals = np.array([[0.02, -0.12, -0.42], [-0.02, -0.26, -0.45]])
        metal = 1 + rng.random() * metals[rng.integers(2)]
    varied = _vary_colours(rng, small, tint=0.06, gain=metal)
    angle = rng.uniform(-tilt, tilt)
    return varied.rotate(angle, Image.Resampling.BICUBIC, expand=True)


def random_pile(rng: np.random.Generator) -> Image.Image:
    """Draw a heap of 18 to 35 small coins that nobody would outline one by one: RGBA."""
    heap = Image.new("RGBA", (110, 110))
    spread = rng.uniform(10, 17)
    for _ in range(rng.integers(18, 36)):
        coin = random_object(rng, "coin", (12, 20), 180)
        x, y = np.clip(rng.normal(46, spread, size=2), 0, np.subtract(heap.size, coin.size))
        heap.alpha_composite(coin, (int(x), int(y)))
    return heap.crop(heap.getbbox())


def random_background(
    rng: np.random.Generator, split: str, width: int, height: int
) -> tuple[str, Image.Image]:
    """Draw a scene without objects: the photograph's file name and an RGB image.

    A random crop of a random photograph of ``split`` (``"train"`` or ``"val"``), scaled to
    ``width`` x ``height`` pixels, perhaps flipped, with its colours varied.
    """
    photographs = BACKGROUNDS[split]
    file, boxes = photographs[rng.integers(len(photographs))]
    picture = _picture(file)
    boxes = boxes or [(0, 0, picture.width, picture.height)]
    left, top, right, bottom = boxes[rng.integers(len(boxes))]
    # Output pixels per photograph pixel, at least what makes the crop fit into the box.
    zoom = max(
        float(np.exp(rng.uniform(np.log(0.5), np.log(1.4)))),
        width / (right - left),
        height / (bottom - top),
    )
    # Rounding may make a crop that just fits a hair larger than its box.
    crop_width = min(width / zoom, right - left)
    crop_height = min(height / zoom, bottom - top)
    x = rng.uniform(left, right - crop_width)
    y = rng.uniform(top, bottom - crop_height)
    crop = (x, y, min(x + crop_width, right), min(y + crop_height, bottom))
    scene = picture.resize((width, height), Image.Resampling.BICUBIC, box=crop)
    if rng.random() < 0.5:
        scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Grey photographs need more tint, or a detector would learn that backgrounds are grey.
    tint = 0.09 if picture.mode == "L" else 0.06
    return file, _vary_colours(rng, scene.convert("RGB"), tint)


def _vary_colours(
    rng: np.random.Generator, image: Image.Image, tint: float, gain: np.ndarray | float = 1.0
) -> Image.Image:
    """Change brightness, contrast and, by up to a fraction ``tint``, each channel's gain.

    For RGB and RGBA images; ``gain`` (one number or three) comes on top.
    """
    gain = gain * rng.uniform(0.8, 1.2) * rng.uniform(1 - tint, 1 + tint, size=3)
    contrast = rng.uniform(0.8, 1.2)
    mean = np.array(ImageStat.Stat(image).mean[:3])
    levels = np.arange(256)[:, None]
    table = np.clip(((levels - mean) * contrast + mean) * gain, 0, 255).round().astype(int)
    if image.mode == "RGBA":
        table = np.hstack([table, levels])
    return image.point(table.T.ravel().tolist())


def _cut(picture: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Photograph (H, W, 3) uint8 and mask (H, W) in 0..1 to an RGBA image cropped to the mask."""
    # The mask's rim mixes object and surroundings: going in by a pixel leaves no halo.
    alpha = filters.gaussian(morphology.erosion(mask.astype(np.float32)), 0.6)
    rows, columns = np.nonzero(alpha > 0.02)
    crop = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    rgba = np.dstack([picture, np.round(alpha * 255).astype(np.uint8)])
    image = Image.fromarray(rgba[crop])
    # Twice the size of the largest use is enough, and quicker to scale again and again.
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def _coin_masks() -> list[np.ndarray]:
    """The 24 coins, one boolean (H, W) mask each, by watershed on the edge strength."""
    grey = _photo("coins.png")[..., 0]
    markers = np.where(grey > 150, 2, np.where(grey < 30, 1, 0))
    regions = segmentation.watershed(filters.sobel(grey), markers) == 2
    labels = measure.label(morphology.opening(_fill(regions, 2000), morphology.disk(4)))
    return [labels == region.label for region in measure.regionprops(labels) if region.area > 500]


def _motorcycle_masks() -> tuple[np.ndarray, np.ndarray]:
    """The motorcycle's boolean (H, W) masks in the left and the right photograph."""
    path = Path(skimage.data.__file__).parent / "motorcycle_disp.npz"
    with np.load(path) as archive:
        disparity = archive["arr_0"]
    measured = np.isfinite(disparity)
    disparity = np.where(measured, disparity, 0)
    y, x = np.mgrid[: disparity.shape[0], : disparity.shape[1]]
    # A plane through the floor, seen left and right of the machine: disparity grows downwards.
    floor = measured & (y > 310) & ((x < 105) | (x > 700))
    design = np.stack([x, y, np.ones_like(x)], axis=-1).astype(float)
    plane, *_ = np.linalg.lstsq(design[floor], disparity[floor], rcond=None)
    near = measured & (disparity > 32) & (disparity > design @ plane + 1.5)
    left = _tidy(near)
    right = np.zeros_like(left)
    rows, columns = np.nonzero(left & measured)
    shifted = np.round(columns - disparity[rows, columns]).astype(int)
    inside = shifted >= 0
    right[rows[inside], shifted[inside]] = True
    return left, _tidy(right)


def _tidy(mask: np.ndarray) -> np.ndarray:
    """Boolean (H, W) mask without narrow cracks, narrow threads, pinholes and loose pieces."""
    # Cracks: rims without a measurement and, after the shift, slanted surfaces torn apart.
    mask = _fill(morphology.closing(mask, morphology.disk(2)), 60)
    # Threads (cables, a mirror's stem) would fall into crumbs once the rim is taken off.
    mask = morphology.opening(mask, morphology.disk(2))
    labels = measure.label(mask)
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def _fill(mask: np.ndarray, largest: int) -> np.ndarray:
    """Boolean (H, W) mask with its holes of up to ``largest`` pixels filled."""
    # As morphology.remove_small_holes, whose size argument has one name before 0.26, another since.
    gaps = measure.label(~mask, connectivity=1)
    return mask | (np.bincount(gaps.ravel())[gaps] <= largest)
