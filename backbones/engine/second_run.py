"""A branch of a block that runs twice: in the forward pass, and again in the backward pass.

The first run keeps nothing but what the second one needs to see the same (``state.py``,
``ambient.py``). The second run builds the graph of the branch, on the module's own tensors, and
yields the gradients. That the graph ends in the tensors that are known to the block's node, and in
no others, is found out in the first run and checked in the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from backbones.engine.ambient import AutocastState, Observer, RandomState
from backbones.engine.kept import Kept, weights_of
from backbones.engine.sameness import different, is_near, sample
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


class Branch:
    """f or g of a reversed block, in one forward pass and the backward pass that belongs to it.

    Args:
        module: the branch.
        keep: names of linear layers in it whose outputs are kept; None for all products.

    Attributes:
        kept: these outputs, from the first run on.
        state: what the module is in the first run.
        tensors: all trained tensors that it uses, once the first run is over.
        indices: their places among the inputs of the block's node; set by the block.
    """

    def __init__(self, module: nn.Module, keep: Sequence[str] | None = ()) -> None:
        self.module = module
        self.kept: list[Tensor] = []
        self._products = keep is None
        self._weights: list[Tensor] = []
        self._keeper: Kept | None = None
        if keep is None or len(keep):
            self._weights = weights_of(module, keep or ())
            self._keeper = Kept(None if keep is None else self._weights)
        self.state = ModuleState(module)
        self.indices: Sequence[int] = []
        self._captured: list[Tensor] = []
        self._random: RandomState | None = None
        self._sample: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.state.layout.params, *self._captured]

    def first_run(
        self, x: Tensor, autocast: AutocastState, before: RandomState
    ) -> tuple[Tensor, RandomState]:
        """The output, without a graph, and the state of the random generators behind it."""
        facts, version = self.state.facts, x._version
        try:
            if facts is None or facts.captured is None or facts.volatile:
                out = self._observed_run(x, autocast)
            elif self._keeper is None:
                self._captured = facts.captured
                with autocast.restored():
                    out = checked(self.module, self.module(x), x)
            else:
                self._captured = facts.captured
                # Some kernels of attention prepare for gradients only where they are wanted.
                given = x.detach().requires_grad_() if self._products else x
                with (
                    torch.set_grad_enabled(self._products),
                    autocast.restored(),
                    _unseen() if self._products else nullcontext(),
                    self._record(),
                ):
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
        after = RandomState(x.device)
        self._random = None if before.same_as(after) else before
        assert self.state.facts is not None
        if not self.state.facts.closed:
            self._sample = sample(out)
        return out, after

    def _observed_run(self, x: Tensor, autocast: AutocastState) -> Tensor:
        """A first run with a graph, in which is found what the branch is made of."""
        with torch.enable_grad(), autocast.restored(), _unseen():
            leaf = x.detach().requires_grad_()
            view = leaf.view_as(leaf)
            with self.state.observed() as observer, self._record():
                assert view.grad_fn is not None
                observer.start = view.grad_fn._sequence_nr()
                out = checked(self.module, self.module(view), x)
        facts = self.state.facts
        assert facts is not None
        own = {id(leaf), *map(id, self.state.layout.params)}
        leaves, edges = _sources(out, set(), observer.start)
        captured = [tensor for tensor in leaves if id(tensor) not in own]
        computed = [self._seen(observer, *edge) for edge in edges]
        facts.captured, facts.volatile = captured, bool(computed)
        facts.closed = facts.closed and not captured and not computed
        self._captured = captured + computed
        out = out.detach()
        if not parametrize._cache_enabled and observer.left():
            self.state.forget()
            raise RuntimeError(
                f"{type(self.module).__name__} leaves a tensor that it has computed to others, "
                "and a loss on it would have no gradient, since nothing is kept of this run: "
                "leave tensor.detach(), or choose the 'store' policy"
            )
        return out

    def _seen(self, observer: Observer, node: Any, output: int) -> Tensor:
        if (tensor := observer.find(node, output)) is None:
            raise RuntimeError(
                f"{type(self.module).__name__} uses a trained tensor that was computed outside of "
                f"it ({node.name()}), and which one cannot be seen here: hand it over as a buffer "
                "or a parameter, or choose the 'store' policy"
            )
        return tensor

    def _record(self) -> AbstractContextManager[None]:
        return self._keeper.recorded(self.kept) if self._keeper else nullcontext()

    def output(self, x: Tensor, kept: Sequence[Tensor], autocast: AutocastState) -> Tensor:
        """The second run without gradients, where only the value is wanted."""
        with torch.no_grad(), self._surroundings(autocast, kept, {}):
            module = self.module if self.state.is_as_it_was else self.state.copy()
            out: Tensor = module(x)
        self._compare(out, autocast)
        return out

    def second_run(
        self,
        x: Tensor,
        kept: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        autocast: AutocastState,
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Run the branch again on ``x``, with a graph; ``kept`` is not computed again.

        ``inputs`` are the tensors of the block's node, ``needs`` says which need a gradient.

        Returns:
            ``x`` as a leaf, the output, and by index what to differentiate it to.

        Raises:
            RuntimeError: the run would not see, or did not use, what the first one did.
        """
        wanted = {i: inputs[i] for i in self.indices if needs[i]}
        module, fresh = self.module, {}
        if not self.state.is_as_it_was or _is_watched(wanted.values()):
            # With respect to leaves of our own, since the hooks of the tensors themselves will be
            # called when the block's node hands over their gradients.
            own = set(map(id, self.state.layout.params))
            fresh = {
                id(inputs[i]): inputs[i].detach().requires_grad_(needs[i])
                for i in self.indices
                if id(inputs[i]) in own
            }
            wanted = {i: fresh.get(id(tensor), tensor) for i, tensor in wanted.items()}
            if _is_watched(wanted.values()):  # not one that could be replaced
                raise RuntimeError(
                    f"a tensor that {type(module).__name__} uses without owning it has a hook, "
                    "which would be called twice, or was frozen after the forward pass: choose "
                    "the 'store' policy"
                )
            module = self.state.copy(fresh)
        x = x.detach().requires_grad_()
        with torch.enable_grad(), self._surroundings(autocast, kept, fresh):
            # A view, because hooks on the inputs of modules (FlopCounterMode has some) fail on
            # leaves during torch.autograd.grad.
            out: Tensor = module(x.view_as(x))
        facts = self.state.facts
        if facts is None or not facts.closed:
            unneeded = [inputs[i] for i in self.indices if not needs[i]]
            self._check(out, [x, *wanted.values(), *unneeded])
        self._compare(out, autocast)
        return x, out, wanted

    def _compare(self, out: Tensor, autocast: AutocastState) -> None:
        if self._sample is not None and not is_near(out, self._sample, autocast.enabled):
            self.state.forget()
            raise RuntimeError(different(self.module))

    def _surroundings(
        self, autocast: AutocastState, kept: Sequence[Tensor], fresh: dict[int, Tensor]
    ) -> AbstractContextManager[object]:
        if self._random is None and self.state.other_random is None and self._keeper is None:
            return autocast.restored()
        stack = ExitStack()
        stack.enter_context(autocast.restored())
        for random in (self._random, self.state.other_random):
            if random is not None:
                stack.enter_context(random.replayed())
        if self._keeper is not None:
            weights = [fresh.get(id(weight), weight) for weight in self._weights]
            stack.enter_context(self._keeper.played(kept, weights))
        return stack

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

    @staticmethod
    def gradients(
        out: Tensor,
        x: Tensor,
        wanted: dict[int, Tensor],
        grad: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Gradients of ``x`` and, by index, of what is wanted, given that of ``x + mask * out``."""
        if grad is None or not out.requires_grad:  # the branch detaches its output
            return None, {}
        grad = (grad if mask is None else grad * mask).to(out.dtype)
        grad_x, *grads = torch.autograd.grad(out, [x, *wanted.values()], grad, allow_unused=True)
        return grad_x, {i: g for i, g in zip(wanted, grads, strict=True) if g is not None}


def _unseen() -> AbstractContextManager[None]:
    """Hooks in the place of the user's, who shall not see what nobody will keep."""
    hooks: AbstractContextManager[None] = saved_tensors_hooks(Tensor.detach, lambda tensor: tensor)
    return hooks


def _is_watched(tensors: Iterable[Tensor]) -> bool:
    """Whether others would see a gradient with respect to a tensor itself, or one has none now."""
    for tensor in tensors:
        if tensor._backward_hooks or not tensor.requires_grad or tensor.retains_grad:
            return True
    return False


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
