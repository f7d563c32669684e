"""Build the demo video dataset: photographs that move in four ways, seconds, no download.

The class of a clip is its motion. Clips of the same number in the four classes show the same
photograph, begin with the very same picture and share size, frame rate, length and sound, so that
nothing but the motion tells them apart (see `demo.motions`). The clips are H.264 in mp4, in
the layout with a folder for each class::

    OUTPUT/train/slide_left/0000.mp4 ...     OUTPUT/val/slide_left/0000.mp4 ...
    OUTPUT/tour.mp4                          all four motions, one after the other
    OUTPUT/preview.png                       some clips of each class
    OUTPUT/dataset.json                      what each file shows

Training and validation share no photograph. The same arguments give the same bytes, with the same
versions of PyAV and Pillow. The clips of one number depend on the seed and on that number only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from backbones.common.errors import UserError
from demo.motions import MOTIONS, PHOTOGRAPHS, View, random_view, render

# Raise by one with each change that changes what is built, so that old copies get rebuilt.
RECIPE = 2
GENERATOR = "demo.motion"
INDEX = "dataset.json"
SPLITS = ("train", "val")
SIZES = ((128, 96), (160, 120), (144, 108), (96, 128))  # (width, height) in px
FRAME_RATES = (Fraction(15), Fraction(24), Fraction(25), Fraction(30000, 1001))
SECONDS = (1.6, 2.4)
SOUND_SHARE = 0.3
SOUND_RATE = 22050  # Hz
TOUR_SECONDS = 3  # of each motion
TOUR_SIZE = (240, 180)
TOUR_RATE = 25
PREVIEW_TIMES = (0.0, 0.4, 0.8, 1.2)
ARROWS = {
    "rotate_clockwise": "↻",
    "rotate_counterclockwise": "↺",
    "slide_left": "←",
    "slide_right": "→",
}


@dataclass(frozen=True)
class Start:
    """What the clips of one number share."""

    view: View
    size: tuple[int, int]
    rate: Fraction
    frames: int
    tone: float  # Hz; 0 for no sound


def draw_start(seed: int, split: str, number: int) -> Start:
    """The start of the clips ``number`` of ``split``, one for each motion."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    photographs = PHOTOGRAPHS[split]
    rate = FRAME_RATES[rng.integers(len(FRAME_RATES))]
    return Start(
        view=random_view(rng, photographs[number % len(photographs)]),
        size=SIZES[rng.integers(len(SIZES))],
        rate=rate,
        frames=round(float(rng.uniform(*SECONDS)) * rate),
        tone=float(rng.uniform(150, 600)) if rng.random() < SOUND_SHARE else 0.0,
    )


def write_video(
    path: Path,
    pictures: Iterable[Image.Image],
    size: tuple[int, int],
    rate: Fraction,
    tone: float = 0.0,
) -> None:
    """Encode RGB ``pictures`` of (width, height) = ``size`` px as H.264, and ``tone`` Hz as AAC."""
    with av.open(path, "w") as container:
        # A constant quantiser: any other way the encoder looks ahead, and the motion shows in what
        # it makes of the first picture. Nor would the same pictures always give the same bytes.
        video = container.add_stream("libx264", rate, {"qp": "24", "preset": "veryfast"})
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        # The default is as many as there are cores, and the bytes depend on that.
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", SOUND_RATE, layout="mono") if tone else None
        count = 0
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_image(picture)))
            count += 1
        container.mux(video.encode())
        if audio is not None:
            container.mux(audio.encode(_sound(tone, count / rate)))
            container.mux(audio.encode())


def _sound(tone: float, seconds: Fraction) -> av.AudioFrame:
    """A quiet note of ``tone`` Hz that fades."""
    at = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    wave = 0.1 * np.exp(-at) * np.sin(2 * np.pi * tone * at)
    frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], "fltp", "mono")
    frame.sample_rate = SOUND_RATE
    return frame


def build(
    output: Path,
    *,
    seed: int = 0,
    train_clips: int = 60,
    val_clips: int = 20,
    force: bool = False,
) -> Path:
    """Build the dataset in the folder ``output`` (made if need be) and give that folder back.

    ``train_clips`` and ``val_clips`` are numbers for each class. A finished dataset with the same
    arguments is kept as it is unless ``force``; one with other arguments is replaced. The new one
    is made in a hidden folder beside it and renamed at the end, so a build that was cut short
    leaves nothing that looks finished.

    Raises UserError, touching nothing, for a negative seed, for fewer than one clip in a split, if
    ``output`` holds files that this function did not write, or if scikit-image is not there.
    """
    arguments = {"seed": seed, "train_clips": train_clips, "val_clips": val_clips}
    for name, value in arguments.items():
        least = 0 if name == "seed" else 1
        if value < least:
            raise UserError(f"{name} is {value}: use {least} or more")
    counts = dict(zip(SPLITS, (train_clips, val_clips), strict=True))
    output = Path(output).absolute()
    info = {
        "description": "Demo video dataset: photographs that scikit-image ships, in motion",
        "generator": GENERATOR,
        "recipe": RECIPE,
        **arguments,
    }
    if output.exists():
        content = _existing(output)
        known = {output / name for name in content["files"]}
        if content["info"] == info and not force and all(file.is_file() for file in known):
            print(f"{output} is up to date ({_summary(counts)})")
            return output
        # What revvideo.scan leaves here holds for this build only, and goes with it.
        known |= {output / f"manifest_{split}.csv" for split in SPLITS}
        foreign = [p for p in sorted(output.rglob("*")) if not p.is_dir() and p not in known]
        if foreign:
            raise _refusal(output, f"{foreign[0].relative_to(output)} is not part of it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        fresh = Path(scratch, "new")
        written = _write_clips(fresh, seed, counts)
        _write_tour(fresh / "tour.mp4", seed)
        _draw_preview(fresh, written)
        extra: dict[str, Any] = {name: {} for name in ("tour.mp4", "preview.png", INDEX)}
        content = {"info": info, "files": written | extra}
        (fresh / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if output.exists():
            output.rename(Path(scratch, "old"))
        fresh.rename(output)
    print(f"{output}: {_summary(counts)}; see preview.png")
    return output


def _summary(counts: dict[str, int]) -> str:
    clips = " and ".join(f"{len(MOTIONS) * count} {split}" for split, count in counts.items())
    return f"{clips} clips of {len(MOTIONS)} motions"


def _write_clips(folder: Path, seed: int, counts: dict[str, int]) -> dict[str, Any]:
    """Write the clips of all splits. Gives what each file shows, by its name in ``folder``."""
    written: dict[str, Any] = {}
    starts = [(split, number) for split in counts for number in range(counts[split])]
    total = len(MOTIONS) * len(starts)
    with tqdm(total=total, desc="demo clips", unit="clip", disable=None) as progress:
        for split, number in starts:
            start = draw_start(seed, split, number)
            times = np.arange(start.frames) / float(start.rate)
            for motion in MOTIONS:
                name = f"{split}/{motion}/{number:04d}.mp4"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                pictures = render(start.view, motion, start.size, times)
                write_video(folder / name, pictures, start.size, start.rate, start.tone)
                written[name] = asdict(start) | {"rate": str(start.rate)}
                progress.update()
    return written


def _write_tour(path: Path, seed: int) -> None:
    """A film of one scene for each motion, on photographs that training does not see."""
    times = np.arange(TOUR_SECONDS * TOUR_RATE) / TOUR_RATE
    scenes = []
    for number, (motion, photograph) in enumerate(zip(MOTIONS, PHOTOGRAPHS["val"], strict=True)):
        rng = np.random.default_rng([seed, len(SPLITS), number])
        scenes.append(render(random_view(rng, photograph), motion, TOUR_SIZE, times))
    write_video(path, chain.from_iterable(scenes), TOUR_SIZE, Fraction(TOUR_RATE))


def _draw_preview(folder: Path, written: dict[str, Any]) -> None:
    """Draw two starts on different photographs in all motions, from the written training clips."""
    # Here, since they bring torch and matplotlib, which take longer than to see that all is there.
    from revvideo.data.decode import Video
    from revvideo.prediction.pictures import Clip, draw_sheet

    def off_centre(name: str) -> float:
        """How far the window starts from the middle of the photograph or of a mirrored copy."""
        view = written[name]["view"]
        return max(abs(view[axis] % 0.5 - 0.25) for axis in "xy")

    best: dict[str, str] = {}
    for name in sorted((name for name in written if name.startswith("train/")), key=off_centre):
        best.setdefault(written[name]["view"]["photograph"], Path(name).name)
    chosen = [best[photo] for photo in PHOTOGRAPHS["train"] if photo in best][:2]
    rows: dict[str, list[Clip]] = {}
    for motion in MOTIONS:
        clips = rows[f"{motion.replace('_', ' ')} {ARROWS[motion]}"] = []
        for name in chosen:
            with Video(folder / "train" / motion / name) as video:
                indices = [int(np.searchsorted(video.timestamps, time)) for time in PREVIEW_TIMES]
                pictures = video.frames(indices).permute(0, 2, 3, 1).numpy()
            clips.append(list(zip(PREVIEW_TIMES, pictures, strict=True)))
    title = "The class is the motion: clips of one number begin with the same picture in all four"
    draw_sheet(rows, title, folder / "preview.png")


def _refusal(output: Path, reason: str) -> UserError:
    return UserError(
        f"{output} is not a demo dataset alone ({reason}): choose another output folder, "
        "or move that one away"
    )


def _existing(output: Path) -> dict[str, Any]:
    """The content of the index of the dataset in ``output``; an empty one for an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return {"info": None, "files": {}}
    try:
        content: dict[str, Any] = json.loads((output / INDEX).read_text(encoding="utf-8"))
        if content["info"]["generator"] != GENERATOR or INDEX not in content["files"]:
            raise KeyError("generator")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refusal(output, f"its {INDEX} is missing or not ours") from error
    return content


def main(arguments: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 2 for what the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.motion",
        description="Build a small video dataset (photographs that slide left, slide right, turn "
        "clockwise, turn counter-clockwise) in half a minute, without a download, from the "
        "pictures inside scikit-image. Look at OUTPUT/preview.png to see what it is like, and play "
        "OUTPUT/tour.mp4.",
        epilog="Calling it again with the same options keeps the finished dataset; other options "
        "replace it. Files that this command did not write are never touched.",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder, e.g. datasets/motion")
    add("--seed", type=int, default=0, help="another seed gives other clips (default: 0)")
    add("--train-clips", type=int, default=60, metavar="N", help="for each motion (default: 60)")
    add("--val-clips", type=int, default=20, metavar="N", help="for each motion (default: 20)")
    add("--force", action="store_true", help="rebuild even if it is up to date")
    try:
        build(**vars(parser.parse_args(arguments)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
