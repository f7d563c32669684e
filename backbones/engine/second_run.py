"""A branch of a block that runs twice: in the forward pass, and again in the backward pass.

The first run keeps nothing but what the second one needs to see the same (``state.py``,
``ambient.py``). The second run builds the graph of the branch, on the module's own tensors, and
yields the gradients. That the graph ends in the tensors that are known to the block's node, and in
no others, is found out in the first run and checked in the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from backbones.engine.ambient import AutocastState, RandomState
from backbones.engine.kept import Kept
from backbones.engine.sameness import is_near, sample
from backbones.engine.state import ModuleState


def checked(module: nn.Module, out: object, x: Tensor) -> Tensor:
    """The output of a branch, if it can be added to a stream: a TypeError if it is no tensor, a
    ValueError if it has another shape than the branch's input."""
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{type(module).__name__} returns a {type(out).__name__}; a branch returns one tensor "
            "of its input's shape: wrap it in a module that does"
        )
    if out.shape != x.shape:
        raise ValueError(
            f"{type(module).__name__} makes {tuple(out.shape)} of {tuple(x.shape)}; a branch "
            "returns one tensor of its input's shape"
        )
    return out


class TwoRuns:
    """What runs in the forward pass and again in the backward pass that belongs to it.

    Args:
        module: a block, or a branch of one.
        keep: names of linear layers in it whose outputs are kept; None for all products.

    Attributes:
        kept: these outputs, from the first run on.
        state: what the module is in the first run.
    """

    def __init__(self, module: nn.Module, keep: tuple[str, ...] | None) -> None:
        self.module = module
        self.kept: list[Tensor] = []
        self._weights = [cast(nn.Linear, module.get_submodule(name)).weight for name in keep or ()]
        self._keeper = None if keep == () else Kept(self._weights if keep else None)
        self.state = ModuleState(module)
        self._random: RandomState | None = None
        self._samples: list[Tensor | None] = []

    def recorded(self) -> AbstractContextManager[Any]:
        """A context for the first run, which records what is kept."""
        return self._keeper.recorded(self.kept) if self._keeper else nullcontext()

    def note(self, out: object) -> None:
        """Have a few numbers of the first output, where the code may use what nobody can see."""
        if not self.state.is_closed:
            self._samples = [*map(sample, _tensors(out))]

    def replayed(
        self, kept: Sequence[Tensor], fresh: dict[int, Tensor]
    ) -> AbstractContextManager[object]:
        """A context for the second run: the same random numbers, and ``kept`` is not computed.

        ``fresh`` has by the ``id`` of parameters those that stand in their places.
        """
        randoms = [r for r in (self._random, self.state.other_random) if r is not None]
        if not randoms and self._keeper is None:
            return nullcontext()
        contexts = ExitStack()
        for random in randoms:
            contexts.enter_context(random.replayed())
        if self._keeper is not None:
            weights = [fresh.get(id(weight), weight) for weight in self._weights]
            contexts.enter_context(self._keeper.played(kept, weights))
        return contexts

    def compare(self, out: object, half: bool) -> None:
        """Whether the second run has made what the first one did: if not, a RuntimeError.

        ``half``: whether parts of it are in half precision.
        """
        outputs = _tensors(out) if self._samples else []
        for now, before in zip(outputs, self._samples, strict=False):
            if before is not None and not is_near(now, before, half):
                self.state.forget()
                raise RuntimeError(
                    f"{type(self.module).__name__} computes something else when it runs again for "
                    "the backward pass: it uses what has changed since the forward pass, or what "
                    "its own runs change, outside of its parameters, buffers and attributes (or "
                    "another source of random numbers). Make that a buffer, or choose the 'store' "
                    "policy"
                )


class Branch(TwoRuns):
    """f or g of a reversed block.

    Attributes:
        tensors: all trained tensors that it uses by ``id``, once the first run is over.
    """

    def __init__(
        self, module: nn.Module, keep: tuple[str, ...] | None, autocast: AutocastState
    ) -> None:
        super().__init__(module, keep)
        self._autocast = autocast
        self.tensors: dict[int, Tensor] = {}
        self._all_products = keep is None

    def first_run(self, x: Tensor, before: RandomState) -> tuple[Tensor, RandomState]:
        """The output, without a graph, and the state of the random generators behind it."""
        facts, version, graph = self.state.facts, x._version, self._all_products
        try:
            if facts is None or facts.captured is None or facts.volatile:
                out, captured = self._observed_run(x)
            elif self._keeper is None:
                captured = facts.captured
                with self._autocast.restored():
                    out = checked(self.module, self.module(x), x)
            else:
                captured = facts.captured
                with (
                    # Some kernels of attention prepare for gradients only where they are wanted.
                    _unseen_graph() if graph else nullcontext(),
                    self._autocast.restored(),
                    self.recorded(),
                ):
                    given = x.detach().requires_grad_() if graph else x
                    out = checked(self.module, self.module(given), x).detach()
            changed = x._version != version
        except RuntimeError as error:
            if not (changed := "a leaf Variable that requires grad" in str(error)):
                raise
        if changed:
            raise RuntimeError(
                f"{type(self.module).__name__} changes its input in place, so that the block "
                "cannot be inverted: let it change a copy, or choose the 'store' policy"
            )
        self.tensors = {id(tensor): tensor for tensor in (*self.state.layout.params, *captured)}
        after = RandomState(x.device)
        self._random = None if before.same_as(after) else before
        self.note(out)
        return out, after

    def _observed_run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A first run with a graph, in which is found what the branch is made of: the output, and
        trained tensors that it does not own."""
        with _unseen_graph(), self._autocast.restored():
            leaf = x.detach().requires_grad_()
            view = leaf.view_as(leaf)
            with self.state.observed() as observer, self.recorded():
                assert view.grad_fn is not None
                observer.start = view.grad_fn._sequence_nr()
                out = checked(self.module, self.module(view), x)
        facts = self.state.facts
        assert facts is not None
        own = {id(leaf), *map(id, self.state.layout.params)}
        leaves, edges = _sources(out, set(), observer.start)
        captured = [tensor for tensor in leaves if id(tensor) not in own]
        computed: list[Tensor] = []
        for node, output in edges:
            if (tensor := observer.find(node, output)) is None:
                raise RuntimeError(
                    f"{type(self.module).__name__} uses a trained tensor that was computed outside "
                    f"of it ({node.name()}), and which one cannot be seen here: hand it over as a "
                    "buffer or a parameter, or choose the 'store' policy"
                )
            computed.append(tensor)
        facts.captured, facts.volatile = captured, bool(computed)
        facts.closed = facts.closed and not captured and not computed
        out = out.detach()
        if not parametrize._cache_enabled and observer.left():
            self.state.forget()
            raise RuntimeError(
                f"{type(self.module).__name__} leaves a tensor that it has computed to others, "
                "and a loss on it would have no gradient, since nothing is kept of this run: "
                "leave tensor.detach(), or choose the 'store' policy"
            )
        return out, captured + computed

    def second_run(
        self,
        x: Tensor,
        kept: Sequence[Tensor],
        grad: Tensor | None,
        mask: Tensor | None,
        needed: Set[int],
        grads: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Run the branch again on ``x``, and backwards; ``kept`` is not computed again.

        Args:
            grad: the gradient of ``… + mask * out``; None: only the output is wanted.
            mask: None for 1.
            needed: the ``id`` of every tensor whose gradient is wanted.
            grads: takes them, added to what is there, by the same ``id``.

        Returns:
            the output, and the gradient of ``x``.

        Raises:
            RuntimeError: the run would not see, or did not use, what the first one did.
        """
        graph = grad is not None
        wanted = {key: t for key, t in self.tensors.items() if key in needed} if graph else {}
        module, fresh = self.module, {}
        if not self.state.is_as_it_was or _is_watched(wanted.values()):
            # With respect to leaves of our own, since the hooks of the tensors themselves will be
            # called when the block's node hands over their gradients.
            params = self.state.layout.params
            fresh = {id(p): p.detach().requires_grad_(id(p) in needed) for p in params}
            wanted = {key: fresh.get(key, tensor) for key, tensor in wanted.items()}
            if _is_watched(wanted.values()):  # not one that could be replaced
                raise RuntimeError(
                    f"a tensor that {type(module).__name__} uses without owning it has a hook, "
                    "which would be called twice, or was frozen after the forward pass: choose "
                    "the 'store' policy"
                )
            module = self.state.copy(fresh)
        x = x.detach().requires_grad_(graph)
        with (
            torch.set_grad_enabled(graph),
            self._autocast.restored(),
            self.replayed(kept, fresh),
        ):
            # A view, because hooks on the inputs of modules (FlopCounterMode has some) fail on
            # leaves during torch.autograd.grad.
            out: Tensor = module(x.view_as(x))
        if graph and not self.state.is_closed:
            unneeded = [tensor for key, tensor in self.tensors.items() if key not in needed]
            self._check(out, [x, *wanted.values(), *unneeded])
        self.compare(out, self._autocast.enabled)
        if grad is None or not out.requires_grad:  # the branch detaches its output
            return out.detach(), None
        grad = (grad if mask is None else grad * mask).to(out.dtype)
        grad_x, *found = torch.autograd.grad(out, [x, *wanted.values()], grad, allow_unused=True)
        for key, more in zip(wanted, found, strict=True):
            if more is not None:
                grads[key] = grads[key] + more if key in grads else more
        return out.detach(), grad_x

    def _check(self, out: Tensor, known: list[Tensor]) -> None:
        stops = {(t.grad_fn, t.output_nr) for t in known if t.grad_fn is not None}
        leaves, _ = _sources(out, stops, None)
        ids = set(map(id, known))
        if any(id(leaf) not in ids for leaf in leaves):
            self.state.forget()
            raise RuntimeError(
                f"{type(self.module).__name__} uses a trained tensor in the backward pass that it "
                "did not use in the forward pass, so its gradient would be lost: choose the "
                "'store' policy"
            )


@contextmanager
def _unseen_graph() -> Iterator[None]:
    """A context with gradients, where hooks are in the place of the user's, who shall not see what
    nobody will keep."""
    with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
        yield


def _is_watched(tensors: Iterable[Tensor]) -> bool:
    """Whether others would see a gradient with respect to a tensor itself, or one has none now."""
    for tensor in tensors:
        if tensor._backward_hooks or not tensor.requires_grad or tensor.retains_grad:
            return True
    return False


def _tensors(out: object) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]


def _sources(
    out: Tensor, stops: set[tuple[Any, int]], start: int | None
) -> tuple[list[Tensor], list[tuple[Any, int]]]:
    """Where the graph of a tensor ends: in leaves, and in outputs of nodes before ``start``."""
    if out.grad_fn is None:
        return [out] if out.requires_grad else [], []
    leaves: list[Tensor] = []
    edges: list[tuple[Any, int]] = []
    seen, pending = {out.grad_fn}, [out.grad_fn]
    while pending:
        for node, output in pending.pop().next_functions:
            if node is None or node in seen or (node, output) in stops:
                continue
            if start is not None and node._sequence_nr() < start:
                if (node, output) not in edges:
                    edges.append((node, output))
                continue
            seen.add(node)
            if type(node).__name__ == "AccumulateGrad":
                leaves.append(node.variable)  # type: ignore[attr-defined]
            else:
                pending.append(node)
    return leaves, edges
