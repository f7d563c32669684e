"""What the policies hold between forward and backward, counted in two independent ways."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones import MemoryPolicy, set_memory
from tests.backbones.helpers import loss_of, make_sequence
from tests.backbones.saved_bytes import saved_bytes

SHAPE = (2, 50, 8)  # what autograd holds at this size is activations, not odds and ends
STREAM = 2 * 50 * 8 * 8  # bytes of one float64 stream


class AllocatedBytes(TorchDispatchMode):
    """Counts the storages that operators made in the context and that are still alive.

    It takes no notice of who keeps them, so it sees what autograd does not know of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def without(self, module: nn.Module, *tensors: Tensor) -> int:
        """Bytes alive now, without ``tensors`` and the parameters of ``module`` and their grads."""
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        known = {x.untyped_storage()._cdata for x in (*module.parameters(), *grads, *tensors)}
        alive = {c: size for c, (ref, size) in self.storages.items() if not ref.expired()}
        return sum(size for cdata, size in alive.items() if cdata not in known)


def held(policy: MemoryPolicy, depth: int, k: int = 0, randomness: float = 0.0) -> tuple[int, int]:
    """Bytes held after the forward pass: saved by autograd, and allocated at all."""
    sequence = make_sequence(depth, randomness, randomness)
    set_memory(sequence, policy, k)
    x1, x2 = torch.randn(2, *SHAPE, dtype=torch.float64)
    sequence(x1, x2)  # in which blocks are looked at; the next pass is like all others
    with AllocatedBytes() as allocated, saved_bytes(ignore=sequence) as saved:
        loss = loss_of(*sequence(x1, x2))
    counts = saved.bytes, allocated.without(sequence, loss)
    loss.backward()
    assert saved.bytes == 0
    return counts


def per_block(policy: MemoryPolicy, k: int = 0, randomness: float = 0.0) -> tuple[float, float]:
    """How the two counts grow with each further block in front."""
    shallow, deep = held(policy, 4, k, randomness), held(policy, 12, k, randomness)
    return (deep[0] - shallow[0]) / 8, (deep[1] - shallow[1]) / 8


@pytest.mark.parametrize("randomness", (0.0, 0.2))
def test_reversed_blocks_hold_nothing(randomness: float) -> None:
    stored = per_block("store", randomness=randomness)
    assert stored[0] == pytest.approx(stored[1], rel=0.01)
    assert stored[0] > 10 * STREAM
    for k in (0, 2):
        grown = per_block("reversible", k, randomness)
        assert grown[0] < 0.01 * stored[0], "saved by autograd"
        assert grown[1] < 0.01 * stored[0], "allocated, by whoever keeps it"


def test_a_sequence_of_reversed_blocks_holds_its_two_outputs() -> None:
    saved_by_loss = 4 * STREAM  # two ramps, two differences, at most
    assert 2 * STREAM <= held("reversible", 6)[0] <= 2 * STREAM + saved_by_loss


def test_checkpoints_hold_the_two_streams_of_each_block() -> None:
    assert per_block("checkpoint") == (2 * STREAM, 2 * STREAM)
    assert per_block("reversible")[0] < per_block("checkpoint")[0] < per_block("store")[0]


def test_memory_grows_with_the_stored_blocks_only() -> None:
    stored = per_block("store")
    counts = [held("reversible", 8, k) for k in range(1, 9)]
    for before, after in pairwise(counts):
        assert after[0] - before[0] == pytest.approx(stored[0], rel=0.01)
        assert after[1] - before[1] == pytest.approx(stored[1], rel=0.01)
    assert counts[-1][0] == held("store", 8)[0]


@pytest.mark.parametrize("policy, k", [("store", 0), ("reversible", 0), ("reversible", 3)])
def test_nothing_is_left_after_the_backward_pass(policy: MemoryPolicy, k: int) -> None:
    """With the loss and the outputs still alive: their graph must have let go of everything."""
    sequence = make_sequence(6, 0.2, 0.2)
    set_memory(sequence, policy, k)
    x1, x2 = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gc.collect()
    with AllocatedBytes() as allocated:
        y1, y2 = sequence(x1, x2)
        loss = loss_of(y1, y2)
        loss.backward()
    left = allocated.without(sequence, loss, y1, y2, x1, x2, x1.grad, x2.grad)
    drop_path_masks = 6 * SHAPE[0] * 8
    assert left <= drop_path_masks


def test_the_graph_is_freed_without_the_garbage_collector() -> None:
    """A cycle through a node would keep activations until the collector happens to run."""
    sequence = make_sequence(4, 0.2, 0.2)
    x = torch.randn(SHAPE, dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False):
            with AllocatedBytes() as allocated:
                y1, y2 = sequence(x, x)
                nodes = [weakref.ref(y1), weakref.ref(y2)]
                if backward:
                    loss_of(y1, y2).backward()
                del y1, y2
            assert [node() for node in nodes] == [None, None]
            assert allocated.without(sequence, x) == 0
    finally:
        gc.enable()


def test_branch_outputs_die_in_the_forward_pass() -> None:
    sequence = make_sequence(4)
    made: list[weakref.ref[Tensor]] = []

    def noted(y: Tensor) -> Tensor:
        made.append(weakref.ref(y))
        return y

    for module in sequence.modules():
        if isinstance(module, nn.Linear):
            # Not a hook, with which the block would store.
            vars(module)["forward"] = lambda x, run=module.forward: noted(run(x))
    outputs = sequence(*torch.randn(2, *SHAPE, dtype=torch.float64))
    assert len(made) == 16 and all(ref() is None for ref in made)
    assert all(y.requires_grad for y in outputs)


def test_peak_of_the_backward_pass_does_not_grow_with_depth() -> None:
    """Going backwards, rebuilt streams are dropped as soon as the block before has them."""

    def peak(depth: int) -> int:
        sequence = make_sequence(depth)
        highest = 0

        class Peak(AllocatedBytes):
            def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
                nonlocal highest
                out = super().__torch_dispatch__(*args, **kwargs)
                highest = max(highest, self.without(sequence))
                return out

        streams = torch.randn(2, *SHAPE, dtype=torch.float64)
        with Peak():
            loss_of(*sequence(*streams)).backward()
        return highest

    assert peak(9) <= 1.01 * peak(3)


# ---- saved_bytes itself


def test_saved_bytes_counts_storages_once_and_whole() -> None:
    x = torch.randn(100, requires_grad=True)
    with saved_bytes() as saved:
        y = x.exp()  # saves y
        z = y[:10].sin() + y[10:20].cos()  # save views of y
    assert saved.bytes == 400
    del y, z
    assert saved.bytes == 0


def test_saved_bytes_does_not_mistake_reused_memory_for_the_same_tensor() -> None:
    """Graphs that end within the context count no more, even where their memory is reused."""
    x = torch.randn(1000, requires_grad=True)
    with saved_bytes() as saved:
        kept = []
        for _ in range(20):
            x.exp()  # freed at once; the next allocation takes its place
            kept.append(x.exp())
    assert saved.bytes == 20 * 4000


def test_saved_bytes_ignores_parameters_but_not_their_copies() -> None:
    linear = nn.Linear(64, 64)
    x = torch.randn(8, 64)
    with saved_bytes() as everything, torch.no_grad():
        pass
    assert everything.bytes == 0
    with saved_bytes() as everything:
        y = linear(linear(x))
    with saved_bytes(ignore=linear) as ignoring:
        z = linear(linear(x))
    with saved_bytes(ignore=linear) as autocast, torch.autocast("cpu", torch.bfloat16):
        w = linear(linear(x))
    activations = 2 * 8 * 64 * 4
    assert ignoring.bytes == activations
    assert everything.bytes == activations + 64 * 64 * 4
    assert autocast.bytes == activations // 2 + 64 * 64 * 2
    del y, z, w
