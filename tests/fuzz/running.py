"""A case in a forked child, with a watchdog and a limit on its memory; and what cases share."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs/detection/demo/mask_rcnn_rev_vit_demo.py")
SECONDS, MEGABYTES = 30, 900  # of a case; memory above what the process has before
TINY = [
    "model.backbone.net.model.embed_dim=24",
    "model.backbone.net.model.depth=1",
    "model.backbone.net.model.img_size=64",
    "model.backbone.square_pad=64",
    "dataloader.train.num_workers=0",
    "train.device=cpu",
    "train.pictures=1",
]


def outcome_of(work: Callable[[], Any]) -> tuple[str, str]:
    """How a case ends in this process; a text that it returns is a refusal."""
    try:
        said = work()
        return ("refused", said) if isinstance(said, str) else ("ok", "")
    except SystemExit as error:
        return "refused", f"exit {error.code}"
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:
        owners = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
        if owners & {"backbones", "revdet", "revvideo"}:
            return ("refused" if "\n" not in str(error).strip() else "many lines"), str(error)
        if isinstance(error, ValueError | OSError) and _by_library(error):
            return "refused", str(error)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename.startswith(str(ROOT)) and ".venv" not in f.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        return "traceback", f"{type(error).__name__} at {where}: {str(error)[:150]}"


def _by_library(error: BaseException) -> bool:
    """Raised by backbones itself, whose public functions refuse with a plain ValueError."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(f"{ROOT}/backbones")


def in_child(work: Callable[[], Any]) -> tuple[str, str]:
    """:func:`outcome_of` in a forked child, or what ended that."""
    read, write = os.pipe()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if not (child := os.fork()):
        os.close(read)
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (6 << 30),) * 2)
        kind, text = outcome_of(work)
        os.write(write, json.dumps([kind, text[:2000]]).encode())
        os._exit(0)
    os.close(write)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - begun > SECONDS:
            with contextlib.suppress(OSError):
                os.killpg(child, signal.SIGKILL)
            os.wait4(child, 0)
            os.close(read)
            return "hang", f"not done after {SECONDS} s"
        time.sleep(0.01)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    if not data:
        return "crash", f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no word"
    if (more := (usage.ru_maxrss - before) // 1024) > MEGABYTES:
        return "memory", f"{more} MB more"
    kind, text = json.loads(data)
    return kind, text


def damaged(raw: bytes, rnd: random.Random) -> bytes:
    """A file with a part flipped, cut off, zeroed or doubled."""
    data, length = bytearray(raw), len(raw)
    match rnd.choice(["flip", "head", "cut", "zero", "twice"]):
        case "flip" | "head" as where:
            for _ in range(rnd.choice([1, 10, 100])):
                data[rnd.randrange(min(length, 200) if where == "head" else length)] ^= (
                    1 << rnd.randrange(8)
                )
        case "cut":
            del data[rnd.randrange(length) :]
        case "zero":
            at, size = rnd.randrange(length), rnd.choice([50, 1000, length // 3])
            data[at : at + size] = bytes(len(data[at : at + size]))
        case "twice":
            at = rnd.randrange(length)
            data[at:at] = data[at : at + 500]
    return bytes(data)
