"""The surroundings of a run that will be repeated: autocast, random generators, who looks on.

When a block runs its branches again in the backward pass, the user has left the ``torch.autocast``
region and the random generators have moved on.
"""

from __future__ import annotations

import gc
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_FAKE = torch._C._TorchDispatchModeKey.FAKE


def only_plain() -> bool:
    """Whether someone transforms or records what runs now, and needs to see plain operations.

    ``torch.compile``, ``torch.jit.trace``, ``torch.func`` and forward-mode differentiation make
    their own choice of what is kept.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


class AutocastState:
    """Whether autocast is on now for a type of device, and to which dtype."""

    def __init__(self, device: torch.device) -> None:
        self._type = device.type
        known = torch.amp.is_autocast_available(device.type)
        self.enabled = known and torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type) if known else None

    def restored(self) -> AbstractContextManager[object]:
        """A context in which this state is in force, without autocast's weight cache.

        Without the cache, because a cast weight kept from a pass without grad has no way back to
        its parameter, and one kept from the second run serves nobody.
        """
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(
            self._type, dtype=self._dtype, enabled=self.enabled, cache_enabled=False
        )


class RandomState:
    """The states now of the default generators that a computation on ``device`` may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: list[Tensor] = []
        if torch._C._get_dispatch_mode(_FAKE) is not None:
            return  # nothing is drawn of shapes alone
        self._states.append(torch.get_rng_state())
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            # A fake tensor may say that it is on a GPU where there is none.
            if getattr(module, "is_initialized", lambda: True)():
                self._states.append(module.get_rng_state(device))

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        return all(map(torch.equal, self._states, other._states))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A context that draws the same numbers, and leaves the generators as it found them."""
        found = RandomState(self._device)
        try:
            self._set()
            yield
        finally:
            found._set()

    def _set(self) -> None:
        for index, state in enumerate(self._states):
            if index == 0:
                torch.set_rng_state(state)
            else:
                torch.get_device_module(self._device).set_rng_state(state, self._device)


class OtherRandom:
    """The states of generators that torch's own state does not cover, ``own`` ones among them, that
    a module holds or gets from outside."""

    def __init__(self, own: Sequence[torch.Generator] = ()) -> None:
        self._own = [(generator, generator.get_state()) for generator in own]
        self._global = [(put, take()) for take, put in _global_generators()]

    def add(self, own: Sequence[tuple[torch.Generator, Tensor]]) -> None:
        """Have the states of more generators, taken by somebody else."""
        self._own += own

    def moved(self) -> bool:
        """Whether Python's or NumPy's global generator was drawn from since."""
        now = [take() for take, _ in _global_generators()]
        return any(
            str(before) != str(after) for (_, before), after in zip(self._global, now, strict=False)
        )

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A context that draws the same numbers, and leaves the generators as it found them."""
        now = OtherRandom([generator for generator, _ in self._own])
        self._restore()
        try:
            yield
        finally:
            now._restore()

    def _restore(self) -> None:
        for generator, state in self._own:
            generator.set_state(state)
        for put, state in self._global:
            put(state)


def _global_generators() -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How to take and to put the state of Python's generator, and of NumPy's if it is in use."""
    found: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
        (random.getstate, random.setstate)
    ]
    if (numpy := sys.modules.get("numpy")) is not None:
        found.append((numpy.random.get_state, numpy.random.set_state))
    return found


class Observer(TorchFunctionMode):
    """Sees which tensors and generators the functions of torch are called with.

    Attributes:
        computed: trained tensors that others have computed; only those that are not made here
            matter, see :meth:`find`.
        generators: with their states before they were drawn from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[Tensor] = []
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        self.start = 0  # number of the first autograd node that is made here, for the input
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                if (node := value.grad_fn) is not None and node._sequence_nr() < self.start:
                    self.computed.append(value)
            elif isinstance(value, torch.Generator) and all(
                value is not known for known, _ in self.generators
            ):
                self.generators.append((value, value.get_state()))
        out = func(*args, **kwargs)
        made = [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ()
        self._made += [weakref.ref(tensor) for tensor in made if isinstance(tensor, Tensor)]
        return out

    def left(self) -> bool:
        """Whether somebody holds what was computed here with a graph, as for a loss on it."""
        if self._has_left():
            gc.collect()  # a cycle of references is nobody
        return self._has_left()

    def _has_left(self) -> bool:
        made = [tensor for ref in self._made if (tensor := ref()) is not None]
        return any((n := t.grad_fn) is not None and n._sequence_nr() > self.start for t in made)

    def find(self, node: Any, output: int) -> Tensor | None:
        """The tensor that is a certain output of a node of autograd, if it was seen."""
        same = (t for t in self.computed if t.grad_fn is node and t.output_nr == output)
        return next(same, None)
