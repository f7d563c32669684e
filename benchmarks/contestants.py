"""What a user would pick to train within less memory, each on the same blocks.

A contestant changes the blocks of a reversible model in place. All run the same layers and the same
attention kernel with the same parameters; only what is kept for the backward pass differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from backbones import compile_blocks, fit_memory, set_memory
from backbones.engine.policies import blocks_of
from backbones.memory.simulation import Simulation

Contestant = Callable[[nn.Module], None]

_MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_matrix_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> Any:
    if operator in _MATRIX_PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def torch_checkpoint(model: nn.Module, **options: Any) -> None:
    """torch's checkpointing of each block."""
    set_memory(model, "store")
    for block in blocks_of(model).values():
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, **options
        )


def _selective(model: nn.Module) -> None:
    """torch's selective checkpointing of each block: matrix products are kept, the rest is not."""
    contexts = partial(create_selective_checkpoint_contexts, _keep_matrix_products)
    torch_checkpoint(model, context_fn=contexts)


def _memory_budget(model: nn.Module, budget: float = 0.5) -> None:
    """torch.compile of each block, which may keep this share of what it would keep."""
    set_memory(model, "store")
    for block in blocks_of(model).values():
        block.forward = _Budgeted(block.forward, budget)  # type: ignore[method-assign]


class _Budgeted:
    """A function that is compiled within a memory budget at its first call."""

    def __init__(self, function: Callable[..., Any], budget: float) -> None:
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False)
        self._budget: float | None = budget

    def __call__(self, *args: Any) -> Any:
        if self._budget is None:
            return self._compiled(*args)
        with torch._functorch.config.patch(activation_memory_budget=self._budget):
            result = self._compiled(*args)
        self._budget = None
        return result


def _policy(name: Any, share_stored: float = 0.0, compiled: bool = False) -> Contestant:
    def apply(model: nn.Module) -> None:
        set_memory(model, name, round(share_stored * len(blocks_of(model))))
        if compiled:
            compile_blocks(model)

    return apply


EAGER: dict[str, Contestant] = {
    "store": _policy("store"),
    "checkpoint": _policy("checkpoint"),
    "selective checkpoint": _selective,
    "reversible": _policy("reversible"),
    "reversible, half stored": _policy("reversible", 0.5),
}
COMPILED: dict[str, Contestant] = {
    "store, compiled": _policy("store", compiled=True),
    "checkpoint, compiled": _policy("checkpoint", compiled=True),
    "compile, memory budget 0.5": _memory_budget,
    "reversible, compiled": _policy("reversible", compiled=True),
    "reversible, half stored, compiled": _policy("reversible", 0.5, compiled=True),
}


def keeping(keep: Any) -> Contestant:
    """Reversed blocks that keep the outputs of these layers."""

    def apply(model: nn.Module) -> None:
        set_memory(model, "reversible", keep=keep)

    return apply


KEEPING: dict[str, Contestant] = {
    "nothing kept": keeping(()),
    "g.mlp.fc2 kept": keeping(["g.mlp.fc2"]),
    "g.mlp.fc2, g.mlp.fc1 kept": keeping(["g.mlp.fc2", "g.mlp.fc1"]),
    "g.mlp.fc2, g.mlp.fc1, f.attn.qkv kept": keeping(["g.mlp.fc2", "g.mlp.fc1", "f.attn.qkv"]),
    "products kept": keeping("products"),
}


def fitted(images: Tensor) -> Contestant:
    """`fit_memory`, with the largest budget of which it holds half of what ``"store"`` holds.

    Held is what is alive between forward and backward pass, to within a hundredth. ``images`` are
    so many that these bytes, and not the optimizer's, are the peak of the step.
    """

    def apply(model: nn.Module) -> None:
        simulation = Simulation(model, images, next(model.parameters()).device.type)
        low, high = (simulation.step(policy) for policy in ("reversible", "store"))
        enough, too_much = low.peak_bytes, high.peak_bytes + 1
        while too_much - enough > high.held_bytes // 100:
            budget = (enough + too_much) // 2
            plan = fit_memory(model, images, budget)
            held = simulation.step(plan.policy, plan.stored_blocks, plan.keep)
            if held.held_bytes <= high.held_bytes / 2:
                enough = budget
            else:
                too_much = budget
        fit_memory(model, images, enough)

    return apply


ALL = EAGER | COMPILED | {name: KEEPING[name] for name in list(KEEPING)[1:]}
