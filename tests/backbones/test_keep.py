"""Products inside a block whose outputs are kept: the same gradients, fewer operations."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

import backbones
from backbones import MemoryPolicy, set_memory
from backbones.engine.kept import Kept
from backbones.engine.policies import blocks_of
from tests.backbones.helpers import (
    assert_grads_near,
    assert_same_step,
    count_operations,
    make_sequence,
    make_streams,
    savers,
    train_step,
)
from tests.backbones.saved_bytes import saved_bytes

Keep = tuple[str, ...] | Literal["products"]

KEEPS: tuple[Keep, ...] = (
    ("g.mlp.fc2",),
    ("g.mlp.*",),
    ("f.attn.qkv", "g.mlp.fc2"),
    ("f.*",),
    "products",
)
every_keep = pytest.mark.parametrize("keep", KEEPS, ids=str)


@savers
@every_keep
@pytest.mark.parametrize("depth", (1, 4))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_gradients(
    policy: MemoryPolicy, keep: Keep, depth: int, dtype: torch.dtype, tolerance: float
) -> None:
    """With dropout and drop path; in the first step, which is observed, and in the next."""
    sequence = make_sequence(depth, dropout=0.3, drop_path=0.2, dtype=dtype)
    stored = train_step(sequence)
    set_memory(sequence, policy, keep=keep)
    for _ in range(2):
        assert_same_step(train_step(sequence, policy=None), stored, tolerance)


@savers
@every_keep
def test_under_autocast(policy: MemoryPolicy, keep: Keep) -> None:
    sequence = make_sequence(3, dtype=torch.float32)
    stored = train_step(sequence, autocast=True)
    set_memory(sequence, policy, keep=keep)
    assert_same_step(train_step(sequence, policy=None, autocast=True), stored, 5e-3)


@savers
@every_keep
def test_two_backward_passes_hooks_on_weights_and_swapped_weights(
    policy: MemoryPolicy, keep: Keep
) -> None:
    sequence = make_sequence(2)
    params = {name: 1.5 * param.detach() for name, param in sequence.named_parameters()}

    def grads() -> dict[str, Any]:
        fast = {name: param.clone().requires_grad_() for name, param in params.items()}
        for param in fast.values():
            param.register_hook(lambda grad: 2 * grad)
        y1, y2 = torch.func.functional_call(sequence, fast, make_streams())
        loss = y1.square().sum() + y2.sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return {name: param.grad for name, param in fast.items()}

    set_memory(sequence, "store")
    stored = grads()
    set_memory(sequence, policy, keep=keep)
    assert_grads_near(grads(), stored, 1e-9)


@savers
@pytest.mark.parametrize("name", ("rev_mvit_base", "mvit_base", "vit_tiny"))
def test_models(policy: MemoryPolicy, name: str) -> None:
    """Transitions and twins, and a convolution among the products."""
    if policy == "reversible" and not name.startswith("rev"):
        pytest.skip("not reversible")
    small: dict[str, Any] = {"depth": 4, "img_size": 32, "num_classes": 3}
    if "mvit" in name:
        small |= {"embed_dim": 16, "transitions": (1, 2, 3)}
    torch.manual_seed(0)
    model = backbones.create_model(name, **small).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def grads(*how: Any, **more: Any) -> dict[str, Any]:
        set_memory(model, *how, **more)
        model.zero_grad()
        model(x).square().sum().backward()
        # A bias of the keys has none but by rounding.
        named = model.named_parameters()
        return {k: p.grad.clone() for k, p in named if not k.endswith("norm_k.bias")}

    stored = grads("store")
    for keep in (("g.mlp.fc2",), ("*",), "products"):
        assert_grads_near(grads(policy, keep=keep), stored, 1e-9)


def operations(sequence: nn.Module) -> int:
    with count_operations() as count:
        y1, y2 = sequence(*make_streams())
        (y1.sum() + y2.sum()).backward()
    return count.get_total_flops()


@savers
def test_operations(policy: MemoryPolicy) -> None:
    """A linear layer that is kept is not run again; of all products, none is."""
    sequence = make_sequence(4)
    set_memory(sequence, "store")
    stored = operations(sequence)
    counts = []
    for keep in ((), ("g.mlp.fc2",), ("g.mlp.*",), "products"):
        set_memory(sequence, policy, keep=keep)
        operations(sequence)  # the first pass is observed
        counts.append(operations(sequence))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) >= 3
    assert counts[-1] == stored < counts[0]


def test_bytes() -> None:
    """What is kept is held, and nothing else."""
    sequence = make_sequence(8)
    held = {}
    for keep in ((), ("g.mlp.fc2",), ("g.mlp.*",)):
        set_memory(sequence, "reversible", keep=keep)
        sequence(*make_streams())
        with saved_bytes(ignore=sequence) as saved:
            outputs = sequence(*make_streams())
        held[keep] = saved.bytes
        del outputs
    stream = make_streams()[0].numel() * 8
    assert held[("g.mlp.fc2",)] - held[()] == 8 * stream
    assert held[("g.mlp.*",)] - held[()] == 8 * 3 * stream


def test_patterns() -> None:
    sequence = make_sequence(2)
    set_memory(sequence, "reversible", stored_blocks=1, keep=("*.fc2", "f.*.proj"))
    assert blocks_of(sequence)["blocks.0"].keep == ("g.mlp.fc2", "f.attn.proj")
    set_memory(sequence, "reversible", keep=["products"])
    assert blocks_of(sequence)["blocks.0"].keep is None
    set_memory(sequence, "reversible")
    assert blocks_of(sequence)["blocks.0"].keep == ()
    # Behind the name of a block, or its end, of this block alone; * reaches all linear layers.
    wrapped = nn.Sequential(sequence)
    for start in ("0.blocks.1", "blocks.1", "1"):
        set_memory(wrapped, "reversible", keep=(f"{start}.products", "blocks.0.g.*"))
        kept = [block.keep for block in blocks_of(wrapped).values()]
        assert kept == [("g.mlp.fc1", "g.mlp.fc2"), None]
    set_memory(wrapped, "reversible", keep=("*",))
    assert None not in [block.keep for block in blocks_of(wrapped).values()]
    with pytest.raises(ValueError, match=r"linear layer 'blocks\.2\.g\.mlp\.fc2'"):
        set_memory(sequence, "reversible", keep=("blocks.2.g.mlp.fc2",))
    with pytest.raises(ValueError, match=r"linear layer 'g\.mlp\.fc3'; did you mean g\.mlp\.fc"):
        set_memory(sequence, "reversible", keep=("g.mlp.fc3",))
    set_memory(sequence, "reversible", keep="g.mlp.fc2")
    assert blocks_of(sequence)["blocks.1"].keep == ("g.mlp.fc2",)


def test_compiled_blocks_keep_nothing() -> None:
    model = backbones.create_model("rev_vit_tiny", img_size=32, depth=2, compile=True)
    with pytest.raises(ValueError, match="keep goes without compile"):
        set_memory(model, "reversible", keep=("g.mlp.fc2",))
    plan = backbones.fit_memory(model, torch.zeros(2, 3, 32, 32), "10GB")
    assert plan.keep == () and plan.stored_blocks == 2
    eager = make_sequence(2)
    set_memory(eager, "reversible", keep="products")
    with pytest.raises(ValueError, match="set_memory without keep first"):
        backbones.compile_blocks(eager)


def test_products_that_return_numbers_beside_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernels of attention on a GPU do."""
    with torch.library._scoped_library("backbones_test", "DEF") as library:
        library.define("product(Tensor x) -> (Tensor, int, Tensor?)")
        library.impl("product", lambda x: (2 * x, 7, None), "CPU")
        product = torch.ops.backbones_test.product
        monkeypatch.setitem(flop_registry, product, lambda *_, **__: 0)
        kept, tensors, x = Kept(None), [], torch.ones(3)
        with kept.recorded(tensors):
            product(x)
        with kept.played(tensors, None):
            out, number, nothing = product(torch.zeros(3))
            with pytest.raises(RuntimeError, match="more products in its second run"):
                product(x)
    assert torch.equal(out, 2 * x) and number == 7 and nothing is None and len(tensors) == 1
