"""Products whose outputs a block keeps, so that its second run does not compute them again.

In the first run the outputs of chosen operators are recorded; in the second run they are returned
in the same order, below autograd, which records the operators as usual. So any f and g will do, and
the gradients are made of the same inputs and weights as without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside ``module`` whose outputs can be kept, by name."""
    return {name: part for name, part in module.named_modules() if type(part) is nn.Linear}


_TENSOR = object()


class Kept:
    """What one run of a branch leaves for the next: outputs of products, in their order.

    Args:
        weights: those of the linear layers whose outputs are kept; None for all products.
    """

    def __init__(self, weights: Sequence[Tensor] | None) -> None:
        self._weights = weights
        self._outputs: list[tuple[list[Any], Any]] = []  # of each product, but for tensors

    def recorded(self, into: list[Tensor]) -> AbstractContextManager[Any]:
        """A context in which the outputs of the chosen products go into a list."""
        self._outputs.clear()

        def keep(func: Any, args: Any, kwargs: Any) -> Any:
            out = func(*args, **kwargs)
            leaves, spec = tree_flatten(out)
            into.extend(leaf.detach() for leaf in leaves if isinstance(leaf, Tensor))
            # Attention returns numbers too, and nothing in some places.
            others = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._outputs.append((others, spec))
            return out

        return self._watched(keep, {id(weight) for weight in self._weights or ()})

    def played(self, outputs: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Any:
        """A context in which the chosen products return ``outputs``, what was recorded; ``weights``
        are as at first, or others, if others stand in their places now."""
        tensors, products = iter(outputs), iter(self._outputs)

        def play(func: Any, args: Any, kwargs: Any) -> Any:
            others, spec = next(products, (None, None))
            if others is None or spec is None:
                raise RuntimeError(
                    "a block computes more products in its second run than in its first, so that "
                    "none can be kept: choose set_memory without keep"
                )
            # Others on the same memory, to which autograd will give a history.
            leaves = [next(tensors).detach() if leaf is _TENSOR else leaf for leaf in others]
            return tree_unflatten(leaves, spec)

        return self._watched(play, {id(weight) for weight in weights or ()})

    def _watched(self, instead: Any, weights: Collection[int]) -> AbstractContextManager[Any]:
        products = _Products(instead)
        return products if self._weights is None else _Linears(products, weights)


def counted() -> dict[Any, Callable[..., int]]:
    """The operators that torch can count operations of, each with its formula."""
    from torch.utils.flop_counter import flop_registry  # here, because it imports triton

    known, attention = {**flop_registry}, "_scaled_dot_product_flash_attention"
    for way in ("", "_backward"):  # as a CPU runs it, which torch 2.11 does not count
        on_cpu, on_gpu = (getattr(torch.ops.aten, attention + at + way) for at in ("_for_cpu", ""))
        known.setdefault(on_cpu, known[on_gpu])
    return known


class _Products(TorchDispatchMode):
    """Puts a function in the place of matrix products, convolutions and attention."""

    def __init__(self, instead: Any) -> None:
        super().__init__()
        self._instead = instead
        self._known = counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "_overloadpacket", None) in self._known and not _draws(func, args, kwargs):
            return self._instead(func, args, kwargs)
        return func(*args, **kwargs)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator draws random numbers, so that the run has to go through it."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("dropout_p"))


class _Linears(TorchFunctionMode):
    """Lets ``products`` see the linear layers that have certain weights, and nothing else."""

    def __init__(self, products: _Products, weights: Collection[int]) -> None:
        super().__init__()
        self._products = products
        self._weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if id(weight) in self._weights:
                with self._products:
                    return func(*args, **kwargs)
        return func(*args, **kwargs)
