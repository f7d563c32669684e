"""A branch of a block run a second time, in the backward pass, as it ran in the forward pass.

It must see what the first run saw, although by then the user has left the ``torch.autocast``
region and the random generators have moved on; and it has fresh leaves in the place of its
parameters, whose gradients it yields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AutocastState", "Branch", "RandomState", "parameters_of"]


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
        self._states = [torch.get_rng_state()]
        if device.type not in ("cpu", "meta"):
            self._states.append(torch.get_device_module(device).get_rng_state(device))

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
        cpu, *own = self._states
        torch.set_rng_state(cpu)
        for state in own:
            torch.get_device_module(self._device).set_rng_state(state, self._device)


class Branch:
    """f or g of one block: how to run it again on fresh leaves, and what that yields.

    The parameters are swapped for detached leaves, because a gradient taken with respect to the
    parameters themselves would call the hooks that users registered on them twice per step.
    """

    def __init__(self, module: nn.Module, index_of: dict[int, int], random: RandomState | None):
        self.module = module
        self.random = random
        # Where the parameters are. One may belong to two modules, here or in the other branch:
        # same index, same leaf.
        self._places = [
            (owner._parameters, name, index_of[id(param)])
            for owner in modules_of(module)
            for name, param in owner._parameters.items()
            if param is not None
        ]

    @contextmanager
    def _swapped(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """A context in which the branch has the leaves for its parameters.

        As torch.func.functional_call makes one, but without finding each place by its name, which
        takes longer than a small branch runs.

        Raises:
            RuntimeError: the branch did not run on the leaves, so they have no gradients.
        """
        params: list[Any] = [owner[name] for owner, name, _ in self._places]
        leaf_of: Any = leaves  # a module's parameters are declared to be nn.Parameter
        for owner, name, index in self._places:
            owner[name] = leaf_of[index]
        try:
            yield
            if any(owner[name] is not leaf_of[index] for owner, name, index in self._places):
                raise RuntimeError(
                    f"a hook on {type(self.module).__name__} put other parameters in place while a "
                    "reversed block ran it again. Give fully_shard whole blocks or the model, not "
                    "a branch; or choose the 'store' policy."
                )
        finally:
            for (owner, name, _), param in zip(self._places, params, strict=True):
                owner[name] = param

    def rerun(
        self, x: Tensor, leaves: Sequence[Tensor], autocast: AutocastState
    ) -> tuple[Tensor, Tensor]:
        """Return ``x`` as a fresh leaf and the branch's output, connected by an autograd graph."""
        x = x.detach().requires_grad_()
        replayed = nullcontext() if self.random is None else self.random.replayed()
        with torch.enable_grad(), autocast.restored(), replayed, self._swapped(leaves):
            # A view, because hooks on the inputs of modules (FlopCounterMode has some) fail on
            # leaves during torch.autograd.grad.
            out = self.module(x.view_as(x))
        return x, out

    def gradients(
        self, out: Tensor, x: Tensor, leaves: Sequence[Tensor], grad: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Gradients of ``x`` and, by index, of the leaves, given that of ``x + mask * out``."""
        if not out.requires_grad:  # the branch detaches its output
            return None, {}
        wanted = sorted({i for _, _, i in self._places if leaves[i].requires_grad})
        grad = (grad if mask is None else grad * mask).to(out.dtype)
        grad_x, *grads = torch.autograd.grad(
            out, [x, *(leaves[i] for i in wanted)], grad, allow_unused=True
        )
        return grad_x, {i: g for i, g in zip(wanted, grads, strict=True) if g is not None}


def modules_of(module: nn.Module) -> list[nn.Module]:
    """``module`` and all modules inside, each once; for every step, so without making names."""
    found, known = [module], {module}
    for owner in found:
        for child in owner._modules.values():
            if child is not None and child not in known:
                known.add(child)
                found.append(child)
    return found


# What every module has, which therefore need not be looked at in each.
_ATTRIBUTES_OF_MODULES = vars(nn.Module()).keys()


def parameters_of(block: nn.Module) -> list[Tensor]:
    """The parameters of a block.

    Raises:
        RuntimeError: a branch trains a tensor that is none of them, whose gradient would be lost.
            FullyShardedDataParallel without its original parameters, and DataParallel, put such
            tensors in the place of the parameters.
    """
    modules = modules_of(block)
    params = {
        id(param): param
        for owner in modules
        for param in owner._parameters.values()
        if param is not None
    }
    for owner in modules:
        attributes = vars(owner)
        for name in attributes.keys() - _ATTRIBUTES_OF_MODULES:
            value = attributes[name]
            # getattr, because isinstance with Tensor takes twice as long.
            if getattr(value, "requires_grad", False) is True and id(value) not in params:
                raise RuntimeError(
                    f"{type(owner).__name__}.{name} needs a gradient but is no parameter, so a "
                    "reversed block cannot train it. Register it as a parameter; with "
                    "FullyShardedDataParallel set use_orig_params=True or take fully_shard; with "
                    "DataParallel take DistributedDataParallel; or choose the 'store' policy."
                )
    return list(params.values())
