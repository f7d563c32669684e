"""What a module is when it runs, so that a second run can see the same.

Between the two runs of a block anything may happen to its modules: ``model.eval()``, other weights
in functional calls, a counter that counts. A :class:`ModuleState` notes what the first run sees.
The second gets the module itself if it still is as it was, and else a copy of its objects that is.
The module is never changed, so other threads may use it meanwhile.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _every
from torch.nn.utils import parametrize

from backbones.engine.ambient import Observer, OtherRandom


class Layout:
    """What a module is made of: compared before each run, which has to be quick.

    It knows of every part, the module first, its type and ``__dict__``, and keeps none alive.
    """

    def __init__(self, module: nn.Module) -> None:
        parts, self._number = [module], {id(module): 0}
        for part in parts:
            for child in part._modules.values():
                if child is not None and id(child) not in self._number:
                    self._number[id(child)] = len(parts)
                    parts.append(child)
        self.types = [type(part) for part in parts]
        self.owns = [vars(part) for part in parts]
        self.places = self._all("_parameters")
        self.params = [*{id(param): param for _, _, param in self.places}.values()]  # each once
        self.buffers = self._all("_buffers")
        hooked = [bool(part._forward_hooks or part._forward_pre_hooks) for part in parts]
        self.hooked, self.hooked_inside = any(hooked), any(hooked[1:])
        self._were = [dict(own) for own in self.owns]
        self._children = [dict(part._modules) for part in parts]
        self._inside = [
            (own, [*own.values()], [*part._modules.values()], [*part._parameters.values()])
            for own, part in zip(self.owns, parts, strict=True)
        ]

    def _all(self, kind: str) -> list[tuple[int, str, Tensor]]:
        """Of the parameters or buffers each with the number of its part, and its name there."""
        return [
            (number, name, tensor)
            for number, own in enumerate(self.owns)
            for name, tensor in own[kind].items()
            if tensor is not None
        ]

    def holds(self) -> bool:
        """Whether the module still is made of these very objects, without hooks."""
        try:
            for own, attributes, children, params in self._inside:
                if [*own.values()] != attributes or [*own["_modules"].values()] != children:
                    return False
                if len(now := own["_parameters"]) != len(params):
                    return False
                if params and not all(map(is_, now.values(), params)):
                    return False
                if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                    return False
        except (RuntimeError, ValueError):  # an array in the place of another: there is no "equal"
            return False
        return all(self.buffer(number, name) is buffer for number, name, buffer in self.buffers)

    def buffer(self, number: int, name: str) -> Tensor | None:
        """What is in the place of a buffer now."""
        found: Tensor | None = self.owns[number]["_buffers"].get(name)
        return found

    def copy(self, before: Mapping[int, dict[str, Any]], params: Mapping[int, Tensor]) -> nn.Module:
        """The module as it was, as objects of its own; a RuntimeError if a part is a ScriptModule.

        ``before`` has by its number what else the attributes of a part were, ``params`` by their
        ``id`` what stands in the place of parameters.
        """
        if any(issubclass(kind, torch.jit.ScriptModule) for kind in self.types):
            raise RuntimeError(
                f"{self.types[0].__name__} is not as it was in the forward pass, or has hooks on "
                "its parameters, and a ScriptModule in it cannot be copied: choose 'store'"
            )
        twins: list[nn.Module] = [object.__new__(kind) for kind in self.types]
        for number, twin in enumerate(twins):
            own = vars(twin)
            own.update(before.get(number) or self._were[number])
            own["_parameters"] = dict.fromkeys(self._were[number]["_parameters"])
            own["_buffers"] = dict(own["_buffers"])
            own["_modules"] = {
                name: None if child is None else twins[self._number[id(child)]]
                for name, child in self._children[number].items()
            }
            own["_compiled_call_impl"] = None  # it would run the original
            # Hooks that have come since; a module that had some is not run twice.
            own["_forward_hooks"], own["_forward_pre_hooks"] = OrderedDict(), OrderedDict()
        for number, name, param in self.places:
            tensor: Any = params.get(id(param), param)
            twins[number]._parameters[name] = tensor
        for number, name, buffer in self.buffers:
            kept = before.get(number, {}).get("_buffers", {}).get(name)
            twins[number]._buffers[name] = buffer if kept is None else kept.clone()
        return twins[0]


@dataclass
class Facts:
    """What an observed run has shown about a module; true while its layout holds."""

    closed: bool  # all of its code is torch's or this package's, and uses nothing else
    stateful: list[int]  # numbers of its parts that a run changes: counters, caches, statistics
    generators: list[torch.Generator]  # random ones of its own
    other_random: bool  # it draws from Python's or NumPy's generator
    captured: list[Tensor] | None = None  # trained leaves, not its own; None: not looked for
    volatile: bool = False  # it uses trained tensors that others compute, anew for each step


# By module. Not an attribute of it, which would be copied and pickled along.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Layout, Facts]] = WeakKeyDictionary()

_APART = ("_parameters", "_modules")
SELF_CONTAINED = {"torch", "backbones"}  # packages whose modules use what they own, nothing else


@contextmanager
def known_as_before(module: nn.Module) -> Iterator[None]:
    """A context in which attributes change that mean nothing to what the module computes."""
    known = _KNOWN.get(module)
    holds = known is not None and known[0].holds()
    yield
    if known is not None and holds:
        _KNOWN[module] = Layout(module), known[1]


class ModuleState:
    """A module as it is now."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.facts: Facts | None = None  # from a run before; None: it has to be observed
        self.other_random: OtherRandom | None = None  # beside torch's own, if it draws from some
        self._before: dict[int, dict[str, Any]] = {}
        known = _KNOWN.get(module)
        # Within parametrize.cached(), weights are made by whoever comes first.
        if known is None or parametrize._cache_enabled or not known[0].holds():
            self.layout = Layout(module)
        else:
            self.layout, self.facts = known
            owns = self.layout.owns
            self._before = {number: _attributes(owns[number]) for number in self.facts.stateful}
            if self.facts.generators or self.facts.other_random:
                self.other_random = OtherRandom(self.facts.generators)
        self._versions = [buffer._version for _, _, buffer in self.layout.buffers]

    @property
    def is_closed(self) -> bool:
        """Whether all of its code is known to use nothing that cannot be seen."""
        return self.facts is not None and self.facts.closed

    # ---- observing the first run

    @contextmanager
    def observed(self) -> Iterator[Observer]:
        """A context in which the module runs for the first time; afterwards :attr:`facts` is there.

        Raises:
            RuntimeError: the run changes a tensor that is no buffer, which cannot be put back.
        """
        layout = self.layout
        self._before = {number: _attributes(own) for number, own in enumerate(layout.owns)}
        tensors = [
            (number, name, value, value._version)
            for number, own in enumerate(layout.owns)
            for name, value in own.items()
            if isinstance(value, Tensor)
        ]
        self.other_random = OtherRandom()
        observer = Observer()
        # Compiled code would be compiled anew under the observer's eyes.
        compiled = any(own.get("_compiled_call_impl") for own in layout.owns)
        with nullcontext() if compiled else observer:
            yield observer
        for number, name, value, version in tensors:
            if value._version != version:
                raise RuntimeError(
                    f"{layout.types[number].__name__}.{name} changes in place whenever it runs, "
                    "and a reversed or checkpointed block runs twice: make it a buffer, or choose "
                    "the 'store' policy"
                )
        counted = {
            number
            for (number, name, buffer), version in zip(layout.buffers, self._versions, strict=True)
            if layout.buffer(number, name) is not buffer or buffer._version != version
        }
        changed = [
            number
            for number, was in self._before.items()
            if number in counted or _has_changed(layout.owns[number], was)
        ]
        self.facts = Facts(
            closed=all(map(_is_closed, layout.types, layout.owns)),
            stateful=changed,
            generators=[generator for generator, _ in observer.generators],
            other_random=self.other_random.moved(),
        )
        self._before = {number: self._before[number] for number in changed}
        if self.facts.generators or self.facts.other_random:
            self.other_random.add(observer.generators)
        else:
            self.other_random = None
        # A lazy module has made its parameters, and perhaps other modules, in this run.
        self.layout = Layout(self.module)
        self._versions = [buffer._version for _, _, buffer in self.layout.buffers]
        _KNOWN[self.module] = self.layout, self.facts

    def forget(self) -> None:
        """Observe the next run again."""
        _KNOWN.pop(self.module, None)

    # ---- the second run

    @property
    def is_as_it_was(self) -> bool:
        """Whether a run of the module itself would see what the first one saw.

        Raises:
            RuntimeError: a buffer has got other values, so that nothing could see them again; or
                global hooks have come, which would be called by this run only.
        """
        if hooked_everywhere():
            raise RuntimeError(
                "global forward hooks were registered between the forward and the backward pass: a "
                "reversed or checkpointed block would call them when it runs again"
            )
        buffers = zip(self.layout.buffers, self._versions, strict=True)
        for (number, name, buffer), version in buffers:
            if buffer._version != version and number not in self._before:
                raise RuntimeError(
                    f"the buffer {self.layout.types[number].__name__}.{name} was changed between "
                    "the forward and the backward pass: a reversed or checkpointed block needs it "
                    "as it was"
                )
        return not self._before and self.layout.holds()

    def private_copy(self) -> nn.Module:
        """The module as it is now, with buffers and containers of its own."""
        owns = self.layout.owns
        return self.layout.copy({number: _attributes(own) for number, own in enumerate(owns)}, {})

    def copy(self, params: Mapping[int, Tensor]) -> nn.Module:
        """The module as it was, of which only this thread knows; see :meth:`Layout.copy`."""
        return self.layout.copy(self._before, params)


def hooked_everywhere() -> bool:
    """Whether forward hooks on all modules are in force, other than those of tools."""
    after, before = _every._global_forward_hooks, _every._global_forward_pre_hooks
    hooks, tools = (*after.values(), *before.values()), ("torch.", "backbones.")
    return any(not getattr(hook, "__module__", "").startswith(tools) for hook in hooks)


def _attributes(own: dict[str, Any]) -> dict[str, Any]:
    """What a run may change of a module's attributes; containers and buffers copied."""
    kept = {key: _copied(own[key]) for key in own if key not in _APART}
    kept["_buffers"] = {
        key: None if buffer is None else buffer.detach().clone()
        for key, buffer in own["_buffers"].items()
    }
    return kept


def _copied(value: Any) -> Any:
    """Containers, and those inside, as others with the same content; anything else as it is."""
    if isinstance(value, dict):
        twin = copy.copy(value)  # of any class
        for key, item in value.items():
            twin[key] = _copied(item)  # not update(), which in a Counter adds
        return twin
    if type(value) in (list, tuple, set):
        return type(value)(map(_copied, value))
    return value


def _differs(now: Any, was: Any) -> bool:
    """Whether something has changed since it was :func:`_copied`."""
    if type(now) is not type(was):
        return True
    if isinstance(was, dict):
        return now.keys() != was.keys() or any(_differs(now[key], was[key]) for key in was)
    if type(was) in (list, tuple):
        return len(now) != len(was) or any(map(_differs, now, was))
    if type(was) is set:
        return bool(now != was)
    return now is not was


def _has_changed(own: dict[str, Any], before: dict[str, Any]) -> bool:
    now = {key: value for key, value in own.items() if key not in _APART}
    # The values of buffers show in their versions.
    if now.keys() != before.keys() or now.pop("_buffers").keys() != before["_buffers"].keys():
        return True
    pairs = ((value, before[key]) for key, value in now.items())
    return any(_differs(value, was) for value, was in pairs)


def _is_closed(kind: type, own: dict[str, Any]) -> bool:
    """Whether the code of a part is known to use nothing but its own parameters."""
    known = kind.__module__.partition(".")[0] in SELF_CONTAINED
    return known and "forward" not in own and "parametrizations" not in own["_modules"]
