"""The surroundings of a run that will be repeated: autocast, random generators, who looks on.

When a block runs its branches again in the backward pass, the user has left the ``torch.autocast``
region and the random generators have moved on.
"""

from __future__ import annotations

import gc
import random
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_FAKE = torch._C._TorchDispatchModeKey.FAKE

# What takes the state of a random generator, and what puts it.
_Access = tuple[Callable[[], Any], Callable[[Any], object]]


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


class _Generators:
    """The states now of random generators."""

    def __init__(self, generators: Iterable[_Access]) -> None:
        self._generators = [*generators]
        self._states = [take() for take, _ in self._generators]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A context that draws the same numbers, and leaves the generators as it found them."""
        found = _Generators(self._generators)
        try:
            self._put()
            yield
        finally:
            found._put()

    def _put(self) -> None:
        for (_, put), state in zip(self._generators, self._states, strict=True):
            put(state)


class RandomState(_Generators):
    """The states now of the default generators that a computation on ``device`` may draw from."""

    def __init__(self, device: torch.device) -> None:
        generators: list[_Access] = []
        # Under a fake mode, nothing is drawn of shapes alone.
        if torch._C._get_dispatch_mode(_FAKE) is None:
            generators.append((torch.get_rng_state, torch.set_rng_state))
            if device.type not in ("cpu", "meta"):
                module = torch.get_device_module(device)
                # A fake tensor may say that it is on a GPU where there is none.
                if getattr(module, "is_initialized", lambda: True)():
                    put = partial(module.set_rng_state, device=device)
                    generators.append((partial(module.get_rng_state, device), put))
        super().__init__(generators)

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        return all(map(torch.equal, self._states, other._states))


class OtherRandom(_Generators):
    """The states of generators that torch's own state does not cover: Python's, NumPy's if it is in
    use, and ``own`` ones that a module holds or gets from outside."""

    def __init__(self, own: Iterable[torch.Generator] = ()) -> None:
        generators: list[_Access] = [(random.getstate, random.setstate)]
        if (numpy := sys.modules.get("numpy")) is not None:
            generators.append((numpy.random.get_state, numpy.random.set_state))
        super().__init__(generators)
        self.add((each, each.get_state()) for each in own)

    def add(self, own: Iterable[tuple[torch.Generator, Tensor]]) -> None:
        """Have the states of more generators, taken by somebody else."""
        for generator, state in own:
            self._generators.append((generator.get_state, generator.set_state))
            self._states.append(state)

    def moved(self) -> bool:
        """Whether Python's or NumPy's generator was drawn from since, asked before others come."""
        pairs = zip(self._generators, self._states, strict=True)
        return any(str(take()) != str(before) for (take, _), before in pairs)


class Observer(TorchFunctionMode):
    """Sees which tensors and generators the functions of torch are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[Tensor] = []  # trained tensors that others have computed
        # With their states before they were drawn from.
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
