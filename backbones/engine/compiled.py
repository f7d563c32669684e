"""Blocks whose branches run as compiled code."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from backbones.engine.policies import blocks_of

# Compilations count together for all modules of the process that are compiled in this way. Torch's
# own limit of 8 would be reached by the stages of one MViT, each with and without gradients.
_RECOMPILE_LIMIT = 64


def compile_blocks(
    module: nn.Module, *, dynamic: bool | None = False, backend: str = "inductor"
) -> None:
    """Compile the two branches of every block in ``module``, in place, when they first run.

    Branch by branch ("regional compilation"), not the model as a whole: blocks of one shape share
    one compilation, however many there are, and the memory policies, which work between the
    branches, can be changed at any time. Gradients are those of the model as it was, up to
    rounding; dropout draws the same numbers. Names of parameters do not change, and copies (pickled
    ones, those of ``copy.deepcopy``) are not compiled.

    A branch is compiled for each shape, dtype and setting of autocast, and apart for passes with
    and without gradients, of which a reversed block has both.

    >>> backbones.compile_blocks(model)
    >>> model = backbones.create_model("rev_vit_base", compile=True)  # the same

    Args:
        module: a model of this package, or any module that holds its blocks.
        dynamic: whether one compilation serves all shapes; None lets torch decide, which suits
            images of many sizes. See :func:`torch.compile`.
        backend: likewise.

    Raises:
        ValueError: no block in ``module``, or blocks that keep products (``set_memory(keep=…)``).
        RuntimeError: when it runs, a branch of your own cannot be compiled as one graph
            (``torch._dynamo.exc``); there is no compiler for the device
            (``torch._inductor.exc``). Nothing falls back silently.
    """
    blocks = blocks_of(module).values()
    if not blocks:
        raise ValueError(f"{type(module).__name__} holds no block that could be compiled")
    if any(block.keep != () for block in blocks):
        raise ValueError(
            "blocks that keep products are not compiled: set_memory without keep first"
        )
    how: dict[str, Any] = {"fullgraph": True, "dynamic": dynamic, "backend": backend}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        how["recompile_limit"] = _RECOMPILE_LIMIT
    else:
        # In older versions of torch. In newer ones the setting is one of each thread, and the
        # backward pass on a GPU, where reversed blocks run again, has a thread of its own.
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, _RECOMPILE_LIMIT)
    if backend == "inductor":
        # Its own random numbers may differ between a pass without gradients, the forward pass of a
        # reversed block, and one with them, which is run again for the backward pass.
        how["options"] = {"fallback_random": True}
    for block in blocks:
        block.f.compile(**how)
        block.g.compile(**how)
