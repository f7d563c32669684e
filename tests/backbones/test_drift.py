"""Numerical drift: what it measures, and that it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from backbones import (
    ReversibleBlock,
    ReversibleSequence,
    RevMViT,
    RevViT,
    create_model,
    probe_drift,
    set_memory,
)
from backbones.__main__ import main
from backbones.engine.policies import blocks_of
from backbones.memory.drift import WARNING_THRESHOLD, BlockDrift, DriftReport
from backbones.models.layers import MLPBranch
from tests.backbones.helpers import Capture, assert_grads_near, refused

DEPTH = 4


def small_vit(depth: int = DEPTH, **arguments: Any) -> RevViT:
    torch.manual_seed(1)
    model = RevViT(16, 8, 3, 5, embed_dim=16, depth=depth, num_heads=2, **arguments)
    with torch.no_grad():  # larger than at the start of training, as those of trained models are
        for param in model.blocks.parameters():
            param.mul_(4.0 if param.ndim > 1 else 1.0)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.float64, 1e-12)))
def test_it_drifts_little(dtype: torch.dtype, bound: float) -> None:
    report = probe_drift(small_vit().to(dtype), images().to(dtype))
    assert [block.name for block in report.blocks] == [f"blocks.blocks.{i}" for i in range(DEPTH)]
    assert 0.0 < report.reconstruction < bound
    assert 0.0 < report.gradient <= report.worst_gradient < bound
    assert report.ok
    header, *rows, total, verdict = str(report).splitlines()
    assert header.split() == ["fp32", "reconstruction", "gradient"]
    assert len(rows) == DEPTH
    assert {len(line) for line in (header, *rows, total)} == {len(header)}
    assert verdict.startswith("ok")


def test_it_is_the_error_of_the_inverse() -> None:
    """The first block's error is that of the whole sequence, from its outputs backwards."""
    model = small_vit().eval()
    report = probe_drift(model, images())
    sequence = cast(ReversibleSequence, model.blocks)
    with torch.no_grad():
        tokens = cast(Tensor, model.pos_embed(model.patch_embed(images())))
        x1, x2 = sequence.inverse(*sequence(tokens, tokens))
    true, rebuilt = torch.cat((tokens, tokens)), torch.cat((x1, x2))
    expected = (rebuilt.double() - true.double()).norm() / true.double().norm()
    assert report.blocks[0].reconstruction == pytest.approx(float(expected))


def test_drift_grows_from_the_last_block_to_the_first_and_with_depth() -> None:
    deep, shallow = (probe_drift(small_vit(depth), images()) for depth in (24, 3))
    assert deep.blocks[0].reconstruction > 2 * deep.blocks[-1].reconstruction
    assert deep.reconstruction > 2 * shallow.reconstruction
    assert deep.gradient > shallow.gradient


def test_streams_in_half_precision_drift_more() -> None:
    """Which is why autocast leaves them in float32: there even bfloat16 branches rebuild well."""
    single = probe_drift(small_vit(), images(), "fp32")
    autocast = probe_drift(small_vit(), images(), "bf16")
    streams = probe_drift(small_vit().bfloat16(), images().bfloat16(), "fp32")
    assert autocast.precision == "bf16"
    for mild in (single, autocast):
        assert streams.reconstruction > 1000 * mild.reconstruction
        assert streams.gradient > 1000 * mild.gradient


def test_ambient_autocast_is_out_of_force() -> None:
    alone = probe_drift(small_vit(), images(), "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        assert probe_drift(small_vit(), images(), "fp32") == alone


@pytest.mark.parametrize("clips", (False, True))
def test_every_sequence_of_a_multiscale_model(clips: bool) -> None:
    frames = 4 if clips else None
    model = RevMViT(32, frames, 3, 5, embed_dim=8, depth=6, transitions=(1, 3), fusion="avg")
    x = torch.randn(2, 3, *((4,) if clips else ()), 32, 32)
    report = probe_drift(model, x)
    names = [name for name, part in model.named_modules() if isinstance(part, ReversibleBlock)]
    assert [block.name for block in report.blocks] == names and len(names) == 4
    assert report.ok and report.worst_gradient < 1e-5


def test_everything_is_as_it_was() -> None:
    model = small_vit(drop_path_rate=0.5, drop_rate=0.5)
    set_memory(model, "checkpoint", stored_blocks=1)
    model.get_submodule("blocks.blocks.1").eval()
    model(images()).sum().backward()
    managed = blocks_of(model).values()

    def state() -> list[object]:
        return [
            [module.training for module in model.modules()],
            [block.memory_policy for block in managed],
            [len(module._forward_hooks) for module in model.modules()],
        ]

    before, values = state(), copy.deepcopy(model.state_dict())
    grads = copy.deepcopy({name: param.grad for name, param in model.named_parameters()})
    random_state, x = torch.get_rng_state(), images()
    probe_drift(model, x, "bf16")
    with pytest.raises((RuntimeError, ValueError)):
        probe_drift(model, images()[:, :2])  # and after an error
    assert state() == before
    assert_grads_near({name: p.grad for name, p in model.named_parameters()}, grads, 0.0)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not x.requires_grad and x.grad is None


def test_a_frozen_trunk_has_the_gradient_of_its_input() -> None:
    model = small_vit().requires_grad_(False)
    report = probe_drift(model, images())
    assert all(block.gradient is None for block in report.blocks)
    assert 0.0 < report.gradient < 1e-5
    assert "blocks.blocks.0" in str(report)


def test_the_report_warns() -> None:
    assert DriftReport("fp32", [BlockDrift("b", 1e-7, 1e-7)], 1e-7).ok
    for bad in (2 * WARNING_THRESHOLD, float("inf"), float("nan")):
        report = DriftReport("fp16", [BlockDrift("b", 1e-3, bad), BlockDrift("c", 0.0, 0.0)], 1e-3)
        assert not report.ok
        assert "WARNING" in str(report)
    assert not DriftReport("fp16", [BlockDrift("b", float("nan"), None)], 0.0).ok


class _NoHalf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("\"fancy_kernel\" not implemented for 'Half'\nand a long trace")
        return x


def test_a_missing_operation_is_one_clear_line() -> None:
    model = nn.Sequential(small_vit(), _NoHalf())
    assert probe_drift(model, images(), "fp32").ok
    with pytest.raises(RuntimeError, match=r"^fp16 does not run on cpu: .*fancy_kernel.*$"):
        probe_drift(model, images(), "fp16")


class _Own(nn.Module):
    """A sequence whose branches are not this package's."""

    def __init__(self, head: Callable[[tuple[Tensor, Tensor]], Any]) -> None:
        super().__init__()
        blocks = (ReversibleBlock(nn.Linear(8, 8), MLPBranch(8)) for _ in range(2))
        self.trunk, self.head = ReversibleSequence(blocks), head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.trunk(x, x))


def test_a_module_of_ones_own() -> None:
    assert probe_drift(_Own(lambda streams: torch.cat(streams, -1)), torch.randn(3, 8)).ok


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'fp8' does not exist"):
        probe_drift(small_vit(), images(), "fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear holds no reversible blocks: use a rev_"):
        probe_drift(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="meta"):
        probe_drift(small_vit().to("meta"), images().to("meta"))
    with pytest.raises(TypeError, match="one tensor, not a tuple"):
        probe_drift(_Own(lambda streams: streams), torch.randn(3, 8))


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_command(precision: str, tmp_path: Path, capsys: Capture) -> None:
    model = create_model("rev_vit_tiny", num_classes=5, depth=3, img_size=32)
    torch.save(model.state_dict(), tmp_path / "other_head.pth")
    given = "--model rev_vit_tiny --depth 3 --img-size 32 --device cpu --precision"
    weights = str(tmp_path / "other_head.pth")
    assert main(["drift", *given.split(), precision, "--weights", weights]) == 0
    out, err = capsys.readouterr()
    assert "left out head.weight, head.bias: 5 classes, the model has 1000" in err
    assert out.split()[0] == precision and out.count("\n") == 3 + 3


@pytest.mark.parametrize(
    "arguments, message",
    (
        ("--model rev_vit_tinny", "did you mean rev_vit_tiny"),
        ("--model vit_tiny --depth 1 --img-size 32", "no reversible blocks"),
        ("--model rev_mvit_base --depth 4", "transitions must rise"),
        ("--model rev_vit_tiny --device cuda:99", "--device cuda:99 cannot be used"),
        ("--model rev_vit_tiny --weights no.pth", "cannot read no.pth"),
    ),
)
def test_command_refuses(arguments: str, message: str, capsys: Capture) -> None:
    assert message in refused(["drift", "--device", "cpu", *arguments.split()], capsys)
