"""Write a set of videos again so that it decodes fast: what a training run reads many times.

    python -m revvideo.transcode kinetics400 kinetics400_256
    python -m revvideo.transcode kinetics400 fast --split train --annotations k400/train.csv
    python revvideo/run.py --config configs/video/….yaml data.root=kinetics400_256

H.264 in mp4 files at the same places below DEST: a keyframe every 16 frames, three of four frames
such as need not be decoded for others, entropy coding that is quick to read. Frames are upright,
shrunk to the short side that training decodes to, and shown when they were. Sound is dropped. A
list of files that lies in DATA comes along; one from elsewhere names files of DEST too.

Files are written in parallel. A file stands under its name only when it is whole, its frames have
been counted, and some of them compared with those that they come from; what stands there already,
from the same file and with the same options, is left, so that an interrupted command goes on where
it was. At the end it says what it cost: bytes, and the peak signal-to-noise ratio (PSNR).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by path: this folder came first, where `models`, `data`, … hide others'
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

import argparse
from collections.abc import Sequence

from backbones.common import console
from backbones.common.errors import UserError, extra
from revvideo.data.layouts import splits_of


def main(argv: Sequence[str] | None = None) -> int:
    """Transcode, print what it cost and what was unreadable; status 2 for what the user can fix."""
    parser = console.make_parser("python -m revvideo.transcode", __doc__)
    add, positive, not_negative = parser.add_argument, console.positive, console.not_negative
    add("data", type=Path, metavar="DATA", help="folder of a set of videos")
    add("to", type=Path, metavar="DEST", help="folder to write to")
    add("--split", nargs="+", help="train, val, ... (those of train, val and test that are there)")
    add("--annotations", type=Path, help="list or csv of one split")
    add("--layout", choices=("auto", "folders", "list", "csv"), default="auto", help="(auto)")
    add("--short-side", type=positive, default=256, help="pixels; smaller videos stay (256)")
    add("--crf", type=not_negative, default=23, help="quality: less is better and larger (23)")
    add("--keyframes", type=positive, default=16, help="frames from one to the next (16)")
    add("--workers", type=not_negative, help="processes (one per core)")
    return console.run_command(parser, _transcode_all, argv)


def _transcode_all(options: argparse.Namespace) -> None:
    if options.annotations and len(options.split or ()) != 1:
        raise UserError("--annotations goes with one --split")
    with extra("video"):
        from revvideo.data.transcode import Encoding, transcode  # late: --help needs none of it
    encoding = Encoding(options.short_side, options.crf, options.keyframes)
    unreadable: dict[str, str] = {}
    how = {name: getattr(options, name) for name in ("annotations", "layout", "workers")}
    for split in options.split or splits_of(options.data):
        outcome = transcode(options.data, options.to, split, encoding, **how)
        print(f"{options.data}, {split}: {outcome}")
        unreadable |= outcome.problems
    console.name_unreadable(unreadable, None)
    print(f"train on them with data.root={options.to}")


if __name__ == "__main__":
    sys.exit(main())
