"""Overrides, run files and recipes with values that do not belong there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.running import RECIPE, TINY, damaged

VALUES = [
    "-1",
    "0",
    "1e308",
    "nan",
    "inf",
    "''",
    "null",
    "[]",
    "{}",
    "true",
    "999999999999999999999",
    "abc",
    "[1,2]",
    "{a:1}",
    "${train.seed}",
    "${nope}",
    "${oc.env:HOME}",
    "${oc.decode:1}",
    "1e-30",
    "0.5",
    "a,b",
    "'",
    '"',
    "[",
    "{",
    "é",
    "\x00",
    "/dev/null",
    "..",
    "1e400",
    "==",
]
KEYS = [
    "train.init_checkpoint",
    "train.max_iter",
    "train.seed",
    "train.device",
    "train.memory",
    "train.accumulate",
    "train.memory_budget",
    "train.stored_blocks",
    "train.clip_grad_norm",
    "train.ema_decay",
    "train.eval_period",
    "train.amp.dtype",
    "train.checkpointer.period",
    "train.output_dir",
    "optimizer.lr",
    "dataset.train_json",
    "optimizer.weight_decay",
    "model.backbone.net.model.depth",
    "model.backbone.net.model.name",
    "train",
    "..",
    "x",
    "dataset.skip_broken",
    "dataloader.train.total_batch_size",
    "lr_multiplier.warmup_length",
    "nope.x",
]


class Configs:
    """Overrides, and the config.yaml of a run, with code in it at times."""

    def __init__(self, folder: Path) -> None:
        from detectron2.config import LazyConfig

        from revdet.config import load_config

        self.mark, saved = folder / "executed", folder / "saved.yaml"
        LazyConfig.save(load_config(RECIPE, TINY), str(saved))
        self.saved = saved.read_bytes()

    def case(self, rnd: random.Random, path: Path) -> Callable[[], Any]:
        if rnd.random() < 0.5:
            given = [f"{rnd.choice(KEYS)}={rnd.choice(VALUES)}" for _ in range(rnd.choice([1, 2]))]
            return lambda: self.load(RECIPE, [*TINY, *given])
        path = path.with_suffix(".yaml")
        lines = self.saved.split(b"\n")
        at = rnd.randrange(len(lines))
        evil = f"zz: !!python/object/apply:os.mkdir ['{self.mark}']"
        target = f"zz: {{_target_: os.mkdir, path: '{self.mark}'}}"
        more = [evil, target, "zz: " + "[" * 2000, "zz: ${oc.env:HOME}", "train: 5", "- a", "\t"]
        lines.insert(rnd.choice([at, len(lines)]), rnd.choice(more).encode())
        path.write_bytes(rnd.choice([b"\n".join(lines), damaged(self.saved, rnd)]))
        return lambda: self.load(str(path), TINY)

    def load(self, path: str, overrides: list[str]) -> None:
        from revdet.config import load_config

        load_config(path, overrides)
