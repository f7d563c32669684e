"""A few cases of each kind of broken input; ``python -m tests.fuzz`` runs as many as one likes."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import KINDS, fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_broken_input_is_taken_or_refused(kind: str) -> None:
    assert fuzz(kind, count=4 if kind == "coco" else 12, seed=1) == {}
