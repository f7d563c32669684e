"""fit_memory: its prediction against what the CPU's allocator hands out, and what it chooses."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import profile

from backbones import MemoryPolicy, RevViT, create_model, fit_memory
from backbones.fit import parse_budget, predict_memory
from backbones.fit_command import main
from backbones.memory import MemoryManaged
from backbones.models import _REGISTRY
from backbones.simulate import PARTS

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
    return [b.memory_policy for b in model.modules() if isinstance(b, MemoryManaged)]


@cache
def peaks(name: str) -> list[int]:
    """The predicted peak for each number of stored blocks, from none to all."""
    model, x = make(name)
    policy: MemoryPolicy = "reversible" if name.startswith("rev_") else "checkpoint"
    blocks = len(policies_of(model))
    return [sum(predict_memory(model, x, policy, k).values()) for k in range(blocks + 1)]


def measured_peak(model: nn.Module, x: Tensor) -> int:
    """Peak bytes of the second training step, by the allocations that the profiler records.

    They are the allocator's own, so what kernels take inside counts too.
    """
    optimizer = torch.optim.AdamW(model.parameters())
    labels = torch.arange(len(x))

    def step() -> None:
        nn.functional.cross_entropy(model(x), labels).backward()
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


@pytest.mark.parametrize("stored", (0, 3, 4))
@pytest.mark.parametrize("name", ("rev_vit_tiny", "rev_mvit_base"))
def test_the_prediction_is_what_the_allocator_hands_out(name: str, stored: int) -> None:
    model, x = make(name)
    budget = peaks(name)[stored]
    plan = fit_memory(model, x, budget)
    assert plan.stored_blocks >= stored  # more, where the peak is elsewhere
    assert sum(plan.parts.values()) == plan.predicted_bytes <= plan.budget == budget
    measured = measured_peak(model, x)
    print(f"{name}, {plan}\nmeasured {measured}: {plan.predicted_bytes / measured - 1:+.2%}")
    assert plan.predicted_bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_grows_with_the_stored_blocks(name: str) -> None:
    predicted = peaks(name)
    assert predicted == sorted(predicted)
    assert predicted[-1] > 1.1 * predicted[0]


def test_the_most_stored_blocks_that_fit_are_chosen_and_set() -> None:
    model, x = make("rev_mvit_base")
    before = [p.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    budget = peaks("rev_mvit_base")[3] - 1
    stored = max(k for k, peak in enumerate(peaks("rev_mvit_base")) if peak <= budget)
    plan = fit_memory(model, x, budget)
    assert (plan.policy, plan.stored_blocks, plan.blocks) == ("reversible", stored, 4)
    assert policies_of(model)[4 - stored :] == ["store"] * stored
    assert "store" not in policies_of(model)[: 4 - stored]
    assert f"the last {stored} of 4 blocks stored" in str(plan)
    assert all(f"  {part} " in str(plan) for part in PARTS)
    # Nothing else about the model has changed.
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_large_budget_stores_everything_and_a_twin_is_checkpointed() -> None:
    model, x = make("vit_tiny")
    plan = fit_memory(model, x, "1TB")
    assert (plan.policy, plan.stored_blocks, plan.relative_speed) == ("checkpoint", 2, 1.0)
    assert policies_of(model) == ["store", "store"]
    fit_memory(model, x, peaks("vit_tiny")[2] - 1)
    assert policies_of(model)[0] == "checkpoint"


def test_a_budget_too_small_says_what_the_smallest_is() -> None:
    model, x = make("vit_tiny")
    before = policies_of(model)
    with pytest.raises(ValueError, match=f"smallest budget is {peaks('vit_tiny')[0]} bytes"):
        fit_memory(model, x, peaks("vit_tiny")[0] - 1)
    assert policies_of(model) == before


def test_attention_is_counted_as_fused() -> None:
    """Of attention, held memory grows with the number of tokens N, not with N x N."""
    held = []
    for size in (128, 256):
        x = torch.zeros(1, 3, size, size)
        model = create_model("vit_tiny", embed_dim=16, num_heads=4, depth=1, patch_size=4)
        held.append(predict_memory(model, x, "store")["held activations"])
    assert held[1] < 4.5 * held[0]
    assert F.scaled_dot_product_attention.__module__ != "backbones.fit"


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


def test_the_command_prints_a_table_and_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "memory.png"
    small = {"embed_dim": 192, "depth": 3, "num_heads": 3}
    monkeypatch.setitem(_REGISTRY, "small", (RevViT, small))
    arguments = ["--model", "small", "--input", "16x3x256x256", "--budget", "150MB"]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        pass
    else:
        arguments += ["--plot", str(picture)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # no check on a GPU
    main(arguments)
    out = capsys.readouterr().out
    header, totals = (next(x for x in out.splitlines() if w in x) for w in ("store ", "total"))
    *policies, mixture = header.split()
    assert policies == ["store", "checkpoint", "reversible"]
    store, _, reversible, chosen = map(parse_budget, re.findall(r"[\d.]+ [MG]B", totals))
    assert store > 150e6 >= chosen > reversible
    assert f"stored_blocks={mixture.removeprefix('reversible+')})" in out
    assert all(f"\n{part} " in out for part in PARTS)
    assert "--plot" not in arguments or picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "rev_vit_tiny", "--input", "8x3x224"], "give BxCxHxW"),
        (["--model", "rev_vit_tiny", "--input", "8x3x0x224"], "give BxCxHxW"),
        (["--model", "rev_vit_tinny", "--input", "8x3x224x224"], "did you mean"),
        (["--model", "rev_vit_tiny", "--input", "8x4x224x224"], "expected images"),
        (["--model", "vit_tiny", "--input", "1x3x32x32", "--budget", "1MB"], "smallest"),
    ],
)
def test_the_command_ends_with_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_module_runs_as_a_command_without_a_warning() -> None:
    command = [sys.executable, "-m", "backbones.memory", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "8x3x224x224" in done.stdout and not done.stderr
