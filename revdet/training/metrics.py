"""``metrics.json``: a line of JSON for each iteration that something is known about."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage

from backbones.common.files import cut_lines, set_aside

logger = logging.getLogger("revdet")
Scalars = dict[str, float]


class ScalarWriter(EventWriter):
    """Hands the new scalars of each iteration, and its number, to ``log``; ``close`` ends that."""

    def __init__(self, log: Callable[[Scalars, int], Any], close: Callable[[], Any]) -> None:
        self._log, self.close = log, close
        self._known: dict[str, int] = {}

    def write(self) -> None:
        """Hand on what has been put into the event storage since the last call."""
        new: dict[int, Scalars] = {}
        for key, (value, iteration) in get_event_storage().latest().items():
            if self._known.get(key) != iteration:
                self._known[key] = iteration
                new.setdefault(iteration, {})[key] = value
        for iteration, values in sorted(new.items()):
            self._log(values, iteration)


class MetricsWriter(ScalarWriter):
    """Append to ``metrics.json`` what is new since the last write, one line for each iteration.

    Values of single iterations, where Detectron2's own writer has running medians. It may write
    twice in an iteration, and so both before a checkpoint is saved and after an evaluation: no
    line is missing when a run resumes from that checkpoint. What an interrupted run logged from
    ``start_iter`` on, the first iteration of this one, is dropped: it will be logged again.
    """

    def __init__(self, path: Path, start_iter: int) -> None:
        try:
            cut_lines(path, lambda line: json.loads(line)["iteration"] < start_iter)
        except (KeyError, TypeError, ValueError):
            aside = set_aside(path)
            logger.warning(f"{path} is damaged: it is {aside} now, what can be read is kept")
            rows = [row for row in read_metrics(aside) if row["iteration"] < start_iter]
            path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")
        super().__init__(self._append, self._file.close)

    def _append(self, values: Scalars, iteration: int) -> None:
        line = json.dumps({**values, "iteration": iteration}, sort_keys=True)
        self._file.write(f"{line}\n")
        self._file.flush()


def read_metrics(path: Path) -> list[Scalars]:
    """The lines of a ``metrics.json``, without those that a kill or a bad disk has spoilt."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with suppress(ValueError):
            row = json.loads(line if line.endswith("\n") else "")
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                rows.append(row)
    return rows
