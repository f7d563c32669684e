"""Broken input of several kinds, through the project's own functions; from the project's root:

    python -m tests.fuzz videos|images|coco|configs|checkpoints [--count N] [--seed N]

Each case changes a good file at random, the same ones for the same seed, and runs in a forked child
with a watchdog and a limit on its memory. It may be taken, or refused by an error of the project.
Each new kind of failure is printed once; exits with 1 after a traceback, a crash, a hang, code that
the file brought along, or more memory than the limit.

A kind is a class with ``case(random, path) -> function``: it writes a case to ``path`` and returns
what to do with it, which returns nothing or a refusal. Add it to ``KINDS``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.coco import Coco
from tests.fuzz.configs import Configs
from tests.fuzz.media import Images, Videos
from tests.fuzz.running import in_child

OK = ("ok", "refused")
KINDS = {
    "videos": Videos,
    "images": Images,
    "coco": Coco,
    "configs": Configs,
    "checkpoints": Checkpoints,
}


def fuzz(name: str, count: int, seed: int) -> dict[str, str]:
    """Run ``count`` cases of a kind; the failures, the first case of each."""
    import torch
    from PIL import Image

    import revdet.config  # noqa: F401  here, so that the children need not import it

    Image.init()
    torch.set_num_threads(1)
    failures: dict[str, str] = {}
    counts: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.chdir(folder):
            warnings.simplefilter("ignore")
            kind: Any = KINDS[name](folder)
            mark = getattr(kind, "mark", folder / "executed")
            for number in range(count):
                work = kind.case(random.Random(f"{seed} {number}"), folder / str(number))
                outcome, text = in_child(work)
                if mark.exists():
                    outcome, text = "code", "what the file brought along was executed"
                    mark.rmdir()
                counts[outcome] += 1
                if outcome not in OK:
                    failures.setdefault(
                        f"{outcome} {text.split(': ')[0]}", f"case {number}: {text}"
                    )
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)
    figures = ", ".join(f"{outcome} {number}" for outcome, number in sorted(counts.items()))
    print(f"{name}: {count} cases of seed {seed}: {figures}")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    failures = fuzz(args.kind, args.count, args.seed)
    for kind, first in failures.items():
        print(f"{kind}, {first}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
