"""The objects and backgrounds of the detection dataset, out of the photographs in scikit-image.

The cat, the cups and the rockets were outlined by hand. The coins stand apart on a dark cloth, so a
watershed finds them. The motorcycle comes with a measured disparity (inverse depth) of each pixel:
the machine is what stands nearer than the garage's floor and wall.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import skimage.data
from PIL import Image, ImageDraw
from skimage import filters, measure, morphology, segmentation

from demo.folder import photograph

# Category, file and outline of an object, in pixels (x,y) of that photograph: the cat; the cup with
# its saucer and spoon, and alone; the upper part of a launcher; the model of a space shuttle.
OUTLINES = """
cat chelsea.png 37,2 68,0 92,3 110,12 135,9 180,4 230,2 280,4 312,10 328,4 345,0 396,0 388,14 380,28
373,44 366,58 357,72 354,84 356,98 360,112 361,128 359,145 355,162 350,178 341,192 330,203 321,213
317,224 317,240 313,256 305,267 292,275 275,279 256,281 235,283 214,281 194,277 176,270 160,261
142,252 124,240 107,225 90,210 75,195 62,178 52,160 45,140 40,118 35,95 33,70 37,45 41,25

cup coffee.png 285,19 255,21 228,29 206,42 189,59 181,73 165,79 147,90 126,106 108,125 94,146 84,170
79,195 78,220 83,248 92,273 105,297 122,320 144,341 170,359 200,374 230,382 260,387 295,388 330,385
362,376 392,362 418,343 441,318 458,292 470,265 477,238 478,212 473,184 464,160 452,140 437,124
418,108 421,92 424,76 419,68 408,67 398,71 386,56 368,41 345,29 316,21

cup coffee.png 285,19 255,21 228,29 206,42 189,59 178,80 174,100 174,125 177,150 181,175 189,198
200,219 214,234 204,250 197,270 197,290 206,301 222,306 233,299 244,284 262,281 285,284 308,281
322,270 336,258 350,245 364,235 376,217 386,196 395,170 402,145 407,122 407,102 399,76 386,56 368,41
345,29 316,21

rocket rocket.jpg 322.3,127.5 325.5,129 328.8,134 331.2,140 332.6,148 332.6,176 330.3,179.5
330.2,242.5 314.5,242.5 314.4,179.5 312,176 312,148 313.4,140 315.8,134 319,129

rocket astronaut.png 408,1 418,1 424,7 430,16 434,26 436.5,38 437,50 441,42 444,40 447,43 450,52
453,62 453.5,80 453.5,212 449,213 356,213 357,208 362,199 369,191 376,184 378.5,178 379,120
380.5,100 381.5,66 384,52 387,43 390,45 393,54 396,58 397,44 399,28 402,14
"""
# Training and validation share none.
BACKGROUNDS = {
    "train": "astronaut.png brick.png clock_motion.png coffee.png grass.png hubble_deep_field.jpg "
    "motorcycle_left.png retina.jpg rocket.jpg text.png",
    "val": "camera.png gravel.png ihc.png moon.png page.png",
}
# The parts (left, top, right, bottom) of some that show none of the objects.
BOXES = {
    "astronaut.png": [(0, 0, 345, 335)],
    "coffee.png": [(484, 0, 600, 400)],
    "motorcycle_left.png": [(0, 0, 325, 138), (587, 0, 741, 250)],
    "retina.jpg": [(215, 215, 1195, 1195)],
    "rocket.jpg": [(0, 0, 284, 427), (376, 0, 640, 427)],
}


@cache
def cutouts() -> dict[str, list[Image.Image]]:
    """All objects by category: RGBA images, cropped to the object, transparent around it."""
    coins = [_cut("coins.png", mask) for mask in _coin_masks()]
    machines = [_cut(file, mask) for file, mask in _motorcycle_masks().items()]
    found = {"cat": [], "cup": [], "rocket": [], "coin": coins, "motorcycle": machines}
    for outline in OUTLINES.split("\n\n"):
        category, file, *vertices = outline.split()
        width, height = photograph(file).size
        # Drawn four times too large and averaged, so that the edge is anti-aliased.
        large = Image.new("L", (4 * width, 4 * height))
        corners = [4 * float(number) for corner in vertices for number in corner.split(",")]
        ImageDraw.Draw(large).polygon(corners, fill=255)
        mask = np.asarray(large.resize((width, height), Image.Resampling.BOX)) / 255
        found[category].append(_cut(file, mask))
    return found


def random_object(
    rng: np.random.Generator, category: str, side: tuple[int, int], tilt: float
) -> Image.Image:
    """An object, RGBA, its longer side in the range ``side``, turned by up to ``tilt`` degrees."""
    choices = cutouts()[category]
    source = choices[rng.integers(len(choices))]
    scale = rng.uniform(*side) / max(source.size)
    width, height = (max(1, round(length * scale)) for length in source.size)
    small = source.resize((width, height), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    metal = np.ones(3)
    if category == "coin":
        # The coins' photograph is grey: tint from silver (0) to gold or copper (1).
        metals = np.array([[0.02, -0.12, -0.42], [-0.02, -0.26, -0.45]])
        metal = 1 + rng.random() * metals[rng.integers(2)]
    varied = _vary_colours(rng, small, tint=0.06, gain=metal)
    return varied.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BICUBIC, expand=True)


def random_pile(rng: np.random.Generator) -> Image.Image:
    """A heap of small coins that nobody would outline one by one, RGBA."""
    heap = Image.new("RGBA", (110, 110))
    spread = rng.uniform(10, 17)
    for _ in range(rng.integers(18, 36)):
        coin = random_object(rng, "coin", (12, 20), 180)
        x, y = np.clip(rng.normal(46, spread, size=2), 0, np.subtract(heap.size, coin.size))
        heap.alpha_composite(coin, (int(x), int(y)))
    return heap.crop(heap.getbbox())


def random_background(rng: np.random.Generator, split: str, width: int, height: int) -> Image.Image:
    """A scene without objects: a crop of a photograph of the split, its colours varied."""
    files = BACKGROUNDS[split].split()
    file = files[rng.integers(len(files))]
    picture = photograph(file)
    boxes = BOXES.get(file, [(0, 0, *picture.size)])
    left, top, right, bottom = boxes[rng.integers(len(boxes))]
    # Output pixels per photograph pixel, at least what makes the crop fit into the box.
    zoom = float(np.exp(rng.uniform(np.log(0.5), np.log(1.4))))
    zoom = max(zoom, width / (right - left), height / (bottom - top))
    # Rounding may make a crop that just fits a hair larger than its box.
    crop_width = min(width / zoom, right - left)
    crop_height = min(height / zoom, bottom - top)
    x, y = rng.uniform(left, right - crop_width), rng.uniform(top, bottom - crop_height)
    crop = (x, y, min(x + crop_width, right), min(y + crop_height, bottom))
    scene = picture.resize((width, height), Image.Resampling.BICUBIC, box=crop)
    if rng.random() < 0.5:
        scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Grey photographs need more tint, or a detector would learn that backgrounds are grey.
    return _vary_colours(rng, scene.convert("RGB"), tint=0.09 if picture.mode == "L" else 0.06)


def _vary_colours(
    rng: np.random.Generator, image: Image.Image, tint: float, gain: np.ndarray | float = 1.0
) -> Image.Image:
    """Change brightness, contrast and, by up to a fraction ``tint``, each channel's gain."""
    gain = gain * rng.uniform(0.8, 1.2) * rng.uniform(1 - tint, 1 + tint, size=3)
    colours = np.asarray(image, float)[..., :3]
    mean = colours.mean(axis=(0, 1))
    varied = ((colours - mean) * rng.uniform(0.8, 1.2) + mean) * gain
    result = Image.fromarray(varied.clip(0, 255).round().astype(np.uint8))
    if image.mode == "RGBA":
        result.putalpha(image.getchannel("A"))
    return result


def _cut(file: str, mask: np.ndarray) -> Image.Image:
    """A photograph and a mask (H, W) in 0..1 as an RGBA image, cropped to the mask."""
    # The mask's rim mixes object and surroundings: going in by a pixel leaves no halo.
    alpha = filters.gaussian(morphology.erosion(mask.astype(np.float32)), 0.6)
    picture = photograph(file).convert("RGB")
    picture.putalpha(Image.fromarray(np.round(alpha * 255).astype(np.uint8)))
    rows, columns = np.nonzero(alpha > 0.02)
    image = picture.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    # Twice the size of the largest use is enough, and quicker to scale again and again.
    image.thumbnail((240, 240), Image.Resampling.LANCZOS)
    return image


def _coin_masks() -> list[np.ndarray]:
    """The 24 coins, one boolean (H, W) mask each, by watershed on the edge strength."""
    grey = np.asarray(photograph("coins.png"))
    markers = np.where(grey > 150, 2, np.where(grey < 30, 1, 0))
    regions = segmentation.watershed(filters.sobel(grey), markers) == 2
    whole = morphology.area_closing(regions.astype(np.uint8), 2000)
    labels = measure.label(morphology.opening(whole, morphology.disk(4)))
    return [labels == region.label for region in measure.regionprops(labels) if region.area > 500]


def _motorcycle_masks() -> dict[str, np.ndarray]:
    """The motorcycle's boolean (H, W) mask in each photograph of the stereo pair."""
    _, _, disparity = skimage.data.stereo_motorcycle()
    measured = np.isfinite(disparity)
    disparity = np.where(measured, disparity, 0)
    y, x = np.mgrid[: disparity.shape[0], : disparity.shape[1]]
    # A plane through the floor, seen left and right of the machine: disparity grows downwards.
    floor = measured & (y > 310) & ((x < 105) | (x > 700))
    design = np.stack([x, y, np.ones_like(x)], axis=-1).astype(float)
    plane, *_ = np.linalg.lstsq(design[floor], disparity[floor], rcond=None)
    left = _tidy(measured & (disparity > 32) & (disparity > design @ plane + 1.5))
    right = np.zeros_like(left)
    rows, columns = np.nonzero(left & measured)
    shifted = np.round(columns - disparity[rows, columns]).astype(int)
    right[rows[shifted >= 0], shifted[shifted >= 0]] = True
    return {"motorcycle_left.png": left, "motorcycle_right.png": _tidy(right)}


def _tidy(mask: np.ndarray) -> np.ndarray:
    """Boolean (H, W) mask without narrow cracks, narrow threads, pinholes and loose pieces."""
    disk = morphology.disk(2)
    # Cracks: rims without a measurement and, after the shift, slanted surfaces torn apart.
    closed = morphology.area_closing(morphology.closing(mask.astype(np.uint8), disk), 60)
    # Threads (cables, a mirror's stem) would fall into crumbs once the rim is taken off.
    labels = measure.label(morphology.opening(closed, disk))
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
