"""The one way in which all benchmarks measure, and write down what they measured.

Speed: training steps (forward and backward pass) of all contestants in turn, A B C A B C, in one
process, on the same parameters and input, two steps a turn, of which the second counts. A
contestant's result is the median over the rounds of its throughput relative to the baseline's in
the same round, so that what else the machine does weighs on both alike; beside it the quartiles.
Memory: on a GPU the allocator's peak during a step above what parameters, gradients and input take;
elsewhere the bytes that are held between forward and backward pass.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones.common.console import make_parser
from backbones.memory.counting import Counter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Json = dict[str, Any]


def device_name(device: torch.device) -> str:
    """The name of the hardware behind ``device``, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return found[1].strip()
    return platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """The name of the hardware as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def command_of(module: str, argv: Sequence[str] | None) -> str:
    """What a user types to measure the same again."""
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", "-m", f"benchmarks.{module}", *arguments])


def facts(module: str, argv: Sequence[str] | None, device: torch.device) -> Json:
    """What every file of results begins with: command, hardware, versions, date."""
    found: Json = {
        "command": command_of(module, argv),
        "device": device.type,
        "device_name": device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    else:
        found["device_gib"] = round(torch.cuda.mem_get_info(device)[1] / 2**30, 1)
    return found


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A command line whose help begins with the text of the module."""
    return make_parser(f"python -m benchmarks.{module}", doc)


def sharing(model: nn.Module) -> nn.Module:
    """Another model with the same parameters: not equal ones, the very same."""
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


class Trainer:
    """Forward and backward passes of models that share their parameters, on one random input.

    Args:
        shape: of the input.
        device: where the models are.
        autocast: the dtype of autocast in the forward pass, or None.
        clock: in seconds; for one thread that of the processor, which other programs do not slow.
    """

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device,
        autocast: torch.dtype | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.device = device
        self.autocast = autocast
        self.x = torch.randn(*shape, device=device)

    def forward(self, model: nn.Module) -> Tensor:
        """The loss."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return model(self.x).float().square().mean()

    def seconds(self, model: nn.Module) -> float:
        """Time of one forward and backward pass."""
        model.zero_grad(set_to_none=True)
        self._wait()
        start = self.clock()
        torch.autograd.backward(self.forward(model))
        self._wait()
        return self.clock() - start

    def held(self, model: nn.Module) -> int:
        """Bytes that a forward pass makes and that are alive after it, whoever holds them."""
        counter = Counter(["there", "made"], FakeTensorMode())
        for tensor in (self.x, *model.parameters(), *model.buffers()):
            counter.add(tensor)
        counter.part = "made"
        with counter:
            loss = self.forward(model)
        return counter.live["made"] - loss.nbytes

    def peak(self, model: nn.Module) -> int | None:
        """The allocator's peak above what is there anyway, in bytes; None: out of memory."""
        try:
            torch.autograd.backward(self.forward(model))  # makes gradients, kernels' workspaces
            self._wait()
            torch.cuda.reset_peak_memory_stats(self.device)
            there = torch.cuda.memory_allocated(self.device)
            torch.autograd.backward(self.forward(model))
            self._wait()
            return torch.cuda.max_memory_allocated(self.device) - there
        except torch.cuda.OutOfMemoryError:
            return None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def alternate(
    steps: Mapping[str, Callable[[], float]], baseline: str, rounds: int
) -> dict[str, Json]:
    """Time all contestants in turn.

    In each of its turns a contestant runs two steps, of which the second counts: the first finds
    the memory as the contestant before has left it, which on a CPU alone makes 5% of difference.
    Compilation happens in the first, too.

    Args:
        steps: for each name what runs one step and returns its seconds.
        baseline: the name that the others' throughput is relative to.
        rounds: how often each has its turn, at least 2.

    Returns:
        for each name ``seconds``, the median; ``throughput``, the median ratio to the baseline;
        ``quartiles`` of that ratio.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(1, rounds + 1):
        for name, step in steps.items():
            step()
            times[name].append(step())
        if rounds <= 10 or done % 10 == 0:
            say(f"  round {done} of {rounds}")
    results: dict[str, Json] = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times[baseline], seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        results[name] = {
            "seconds": round(statistics.median(seconds), 5),
            "throughput": round(statistics.median(ratios), 4),
            "quartiles": [round(low, 4), round(high, 4)],
        }
    return results
