"""fit_memory: its prediction against what the allocator hands out, and what it chooses."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import profile

from backbones import MemoryPolicy, create_model, fit_memory, set_memory
from backbones.commands.real_steps import Trial
from backbones.engine.policies import Keep, blocks_of
from backbones.memory.budget import fastest_that_fits, parse_budget
from backbones.memory.simulation import Simulation
from backbones.models.layers import ResidualBlock
from tests.backbones.helpers import count_operations
from tests.backbones.saved_bytes import saved_bytes

# Small, but with activations and a working set that are no trifle beside the parameters.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "rev_vit_tiny": (
        {"embed_dim": 96, "depth": 4, "img_size": 64, "patch_size": 8},
        (8, 3, 64, 64),
    ),
    "rev_mvit_base": (
        {"embed_dim": 16, "depth": 4, "transitions": (1, 3), "img_size": 64},
        (4, 3, 64, 64),
    ),
    "vit_tiny": ({"embed_dim": 48, "depth": 2, "patch_size": 8}, (8, 3, 64, 64)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    arguments, shape = MODELS[name]
    torch.manual_seed(0)
    return create_model(name, num_classes=10, **arguments), torch.randn(shape)


def policies_of(model: nn.Module) -> list[MemoryPolicy]:
    return [block.memory_policy for block in blocks_of(model).values()]


@cache
def simulation(name: str, autocast: torch.dtype | None = None) -> Simulation:
    """One for all tests: it keeps the steps that it has counted."""
    return Simulation(*make(name), "cpu", autocast)


def peaks(name: str) -> list[int]:
    """The predicted peak for each number of stored blocks, from none to all."""
    counted = simulation(name)
    policy = counted.saving_policy
    assert policy == ("reversible" if name.startswith("rev_") else "checkpoint")
    return [counted.step(policy, k).peak_bytes for k in range(counted.blocks + 1)]


def measured_peak(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> int:
    """Peak bytes of the second training step, by the allocations that the profiler records.

    They are the allocator's own, so what kernels take inside counts too.
    """
    optimizer = torch.optim.AdamW(model.parameters())
    labels = torch.arange(len(x))

    def step() -> None:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = model(x)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the state of the optimizer, which is there from now on
    with profile(profile_memory=True) as recorded:
        step()
    results: Any = recorded.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    highest = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    states = (t for state in optimizer.state.values() for t in state.values())
    there = [x, *model.parameters(), *model.buffers(), *states]
    return highest + sum(tensor.untyped_storage().nbytes() for tensor in there)


@pytest.mark.parametrize(
    "stored, keep",
    [
        *((0, ()), (3, ()), (4, ()), (0, ("g.mlp.fc2",)), (1, ("g.*", "f.attn.qkv"))),
        *((0, "products"), (0, ("g.mlp.fc2", "*0.products"))),
    ],
)
@pytest.mark.parametrize("name", ("rev_vit_tiny", "rev_mvit_base"))
def test_the_prediction_is_what_the_allocator_hands_out(name: str, stored: int, keep: Keep) -> None:
    model, x = make(name)
    predicted = simulation(name).step("reversible", stored, keep).peak_bytes
    set_memory(model, "reversible", stored, keep)
    measured = measured_peak(model, x)
    print(f"{name}, {stored} stored, {keep} kept: {predicted}, measured {measured}")
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("autocast", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("rev_vit_tiny", "rev_mvit_base"))
def test_what_is_held_is_what_autograd_saves(name: str, autocast: torch.dtype | None) -> None:
    model, x = make(name)
    for policy in get_args(MemoryPolicy):
        set_memory(model, policy)
        with saved_bytes(ignore=model) as saved:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                logits = model(x)
            loss = logits.float().square().sum()
            # The stem saves the input, which is a part of its own; of autocast's copy it is not.
            measured = saved.bytes - (x.nbytes if autocast is None else 0)
        del loss
        predicted = simulation(name, autocast).step(policy).held_bytes
        print(f"{name}, {policy}, {autocast}: held {predicted}, measured {measured}")
        assert predicted == pytest.approx(measured, rel=0.1)


def test_the_peak_under_autocast() -> None:
    model, x = make("rev_vit_tiny")
    policies: tuple[MemoryPolicy, ...] = ("store", "reversible")
    for policy in policies:
        set_memory(model, policy)
        measured = measured_peak(model, x, torch.bfloat16)
        predicted = simulation("rev_vit_tiny", torch.bfloat16).step(policy).peak_bytes
        assert predicted == pytest.approx(measured, rel=0.1)
        assert predicted < 0.95 * simulation("rev_vit_tiny").step(policy).peak_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("autocast", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("policy", ("store", "checkpoint", "reversible"))
@pytest.mark.parametrize("name", ("rev_vit_small", "rev_mvit_base"))
def test_the_prediction_on_a_gpu(
    name: str, policy: MemoryPolicy, autocast: torch.dtype | None
) -> None:
    """At a size beside which the libraries' own workspaces, tens of MB, are small."""
    shape = (64, 3, 224, 224)
    model = create_model(name).cuda()
    predicted = Simulation(model, torch.empty(shape), "cuda", autocast).step(policy).peak_bytes
    allocated = Trial(model, autocast).allocated_peak(shape, policy, 0)
    if allocated is None:
        pytest.skip(f"a step of {predicted / 1e9:.1f} GB does not fit this GPU")
    print(f"{name}, {policy}, {autocast}: {predicted}, allocated {allocated}")
    assert predicted == pytest.approx(allocated, rel=0.1)


def test_bytes_are_told_apart_by_stage() -> None:
    arguments, shape = MODELS["rev_mvit_base"]
    deep = create_model("rev_mvit_base", num_classes=10, **{**arguments, "depth": 5})
    small = dict(simulation("rev_mvit_base").step("store").held)
    deeper = Simulation(deep, torch.zeros(shape), "cpu").step("store").held
    assert list(small) == ["stem", "stage 1", "stage 2", "stage 3", "head"]
    assert all(size > 0 for size in small.values())
    assert deeper.pop("stage 3") > 1.2 * small.pop("stage 3")
    assert deeper == small


def test_blocks_in_a_row_are_one_stage() -> None:
    model, x = make("vit_tiny")
    step = Simulation(model, x, "cpu").step("store")
    assert list(step.held) == ["stem", "stage 1", "head"]
    # Of a stem, autograd needs the image alone, and that is the input.
    assert step.held["stage 1"] > 0.9 * step.held_bytes
    params = sum(param.nbytes for param in model.parameters())
    assert step.peak["parameters"] == params
    # Two moments for each parameter, and the number of steps.
    assert 0 <= step.peak["optimizer state"] - 2 * params <= 8 * len(list(model.parameters()))
    assert step.peak["input"] == x.nbytes


def test_of_a_small_batch_the_peak_is_the_update() -> None:
    """When all gradients are there, and no activation any more."""
    model, x = ResidualBlock(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(1, 64)
    step = Simulation(model, x, "cpu").step("store")
    assert step.peak["gradients"] == step.peak["parameters"] > 0
    assert all(step.peak[part] == 0 for part in step.held)
    assert step.peak_bytes == pytest.approx(measured_peak(model, x), rel=0.02)


def test_norms_under_autocast_are_counted_as_on_cuda() -> None:
    """Which runs them in float32. The dispatcher itself is asked: fake tensors need no GPU."""

    def block() -> ResidualBlock:
        return ResidualBlock(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in "fg"))

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"):
        on_cuda, x = block(), torch.zeros(64, 8)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast wants to see a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with saved_bytes(ignore=on_cuda) as saved:
                loss = on_cuda(x).square().sum()
            expected = saved.bytes
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    del loss

    def held(device_type: str) -> int:
        counted = Simulation(block(), torch.zeros(64, 8), device_type, torch.bfloat16)
        return counted.step("store").held_bytes

    assert held("cuda") == pytest.approx(expected, rel=0.01)
    assert held("cpu") < 0.9 * expected


def test_the_speed_is_that_of_the_operations() -> None:
    model, x = make("rev_mvit_base")
    plan = fastest_that_fits(simulation("rev_mvit_base"), peaks("rev_mvit_base")[2])
    set_memory(model, plan.policy, plan.stored_blocks, plan.keep)
    model(x)  # in which blocks are observed

    def operations() -> int:
        with count_operations() as counter:
            model(x).square().sum().backward()
        return counter.get_total_flops()

    chosen = operations()
    set_memory(model, "store")
    assert plan.relative_speed == pytest.approx(operations() / chosen)
    assert 0.7 < plan.relative_speed < 1.0


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_grows_with_the_stored_blocks(name: str) -> None:
    predicted = peaks(name)
    assert predicted == sorted(predicted)
    assert predicted[-1] > 1.1 * predicted[0]


def test_the_most_stored_blocks_that_fit_are_chosen_and_set() -> None:
    model, x = make("rev_vit_tiny")
    before = [p.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    budget = peaks("rev_vit_tiny")[3] - 1
    plan = fit_memory(model, x, budget)
    stored = plan.stored_blocks
    assert (plan.policy, plan.blocks) == ("reversible", 4)
    assert sum(plan.parts.values()) == plan.predicted_bytes <= budget
    assert policies_of(model)[4 - stored :] == ["store"] * stored
    assert "store" not in policies_of(model)[: 4 - stored]
    assert f"the last {stored} of 4 blocks stored" in str(plan)
    assert all(f"  {part} " in str(plan) for part in plan.parts)
    # Nothing else about the model has changed.
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_forty_budgets(name: str) -> None:
    """A larger budget is never slower, and keeping products never slower than whole blocks."""
    steps = simulation(name)
    old = [steps.step(steps.saving_policy, k) for k in range(steps.blocks + 1)]
    low, high = old[0].peak_bytes, old[-1].peak_bytes
    speeds, wholes = [], []
    for share in range(40):
        budget = low + (high - low) * share // 39
        plan = fastest_that_fits(steps, budget)
        assert plan.predicted_bytes <= budget
        least = min(step.operations for step in old if step.peak_bytes <= budget)
        wholes.append(old[-1].operations / least)
        speeds.append(plan.relative_speed)
    assert speeds == sorted(speeds) and speeds[-1] == 1.0
    gains = [speed - whole for speed, whole in zip(speeds, wholes, strict=True)]
    assert min(gains) >= -1e-12 and max(gains) > 0.02
    print(name, f"{sum(gains) / 40:.3f} faster than whole blocks")


def test_a_large_budget_stores_everything_and_a_twin_is_checkpointed() -> None:
    model, x = make("vit_tiny")
    plan = fit_memory(model, x, "1TB")
    assert (plan.policy, plan.stored_blocks, plan.relative_speed) == ("checkpoint", 2, 1.0)
    assert policies_of(model) == ["store", "store"]
    half = fit_memory(model, x, "1TB", autocast=torch.bfloat16)
    assert half.predicted_bytes < 0.8 * plan.predicted_bytes
    fit_memory(model, x, peaks("vit_tiny")[2] - 1)
    assert policies_of(model)[0] == "checkpoint"


def test_a_budget_too_small_says_what_the_smallest_is() -> None:
    """In slices of one sample; it is then enough, and one byte less is not."""
    model, x = make("vit_tiny")
    x = x[:2]
    before = policies_of(model)
    with pytest.raises(ValueError, match=r"smallest budget is \d+ bytes") as refusal:
        fit_memory(model, x, 1000)
    assert policies_of(model) == before
    smallest = int(re.findall(r"is (\d+) bytes", str(refusal.value))[0])
    with pytest.raises(ValueError, match=f"smallest budget is {smallest} bytes"):
        fit_memory(model, x, smallest - 1)
    assert fit_memory(model, x, smallest).predicted_bytes == smallest


@pytest.mark.parametrize("device_type, dropout", (("cpu", 0.0), ("cuda", 0.1)))
def test_attention_is_counted_as_fused(device_type: str, dropout: float) -> None:
    """Of attention, held memory grows with the number of tokens N, not with N x N."""
    original = F.scaled_dot_product_attention
    held = []
    for size in (128, 256):
        arguments = {"embed_dim": 16, "num_heads": 4, "depth": 1, "patch_size": 4}
        model = create_model("vit_tiny", **arguments, attn_drop_rate=dropout)
        counted = Simulation(model, torch.zeros(1, 3, size, size), device_type)
        held.append(counted.step("store").held_bytes)
    assert held[1] < 4.5 * held[0]
    assert F.scaled_dot_product_attention is original


def test_nothing_of_the_size_of_the_activations_is_allocated() -> None:
    class Terabytes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.zeros(10**12, 8, device=x.device)[: len(x)]

    block = ResidualBlock(Terabytes(8, 8), nn.Identity())
    step = Simulation(block, torch.zeros(1, 8).expand(10**12, 8), "cpu").step("store")
    assert step.peak_bytes > 32 * 10**12


@pytest.mark.parametrize(
    "text, size",
    [(7, 7), ("7", 7), ("12GB", 12 * 10**9), ("800 mb", 8 * 10**8), ("1.5GiB", 3 * 2**29)],
)
def test_budgets_are_read(text: int | str, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ("", "much", "-3GB", "0", "12 G B", "3XB", "1e9", "auto"))
def test_bad_budgets_say_what_to_give(text: str) -> None:
    with pytest.raises(ValueError, match="'12GB'"):
        parse_budget(text)


def test_auto_on_a_cpu_and_a_module_without_blocks_are_errors() -> None:
    model, x = make("vit_tiny")
    with pytest.raises(ValueError, match="give a number"):
        fit_memory(model, x, "auto")
    with pytest.raises(ValueError, match="Linear holds no block"):
        fit_memory(nn.Linear(3, 3), torch.zeros(1, 3), "1GB")


class Around(nn.Module):
    """A model around one that can be fitted, which does something with the features."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = create_model("rev_vit_tiny", img_size=32, depth=2, num_classes=0)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


@pytest.mark.parametrize(
    "function",
    (
        lambda x: F.scaled_dot_product_attention(query=x[None], key=x[None], value=x[None]),
        lambda x: F.layer_norm(input=x, normalized_shape=x.shape[-1:]),
    ),
)
def test_functions_called_with_keywords(function: Callable[[Tensor], Tensor]) -> None:
    with torch.device("meta"):
        model, x = Around(function), torch.empty(2, 3, 32, 32)
    assert fit_memory(model, x, "1GB", autocast=torch.bfloat16).stored_blocks == 2


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda model: setattr(model, "function", lambda x: x * x.mean().item()), "values of its"),
        (lambda model: setattr(model, "function", lambda x: x[x > 0]), "values of its tensors"),
        (lambda model: setattr(model, "lock", threading.Lock()), "Around cannot be copied"),
        (lambda model: model.requires_grad_(False), "nothing in Around is trained"),
    ),
)
def test_models_that_cannot_be_fitted(change: Callable[[nn.Module], None], message: str) -> None:
    model = Around(lambda x: x)
    change(model)
    with pytest.raises(ValueError, match=message):
        fit_memory(model, torch.zeros(2, 3, 32, 32), "1GB")


@pytest.mark.parametrize("example", (torch.zeros(0, 3, 32, 32), (2, 3, 32, 32), ()))
def test_inputs_that_are_none(example: Any) -> None:
    with pytest.raises(ValueError, match="example input must be a tensor"):
        fit_memory(Around(lambda x: x), example, "1GB")
