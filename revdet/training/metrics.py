"""``metrics.json``: a line of JSON for each iteration that something is known about."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage

from backbones.common.files import cut_lines


class MetricsWriter(EventWriter):
    """Append to ``metrics.json`` what is new since the last write, one line for each iteration.

    Values of single iterations, where Detectron2's own writer has running medians. It may write
    twice in an iteration, and so both before a checkpoint is saved and after an evaluation: no
    line is missing when a run resumes from that checkpoint.

    Args:
        path: the file. What an interrupted run logged from ``start_iter`` on is dropped, since it
            will be logged again.
        start_iter: the first iteration of this run.
    """

    def __init__(self, path: Path, start_iter: int) -> None:
        cut_lines(path, lambda line: json.loads(line)["iteration"] < start_iter)
        self._file = path.open("a", encoding="utf-8")
        self._written: dict[str, int] = {}

    def write(self) -> None:
        """Write the scalars that have been put into the event storage since the last call."""
        lines: dict[int, dict[str, float]] = {}
        for key, (value, iteration) in get_event_storage().latest().items():
            if self._written.get(key) != iteration:
                self._written[key] = iteration
                lines.setdefault(iteration, {})[key] = value
        for iteration in sorted(lines):
            line = {**lines[iteration], "iteration": iteration}
            self._file.write(json.dumps(line, sort_keys=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.json``, without the last one if a kill has cut it off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
