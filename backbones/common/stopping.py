"""SIGTERM and Ctrl-C: the work at hand is finished and saved, then the command ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A command has been told to stop. Not an error, so nobody logs its traceback."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(number, message)
        self.number, self.message = number, message
        self.status = 128 + number  # of a process that the signal ends: 130, or 143 for SIGTERM

    def __str__(self) -> str:
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return f"stopped by {name}" + (f": {self.message}" if self.message else "")


class _Asked:
    """What the handlers know: the first signal, and whether somebody will look for it."""

    number = 0
    waits = False
    handler: Callable[[int, FrameType | None], None] | None = None


def asked_to_stop() -> int:
    """The number of the signal that has come; 0 if none has."""
    return _Asked.number


@contextmanager
def stoppable() -> Iterator[None]:
    """A command: a signal raises :class:`Stopped` where it runs; a second one ends it at once.

    It is passed on to the processes that this one has started, where they have not heard it.
    """

    owner = os.getpid()

    def handle(number: int, _frame: FrameType | None) -> None:
        forked = os.getpid() != owner  # a worker, which its parent ends
        if forked and number == signal.SIGINT:
            return
        if forked or _Asked.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _Asked.number = number
        if number == signal.SIGTERM:  # Ctrl-C goes to all processes of a terminal by itself
            for child in multiprocessing.active_children():
                if child.pid is not None and not child.daemon:
                    os.kill(child.pid, number)
        if not _Asked.waits:
            raise Stopped(number)

    try:
        before = {number: signal.signal(number, handle) for number in _SIGNALS}
    except ValueError:  # not in the main thread, which is the only one that signals interrupt
        before = {}
    _Asked.number, _Asked.handler = 0, handle if before else None
    try:
        yield
    finally:
        _Asked.handler = None
        for number, handler in before.items():
            signal.signal(number, handler)


def listen_again() -> None:
    """Within :func:`stoppable`: hear the signals also where a library has begun to."""
    if _Asked.handler is not None:
        for number in _SIGNALS:
            signal.signal(number, _Asked.handler)


@contextmanager
def step_by_step(patient: bool = True) -> Iterator[None]:
    """A part of a command that looks at :func:`asked_to_stop` itself, after each of its steps.

    With ``patient=False``, a part of such a part that signals do interrupt.
    """
    before, _Asked.waits = _Asked.waits, patient
    try:
        if not patient and _Asked.number:
            raise Stopped(_Asked.number)
        yield
    finally:
        _Asked.waits = before
