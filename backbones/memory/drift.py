"""Numerical drift: how far rebuilt activations, and the gradients made of them, are off.

A reversed block rebuilds its inputs by subtracting what its forward pass added. Rounding makes the
two differ a little, and the error travels from the last block to the first. This measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from backbones.common.errors import first_line
from backbones.engine.ambient import RandomState
from backbones.engine.policies import blocks_of, set_memory
from backbones.engine.reversible import ReversibleBlock, ReversibleSequence

Precision = Literal["fp32", "bf16", "fp16"]

_AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Relative error of the gradient of a block from which on a report is not ok. Gradients of two
# mini-batches differ by far more, so an error below it does not change a training run. Fresh
# models stay far below it (48 blocks of rev_vit_tiny: 5e-7 in fp32, 4e-3 in bf16); with weights
# three times as large the same 48 blocks exceed it in bf16 (0.17), which is worth a warning.
WARNING_THRESHOLD = 0.05

_Streams = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BlockDrift:
    """The drift at one reversible block. Errors are relative, in the Euclidean norm.

    ``gradient`` is that of its parameters under ``"reversible"``, against ``"store"``; None where
    none of them is trained.
    """

    name: str  # as in model.named_modules()
    reconstruction: float  # of its two rebuilt inputs, against those of the forward pass
    gradient: float | None


@dataclass(frozen=True)
class DriftReport:
    """What :func:`probe_drift` found; ``str()`` gives a table."""

    precision: Precision
    blocks: list[BlockDrift]  # in the order of the forward pass
    gradient: float  # relative error of all gradients together, the input's included

    @property
    def reconstruction(self) -> float:
        """The largest reconstruction error of a block. Not a number counts as the largest."""
        return _largest(block.reconstruction for block in self.blocks)

    @property
    def worst_gradient(self) -> float:
        """The largest gradient error of a block, or of all gradients together."""
        errors = [block.gradient for block in self.blocks if block.gradient is not None]
        return _largest([self.gradient, *errors])

    @property
    def ok(self) -> bool:
        """Whether every error is finite, and every gradient's below :data:`WARNING_THRESHOLD`."""
        return self.reconstruction < float("inf") and self.worst_gradient < WARNING_THRESHOLD

    def __str__(self) -> str:
        width = max(len("all gradients"), *(len(block.name) for block in self.blocks))
        lines = [f"{self.precision:<{width}}  reconstruction  gradient"]
        for block in self.blocks:
            gradient = "-" if block.gradient is None else f"{block.gradient:.1e}"
            lines.append(f"{block.name:<{width}}  {block.reconstruction:>14.1e}  {gradient:>8}")
        lines.append(f"{'all gradients':<{width}}  {'':>14}  {self.gradient:>8.1e}")
        most, worst = f"{WARNING_THRESHOLD:.0%}", f"{self.worst_gradient:.1%}"
        verdict = f"ok: every gradient within {most} of stored activations"
        if not self.ok:
            remedy = "store the last blocks, or take a higher precision"
            verdict = f"WARNING: a gradient is off by {worst} (warning threshold {most}); {remedy}"
        return "\n".join([*lines, verdict])


def _largest(errors: Any) -> float:
    # max() would lose a nan, depending on where it stands.
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def probe_drift(
    model: nn.Module, example_input: Tensor, precision: Precision = "fp32"
) -> DriftReport:
    """Compare rebuilt inputs and reversed gradients with those of stored activations.

    Runs the model in eval mode (without dropout and drop path, so that two passes are the same
    computation): forward once to note the true inputs of every block, back from the outputs of
    each :class:`ReversibleSequence` by its inverse, and then one training pass under ``"store"``
    and one under ``"reversible"``, of a fixed random projection of the output. Afterwards memory
    policies, modes, gradients and random generators are as they were.

    Needs the memory of ``"store"``, and of the streams of all blocks: take a small batch.

    Args:
        model: any module that holds a :class:`ReversibleSequence`, called with ``example_input``,
            and that returns a tensor.
        example_input: floating point, of any shape that the model takes, on the model's device.
        precision: ``"fp32"`` runs without autocast, in the dtype of the model itself, whatever
            that is; ``"bf16"`` and ``"fp16"`` under autocast.

    Raises:
        ValueError: unknown precision, no reversible sequence, or a model on the meta device.
        TypeError: the model does not return one tensor.
        RuntimeError: this device lacks an operation in this precision.
    """
    if precision not in get_args(Precision):
        known = ", ".join(repr(name) for name in get_args(Precision))
        raise ValueError(f"precision {precision!r} does not exist; choose one of {known}")
    if example_input.is_meta:
        raise ValueError("on the meta device there are no values that could drift")
    sequences = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
    members = {block for sequence in sequences for block in sequence.blocks}
    found = {block: name for name, block in blocks_of(model).items() if block in members}
    blocks = cast(dict[ReversibleBlock, str], found)
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no reversible blocks: use a rev_* model")
    device, dtype = example_input.device, _AUTOCAST.get(precision)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    try:
        with _as_it_was(model, device), autocast:
            reconstruction = _reconstruction_errors(model, sequences, blocks, example_input)
            stored = _gradients(model, "store", example_input)
            reversible = _gradients(model, "reversible", example_input)
    except RuntimeError as error:
        # Both wordings occur; a missing operation is not always a NotImplementedError.
        if dtype is not None and "not implemented for" in str(error):
            where = f"{precision} does not run on {device.type}"
            raise RuntimeError(f"{where}: {first_line(error)}") from error
        raise
    drifts = []
    for block, name in blocks.items():
        names = {f"{name}.{key}" for key, _ in block.named_parameters()} & stored.keys()
        gradient = _error([(reversible[key], stored[key]) for key in names]) if names else None
        drifts.append(BlockDrift(name, reconstruction[block], gradient))
    everything = [(reversible[key], stored[key]) for key in stored]
    return DriftReport(precision, drifts, _error(everything))


@contextmanager
def _as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in eval mode, that leaves modes, policies and random generators as they were."""
    modes = {module: module.training for module in model.modules()}
    policies = {block: block.memory_policy for block in blocks_of(model).values()}
    model.eval()
    try:
        # Attention without dropout draws nothing, but a user's module may.
        with RandomState(device).replayed():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode  # not .train(), which would reach into the children
        for block, policy in policies.items():
            block.memory_policy = policy


@torch.no_grad()
def _reconstruction_errors(
    model: nn.Module, sequences: list[ReversibleSequence], blocks: Iterable[nn.Module], x: Tensor
) -> dict[nn.Module, float]:
    # Of each block its inputs and outputs; where it runs several times, those of the last run.
    streams_of: dict[nn.Module, tuple[_Streams, _Streams]] = {}

    def note(block: nn.Module, args: tuple[Any, ...], outputs: _Streams) -> None:
        streams_of[block] = (args[0], args[1]), outputs

    errors: dict[nn.Module, float] = dict.fromkeys(blocks, 0.0)
    with ExitStack() as hooks:
        for block in errors:
            hooks.enter_context(block.register_forward_hook(note))
        model(x)
    for sequence in sequences:
        rebuilt: _Streams | None = None
        for block in reversed(sequence.blocks):
            if block in streams_of:
                inputs, outputs = streams_of[block]
                rebuilt = cast(ReversibleBlock, block).inverse(*(rebuilt or outputs))
                errors[block] = _error(zip(rebuilt, inputs, strict=True))
    return errors


def _gradients(
    model: nn.Module, policy: Literal["store", "reversible"], x: Tensor
) -> dict[str, Tensor]:
    """The gradients of a fixed random projection of the output, by the names of the parameters,
    that of the input by the empty one. ``torch.autograd.grad``, so no ``.grad`` is touched."""
    set_memory(model, policy)
    leaves = {"": x.detach().clone().requires_grad_()}
    leaves |= {name: param for name, param in model.named_parameters() if param.requires_grad}
    with torch.enable_grad():
        y = model(leaves[""])
        if not isinstance(y, Tensor):
            raise TypeError(f"the model must return one tensor, not a {type(y).__name__}")
        # Drawn on the CPU: the same on every device.
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        # Not summed in half precision, which overflows early.
        loss = (y.float() * direction.to(y.device)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def _error(pairs: Any) -> float:
    """|a - b| / |b| of many tensors taken as one vector."""
    difference = norm = 0.0
    for actual, expected in pairs:
        # Differences first, in float64, so that the error of the comparison does not show.
        exact = expected.double()
        difference += float((actual.double() - exact).square().sum())
        norm += float(exact.square().sum())
    if norm == 0.0:  # a bias that does not matter, such as that of the keys, or a dead block
        return 0.0 if difference == 0.0 else float("inf")
    return float((difference / norm) ** 0.5)
