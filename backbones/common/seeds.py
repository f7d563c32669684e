"""Seeds that are a function of where a run is: a resumed one draws what a whole one does."""

from __future__ import annotations


def seed_of(*key: int) -> int:
    """A 32-bit seed that depends on every number of ``key``, all of them >= 0. Needs NumPy."""
    from numpy.random import SeedSequence

    return int(SeedSequence(key).generate_state(1)[0])
