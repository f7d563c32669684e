"""Videos written again for training, by PyAV."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

from backbones.common.errors import UserError, error_line
from backbones.common.files import make_folder, replacing
from backbones.common.videos import h264_writer
from revvideo.data.decode import Video
from revvideo.data.layouts import Layout, annotation_file, find_videos
from revvideo.data.loader import each_file
from revvideo.errors import VideoError

_COMPARED = 8  # frames of a file whose PSNR is taken
_BEST_PSNR = 99.0  # dB, where nothing is lost
_FINEST = 1_000_000  # parts of a second in which mp4 can count


@dataclass(frozen=True)
class Encoding:
    """How videos are written."""

    short_side: int = 256  # to which frames are shrunk, in pixels; smaller ones stay as they are
    crf: int = 23  # the constant rate factor of x264, 0 to 51
    keyframes: int = 16  # frames from one to the next

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf={self.crf} is none of x264's: 0 to 51")

    @property
    def options(self) -> dict[str, str]:
        """As the encoder takes them.

        Three of four frames are such as no other refers to, so that of clips that take one frame in
        four the decoder has only those between to pass through: see ``Video.frames``.
        """
        fixed = "bframes=3:b-adapt=0:b-pyramid=none:weightb=0:scenecut=0"
        fast = {"preset": "fast", "tune": "fastdecode", "x264-params": fixed}
        return {"crf": str(self.crf), "g": str(self.keyframes), **fast}


@dataclass
class Outcome:
    """What became of the videos of a split."""

    videos: int  # how many there were
    before: int = 0  # bytes of those that stand there now …
    after: int = 0  # … and of what they became
    psnr: dict[str, float] = field(default_factory=dict)  # of those just written, in dB, by path
    problems: dict[str, str] = field(default_factory=dict)  # why others could not be written

    def __str__(self) -> str:
        sizes = f"{self.before / 1e6:,.1f} MB became {self.after / 1e6:,.1f} MB"
        written = f"{len(self.psnr):,} of {self.videos:,} videos written"
        left = self.videos - len(self.psnr) - len(self.problems)
        text = f"{written}, {left:,} stood there already; {sizes}"
        if not self.psnr:
            return text
        worst = min(self.psnr, key=self.psnr.__getitem__)
        mean = sum(self.psnr.values()) / len(self.psnr)
        return f"{text}; PSNR {mean:.1f} dB, lowest {self.psnr[worst]:.1f} dB of {worst}"


def transcode(
    root: str | os.PathLike[str],
    to: str | os.PathLike[str],
    split: str,
    encoding: Encoding,
    annotations: str | os.PathLike[str] | None = None,
    layout: Layout = "auto",
    workers: int | None = None,
) -> Outcome:
    """Write the videos of a split again, below the folder ``to``.

    Arguments and errors are as of ``find_videos``; without ``workers`` there is a process per core.
    A UserError also says that ``to`` lies in ``root``, or that no video can be written.
    """
    source, target = Path(root).absolute(), Path(to).absolute()
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{to} lies in {root}: write to a folder outside")
    _, entries = find_videos(source, split, annotations, layout)
    make_folder(str(target), "the folder to write to")
    files = [*dict.fromkeys(path for path, _ in entries)]
    # Of files that would have one name the first one gets it.
    first = {Path(path).with_suffix(".mp4"): path for path in reversed(files)}
    made = partial(_written, source=source, target=target, first=first, encoding=encoding)
    outcome = Outcome(len(files))
    for done in each_file(made, files, f"transcoding {split}", workers):
        outcome.before += done.before
        outcome.after += done.after
        if done.problem:
            outcome.problems[done.path] = done.problem
        elif done.psnr is not None:
            outcome.psnr[done.path] = done.psnr
    if len(outcome.problems) == len(files):
        path, why = next(iter(outcome.problems.items()))
        raise UserError(f"none of the {len(files)} videos can be written, such as {path}: {why}")
    listed = annotation_file(source, split, annotations, layout)
    if listed and listed.resolve().is_relative_to(source.resolve()):
        copy = target / listed.resolve().relative_to(source.resolve())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(listed, copy)
    return outcome


@dataclass(frozen=True)
class _Written:
    path: str
    problem: str = ""
    before: int = 0
    after: int = 0
    psnr: float | None = None


def _written(
    path: str, *, source: Path, target: Path, first: dict[Path, str], encoding: Encoding
) -> _Written:
    """Write a file below ``target``, unless it stands there already."""
    new = Path(path).with_suffix(".mp4")
    if new.is_absolute() or ".." in new.parts:
        return _Written(path, "lies outside of the folder of the videos")
    if first[new] != path:
        return _Written(path, f"would become {new}, as {first[new]} does: rename one")
    source, target, psnr, noted = source / path, target / new, None, ""
    try:
        if not source.is_file():
            raise VideoError("file is missing")
        status = source.stat()
        made_of = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        note = json.dumps({"revvideo transcode": 1, **asdict(encoding), **made_of})
        with suppress(OSError, av.error.FFmpegError), av.open(str(target)) as container:
            noted = container.metadata.get("comment", "")
        if noted != note:
            target.parent.mkdir(parents=True, exist_ok=True)
            with Video(source, whole=True) as video, replacing(target) as unfinished:
                psnr = _check(video, unfinished, _encode(video, unfinished, encoding, note))
        return _Written(path, "", status.st_size, target.stat().st_size, psnr)
    except VideoError as error:
        return _Written(path, str(error))
    except (OSError, av.error.FFmpegError) as error:
        return _Written(path, f"cannot be written ({error_line(error)})")


def _encode(video: Video, path: Path, encoding: Encoding, note: str) -> dict[int, np.ndarray]:
    """Write ``path``; give back some of the pictures that went into it, by their numbers."""
    step, shape = max(1, len(video) // _COMPARED), None
    compared: dict[int, np.ndarray] = {}
    unit = video.unit if video.unit.denominator <= _FINEST else Fraction(1, _FINEST)
    options, rate = encoding.options, video.rate
    with h264_writer(path, unit, options, rate=rate, threads=1, comment=note) as write:
        for number, picture in video.pictures(encoding.short_side):
            shape = shape or picture.shape
            if picture.shape != shape:
                raise VideoError("has frames of several sizes")
            if number % step == 0:
                compared[number] = picture
            write(picture, round(Fraction(video.timestamps[number]) / unit))
    return compared


def _check(video: Video, path: Path, compared: dict[int, np.ndarray]) -> float:
    """The PSNR of a file, in dB, all of whose frames come out of the decoder at their times."""
    with Video(path) as new:
        count = new.decode_all()
        if not len(video) == len(new) == count:
            raise VideoError(f"{count} of its {len(video)} frames could be written")
        if any(abs(a - b) > 1e-3 for a, b in zip(video.timestamps, new.timestamps, strict=True)):
            raise VideoError("its frames would be shown at other times")
        numbers = list(compared)
        frames = new.frames(numbers).permute(0, 2, 3, 1).numpy()
    height, width = frames.shape[1:3]
    given = np.stack([compared[number][:height, :width] for number in numbers])
    errors = frames.astype(np.float64) - given
    with np.errstate(divide="ignore"):
        psnr = 10 * np.log10(255**2 / np.square(errors).mean())
    return round(min(float(psnr), _BEST_PSNR), 2)
