"""A few cases of each kind of broken input; ``python -m tests.fuzz`` runs as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forked
from tests.fuzz.__main__ import KINDS, main


@pytest.mark.parametrize("kind", KINDS)
def test_broken_input_is_taken_or_refused(kind: str, tmp_path: Path) -> None:
    # It forks for each case, which this process cannot once autograd has threads in it.
    count, log = 4 if kind == "coco" else 12, tmp_path / "log.txt"
    process = forked.start(main, [kind, "--seed", "1", "--count", str(count)], log)
    process.join(timeout=240)
    process.kill()
    assert process.exitcode == 0, log.read_text()
