"""Memory policies: what a block keeps between its forward and its backward pass.

``"store"``
    Every activation, as plain autograd does. Fastest; memory grows with depth.
``"checkpoint"``
    The block's input. One more forward pass; memory still grows with depth, slowly.
``"reversible"``
    Nothing: the block's input is rebuilt from its output. One more forward pass; memory does not
    grow with depth. Blocks that cannot be inverted are checkpointed instead.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from backbones.common.errors import did_you_mean
from backbones.engine.ambient import only_plain
from backbones.engine.kept import linear_layers
from backbones.engine.sameness import mark
from backbones.engine.second_run import TwoRuns
from backbones.engine.slices import cut
from backbones.engine.state import hooked_everywhere, known_as_before

MemoryPolicy = Literal["store", "checkpoint", "reversible"]

# Names of linear layers inside a block, of all blocks or of named ones, or patterns of such; or all
# products.
Keep = tuple[str, ...] | Literal["products"]

Output = TypeVar("Output")


class Block(nn.Module):
    """Two residual branches f and g, whose activation memory is a policy; see :func:`set_memory`.

    What runs in ``forward``, and how the branches are joined, is the subclass's; under which
    policy it runs is decided here, in :meth:`run`.

    ``drop_path`` is the probability that a sample skips both in training, in [0, 1).

    Raises:
        ValueError: ``drop_path`` outside [0, 1).
    """

    invertible: ClassVar[bool] = False
    memory_policy: MemoryPolicy = "store"
    # Linear layers whose outputs are kept between the two runs, by name; None: all products.
    keep: tuple[str, ...] | None = ()
    # In how many parts of the batch it runs, where it runs twice.
    slices: int = 1

    def __init__(self, f: nn.Module, g: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        self.f = f
        self.g = g
        self.drop_path = float(drop_path)

    def draw_mask(self, x: Tensor) -> Tensor | None:
        """Draw the stochastic-depth mask (Huang et al., 2016) of a forward pass for ``x``, (B, …).

        Returns:
            (B, 1, …) in ``x``'s dtype: 0 for a dropped sample, ``1 / (1 - drop_path)`` for a kept
            one. None if nothing is ever dropped (and then no random number is drawn).
        """
        if self.drop_path == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_path
        return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def run(
        self, piece: Callable[..., Output], *args: Any, reverse: Callable[[], Output] | None = None
    ) -> Output:
        """``piece(*args)``, a piece of the forward pass, under the policy that is in force.

        Blocks that can be inverted have ``reverse``, which computes the same and keeps nothing.
        """
        policy = self.memory_policy
        if policy == "store" or not torch.is_grad_enabled() or only_plain():
            return piece(*args)
        if policy == "checkpoint":
            _, slices = cut(self, self.slices_of, piece, *args)
            if len(slices) == 1:
                return self._checkpointed(piece, *args)
            return _joined([self._checkpointed(piece, *part) for part in slices])
        return piece(*args) if reverse is None else reverse()

    def slices_of(self, batch: int) -> int:
        """In how many slices a batch of so many samples runs, where it runs twice."""
        return self.slices

    def _checkpointed(self, piece: Callable[..., Output], *args: Any) -> Output:
        twice, runs = TwoRuns(self, self.keep), 0
        state = twice.state
        if state.layout.hooked_inside or hooked_everywhere():
            self.warn_of_hooks()
            return piece(*args)

        marks = [(arg, mark(arg)) for arg in args if isinstance(arg, Tensor)]
        params = state.layout.params
        trained = [param.requires_grad for param in params]
        half = torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu")
        # Of weights that are stepped as soon as they have their gradients, others than those of
        # this piece may have been.
        stepped = {id(p) for p in params if p._post_accumulate_grad_hooks}

        def run(*args: Any) -> Output:
            nonlocal runs
            runs += 1
            if runs == 1:
                with nullcontext() if state.facts else state.observed(), twice.recorded():
                    out = piece(*args)
            if any(mark(tensor) != before for tensor, before in marks):
                raise RuntimeError(
                    f"the input or a parameter of {type(self).__name__} was changed in place or "
                    "got other data, and a checkpointed block runs on it twice: change a copy, "
                    "step the optimizer after backward(), or choose the 'store' policy"
                )
            if runs == 1:
                marks.extend((p, mark(p)) for p in state.layout.params if id(p) not in stepped)
                twice.note(out)
                return out
            other = {
                id(param): param.detach().requires_grad_(was)
                for param, was in zip(params, trained, strict=True)
                if param.requires_grad is not was
            }
            with twice.replayed(twice.kept, other):
                if state.is_as_it_was and not other:
                    out = piece(*args)
                else:
                    out = piece.__func__(state.copy(other), *args)  # type: ignore[attr-defined]
            twice.compare(out, half)
            return out

        # To its end, where there is something to compare.
        with nullcontext() if state.is_closed else set_checkpoint_early_stop(False):
            return checkpoint(run, *args, use_reentrant=False)

    def warn_of_hooks(self) -> None:
        """Say that hooks inside of the block cost the memory that its policy would save."""
        if not any(isinstance(part, LazyModuleMixin) for part in self.modules()):
            warnings.warn(
                f"{type(self).__name__}: modules inside have forward hooks, which must be called "
                "once and may want gradients, so the block stores its activations",
                stacklevel=2,
            )

    @property
    def is_compiled(self) -> bool:
        """Whether :func:`backbones.compile_blocks` has been here."""
        return any(getattr(part, "_compiled_call_impl", None) for part in (self.f, self.g))

    def kept_in(self, branch: str) -> tuple[str, ...] | None:
        """What is kept of a branch, ``"f"`` or ``"g"``, by the names within it."""
        if not self.keep:
            return self.keep
        start = f"{branch}."
        return tuple(name.removeprefix(start) for name in self.keep if name.startswith(start))

    def extra_repr(self) -> str:
        keep = "products" if self.keep is None else ", ".join(self.keep)
        kept = f", keep={keep!r}" if keep else ""
        kept += f", slices={self.slices}" if self.slices > 1 else ""
        return f"drop_path={self.drop_path}, memory_policy={self.memory_policy!r}{kept}"


def _joined(parts: list[Any]) -> Any:
    """The outputs of slices as those of the batch."""
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return torch.cat(parts)


def add_branch(x: Tensor, branch: Tensor, mask: Tensor | None) -> Tensor:
    """``x + mask * branch``, in the wider of the dtypes of ``x`` and ``branch``."""
    return x + branch if mask is None else torch.addcmul(x, branch, mask)


def blocks_of(module: nn.Module) -> dict[str, Block]:
    """The blocks inside ``module`` by name, first to last, transitions between stages included."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Block)}


def set_memory(
    module: nn.Module,
    policy: MemoryPolicy,
    stored_blocks: int = 0,
    keep: Sequence[str] | Literal["products"] = (),
    slices: int = 1,
) -> None:
    """Choose what the blocks inside ``module`` keep for the backward pass.

    The gradients are the same under every policy; only memory and speed differ. Takes effect from
    the next forward pass on.

    Args:
        module: a model of this package, or any module that holds :class:`ReversibleBlock` s.
        policy: ``"store"``, ``"checkpoint"`` or ``"reversible"``.
        stored_blocks: how many of the last blocks store their activations whatever the policy.
            The last ones, because the backward pass frees them first: the peak is the larger of
            "these blocks" and "one recomputed block", not their sum.
        keep: linear layers inside the other blocks whose outputs are kept and not computed again,
            by their names in a block, such as ``("g.mlp.fc2",)``, or patterns (``"g.*"``);
            ``"products"``, alone or in the list, for all matrix products, convolutions and
            attention. In front of either may stand the name of a block, as ``named_modules`` has
            it or its end, for this block alone: ``("blocks.3.products", "blocks.4.g.mlp.fc2")``.
            The last layer of g saves the most work for its bytes.
        slices: in how many parts of the batch the other blocks run, forwards and backwards, one
            after the other; at most a sample each. What is alive while a block runs is then that
            of a part. Dropout draws other numbers than for the whole batch, forwards and backwards
            the same. A block in which samples touch each other (batch norm in training) is an
            error when it runs.

    Raises:
        ValueError: unknown policy; no block in ``module``; ``"reversible"`` for a module without
            an invertible block; ``stored_blocks`` outside 0 … number of blocks; a name in ``keep``
            that fits no linear layer (the message lists the near ones), or compiled blocks;
            ``slices`` below 1.
    """
    if policy not in get_args(MemoryPolicy):
        policies = ", ".join(repr(name) for name in get_args(MemoryPolicy))
        raise ValueError(f"memory policy {policy!r} does not exist; choose one of {policies}")
    named = blocks_of(module)
    blocks = [*named.values()]
    kind = type(module).__name__
    if not blocks:
        raise ValueError(f"{kind} holds no block whose memory can be managed")
    if policy == "reversible" and not any(block.invertible for block in blocks):
        raise ValueError(
            f"{kind} has no reversible blocks; use 'checkpoint', or its reversible twin (rev_…)"
        )
    if not 0 <= stored_blocks <= len(blocks):
        raise ValueError(f"stored_blocks must be 0 … {len(blocks)} for {kind}, got {stored_blocks}")
    if slices < 1:
        raise ValueError(f"slices must be at least 1, got {slices}")
    if isinstance(keep, str):
        keep = (keep,)
    if keep and any(block.is_compiled for block in blocks):
        raise ValueError(f"the blocks of {kind} are compiled as a whole: keep goes without compile")
    names = [_names(name, block) for name, block in named.items()]
    for pattern in keep:
        if not any(_matching(pattern, of_block) for of_block in names):
            linear = sorted({layer for block in blocks for layer in linear_layers(block)})
            near = did_you_mean(pattern, linear) or f": {', '.join(linear[:12])} …"
            raise ValueError(f"keep: no block of {kind} has a linear layer {pattern!r}{near}")
    first_stored = len(blocks) - stored_blocks
    for index, (block, layers) in enumerate(zip(blocks, names, strict=True)):
        meant = [layers[name] for pattern in keep for name in _matching(pattern, layers)]
        with known_as_before(block):
            block.keep = None if "products" in meant else tuple(dict.fromkeys(meant))
            block.slices = slices
            if index >= first_stored:
                block.memory_policy = "store"
            elif policy == "reversible" and not block.invertible:
                block.memory_policy = "checkpoint"
            else:
                block.memory_policy = policy


def _names(block_name: str, block: Block) -> dict[str, str]:
    """What the layers of a block may be called, and ``"products"``: the layer behind each name.

    By its name in the block, and by that behind any end of the block's own name.
    """
    parts = block_name.split(".") if block_name else []
    starts = ["", *(".".join(parts[place:]) + "." for place in range(len(parts)))]
    layers = [*linear_layers(block), "products"]
    return {f"{start}{layer}": layer for start in starts for layer in layers}


def _matching(pattern: str, names: Collection[str]) -> list[str]:
    if not any(sign in pattern for sign in "*?["):
        return [pattern] if pattern in names else []
    # All products only where they are asked for by name.
    products = pattern.endswith("products")
    found = fnmatch.filter(names, pattern)
    return [name for name in found if products or not name.endswith("products")]
