"""What holds for every test: one thread, and a known seed.

Whole runs are compared bit by bit, in this process and in others, and sums are not the same to the
last bit with another number of threads. So there is one everywhere, whatever the environment says:
the variables are set before torch is imported, and the processes that tests start inherit them.
(The tensors here are so small that a second thread would only cost time.)
"""

from __future__ import annotations

import os

# MKL's own variable goes before OpenMP's.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.get_num_threads() == 1, "the tests after this one would have more threads"
