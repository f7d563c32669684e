"""Training steps of small sequences and models, how two are compared, and refused commands."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import MemoryPolicy, ReversibleBlock, ReversibleSequence, set_memory
from backbones.__main__ import main
from backbones.engine.kept import counted
from backbones.models.layers import AttentionBranch, MLPBranch

DIM = 8
SHAPE = (3, 5, DIM)

# Every way to save memory, as (policy, stored blocks); the reference is ("store", 0).
SAVERS: list[tuple[MemoryPolicy, int]] = [("checkpoint", 0), ("reversible", 0), ("reversible", 1)]
every_saver = pytest.mark.parametrize("policy, k", SAVERS)
savers = pytest.mark.parametrize("policy", ("checkpoint", "reversible"))

Capture = pytest.CaptureFixture[str]
Streams = tuple[Tensor, Tensor]
Grads = dict[str, Tensor | None]
Model = TypeVar("Model", bound=nn.Module)


def count_operations() -> FlopCounterMode:
    """torch's counter, which in 2.11 does not know attention as a CPU runs it."""
    known = {operator: partial(count) for operator, count in counted().items()}
    for count in known.values():
        count._get_raw = True  # it takes tensors, not their shapes
    return FlopCounterMode(display=False, custom_mapping=known)


def make_block(dropout: float = 0.0, drop_path: float = 0.0) -> ReversibleBlock:
    f = AttentionBranch(DIM, num_heads=2, attn_drop=dropout, proj_drop=dropout)
    return ReversibleBlock(f, MLPBranch(DIM, 2.0, dropout), drop_path)


def make_sequence(
    depth: int, dropout: float = 0.0, drop_path: float = 0.0, dtype: torch.dtype = torch.float64
) -> ReversibleSequence:
    """Blocks of attention and MLP, the same for the same arguments."""
    torch.manual_seed(1)
    return ReversibleSequence(make_block(dropout, drop_path) for _ in range(depth)).to(dtype)


def make_streams(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> Streams:
    generator = torch.Generator().manual_seed(2)
    x1, x2 = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return x1.requires_grad_(requires_grad), x2.requires_grad_(requires_grad)


def loss_of(y1: Tensor, y2: Tensor) -> Tensor:
    """A loss with a different gradient for every entry of both streams."""
    ramp = torch.linspace(-1.0, 1.0, y1.numel(), dtype=y1.dtype).view_as(y1)
    return ((y1 - ramp) ** 2).mean() + ((y2 + ramp) ** 2 * (1.5 + ramp)).mean()


@dataclass
class Step:
    """What one training step yields."""

    outputs: Streams
    loss: Tensor
    grads: dict[str, Tensor | None]
    random_state: Tensor


def train_step(
    module: nn.Module,
    policy: MemoryPolicy | None = "store",
    stored_blocks: int = 0,
    *,
    inputs: Streams | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = loss_of,
    autocast: bool = False,
    backward_inside_autocast: bool = False,
) -> Step:
    """Forward and backward from fixed inputs and a fixed seed; gradients start from nothing.

    With ``policy=None`` every block keeps the policy it has.
    """
    if policy is not None:
        set_memory(module, policy, stored_blocks)
    x1, x2 = inputs or make_streams(next(module.parameters()).dtype)
    x1.grad = x2.grad = None
    module.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        outputs = module(x1, x2)
        value = loss(*outputs)
        if backward_inside_autocast:
            value.backward()
    if not backward_inside_autocast:
        value.backward()
    leaves = dict(module.named_parameters()) | {"x1": x1, "x2": x2}
    grads = {name: None if x.grad is None else x.grad.clone() for name, x in leaves.items()}
    y1, y2 = (y.detach() for y in outputs)
    return Step((y1, y2), value.detach(), grads, torch.get_rng_state())


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "tensor") -> None:
    """No entry is off by more than ``tolerance`` times the largest entry of ``expected``."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    error = (actual - expected).abs().max().item()
    bound = tolerance * expected.abs().max().item()
    assert error <= bound, f"{what}: off by {error:.2e}, allowed {bound:.2e}"


def assert_grads_near(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float
) -> None:
    """The same names have a gradient, and each is near its counterpart."""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        other = actual[name]
        if grad is None or other is None:
            assert grad is other, f"{name}: only one of the two has a gradient"
            continue
        assert_near(other, grad, tolerance, name)


def assert_same_step(actual: Step, expected: Step, tolerance: float) -> None:
    """Outputs, loss, all gradients and the random generator after the step agree."""
    for name, y, y_expected in zip(("y1", "y2"), actual.outputs, expected.outputs, strict=True):
        assert_near(y, y_expected, tolerance, name)
    assert_near(actual.loss, expected.loss, tolerance, "loss")
    assert_grads_near(actual.grads, expected.grads, tolerance)
    assert torch.equal(actual.random_state, expected.random_state), "generator state"


def assert_as_stored(
    module: nn.Module, policy: MemoryPolicy, k: int, tolerance: float = 1e-9, **options: Any
) -> Step:
    """A step under a policy is the one of stored activations, which is returned."""
    stored = train_step(module, **options)
    assert_same_step(train_step(module, policy, k, **options), stored, tolerance)
    return stored


def random_model(kind: type[Model], **arguments: Any) -> Model:
    """In float64, with weights far from those of a new model, whose branches do almost nothing."""
    torch.manual_seed(1)
    model = kind(**arguments).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn_like(param))
    return model


@contextmanager
def forward_hook(module: nn.Module, keep: list[Streams]) -> Iterator[None]:
    """Append the outputs of ``module`` to ``keep``."""
    handle = module.register_forward_hook(lambda _module, _args, output: keep.append(output))
    try:
        yield
    finally:
        handle.remove()


def refused(arguments: Sequence[str], capsys: Capture) -> str:
    """The one line with which ``python -m backbones`` refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
    )


def of(*branches: nn.Module, policy: MemoryPolicy) -> ReversibleSequence:
    """A sequence with these for f, and an MLP for each g; then one more block."""
    blocks = [ReversibleBlock(f, mlp()) for f in (*branches, mlp())]
    sequence = ReversibleSequence(blocks).double()
    set_memory(sequence, policy)
    return sequence


def compare(
    make: Callable[[MemoryPolicy], tuple[nn.Module, dict[str, Tensor]]],
    policy: MemoryPolicy,
    *,
    between: Callable[[nn.Module], object] = lambda module: None,
    steps: int = 3,
) -> None:
    """The gradients of ``policy`` are those of "store", in the first step and in those after it.

    Args:
        make: the module under a policy, and trained tensors besides its parameters.
        between: done between the forward and the backward pass.
    """

    def grads(policy: MemoryPolicy) -> list[Grads]:
        torch.manual_seed(1)
        random.seed(1)
        module, others = make(policy)
        leaves = {**dict(module.named_parameters()), **others}
        found = []
        for _ in range(steps):
            for leaf in leaves.values():
                leaf.grad = None
            x1, x2 = make_streams()
            y1, y2 = module(x1, x2)
            between(module)
            (y1.square().sum() + (y2**3).sum()).backward()
            found.append({name: leaf.grad for name, leaf in leaves.items()} | {"x1": x1.grad})
        found.append({name: buffer.double() for name, buffer in module.named_buffers()})
        return found

    for actual, expected in zip(grads(policy), grads("store"), strict=True):
        assert_grads_near(actual, expected, 1e-9)


class Uses(nn.Module):
    """A linear layer times whatever ``function`` says."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.function(x)
