"""Open every file of a set of videos, and write down which can be used and why the others cannot.

    python -m revvideo.scan datasets/motion                        # all splits that are there
    python -m revvideo.scan kinetics400 --split train val
    python -m revvideo.scan kinetics400 --split val --annotations k400/validate.csv
    python -m revvideo.scan UCF-101 --split train --annotations trainlist01.txt --layout folders

Files are opened in parallel. Each must hold at least two frames and not be cut off, and its first
frame must decode; with `--deep` all of them. The result, a CSV file, is `DATA/manifest_SPLIT.csv`
or `--output`; where there is one already, only files that have changed since, or could not be used,
are opened again. An interrupted scan goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by path: this folder came first, where `models`, `data`, … hide others'
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

import argparse
from collections.abc import Sequence
from typing import get_args

from backbones.common.console import make_parser, not_negative, run_command
from backbones.common.errors import UserError, extra
from revvideo.data.layouts import Layout, splits_of
from revvideo.data.manifest import default_manifest, describe


def main(argv: Sequence[str] | None = None) -> int:
    """Scan, write manifests, print what cannot be used; status 2 for what the user can fix."""
    parser = make_parser("python -m revvideo.scan", __doc__)
    add = parser.add_argument
    add("data", nargs="+", type=Path, metavar="DATA", help="folder of a set of videos")
    add("--split", nargs="+", help="train, val, ... (those of train, val and test that are there)")
    add("--annotations", type=Path, help="list or csv of one split")
    add("--layout", choices=get_args(Layout), default="auto", help="how the files lie (auto)")
    add("--workers", type=not_negative, help="processes that open files (one per core)")
    add("--deep", action="store_true", help="decode every frame of every file")
    add("--output", type=Path, help="manifest of one split (DATA/manifest_SPLIT.csv)")
    return run_command(parser, _scan_all, argv)


def _scan_all(options: argparse.Namespace) -> None:
    one = len(options.data) == 1 and len(options.split or ()) == 1
    if not one and (options.annotations or options.output):
        raise UserError("--annotations and --output go with one DATA and one --split")
    how = {name: getattr(options, name) for name in ("annotations", "layout", "workers", "deep")}
    with extra("video"):
        from revvideo.data.scan import scan  # late: --help needs none of it
    for root in options.data:
        classes = None
        for split in options.split or splits_of(root):
            path = options.output or default_manifest(root, split)
            manifest = scan(root, split, classes=classes, manifest_path=path, **how)
            classes = manifest.classes  # those of the first split, which is the training set
            print(f"{root}, {split}: {describe(manifest)}\nwrote {path}")


if __name__ == "__main__":
    sys.exit(main())
