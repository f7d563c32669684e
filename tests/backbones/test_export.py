"""Exported graphs give the numbers of the model, at other batches and sizes than traced at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import backbones
from backbones.__main__ import main
from backbones.common.errors import MissingExtra, UserError
from backbones.weights.graph import export_graph

WINDOWS: dict[str, Any] = {
    "depth": 2,
    "img_size": 64,
    "window_size": 3,
    "global_attn_indexes": (1,),
    "use_rel_pos": True,
}


def randomised(name: str, **arguments: Any) -> nn.Module:
    """A model in which every parameter counts."""
    torch.manual_seed(0)
    model = backbones.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def test_a_graph_takes_other_batches_and_sizes(tmp_path):
    arguments = {"img_size": 64, "depth": 2, "transitions": (1,), "num_classes": 3}
    model = randomised("mvit_base", **arguments, use_rel_pos=True, residual_pooling=True).eval()
    graph = export_graph(model, (3, 64, 64), tmp_path / "m.pt2", 16)
    assert graph.error < 1e-5 and graph.inputs == "(batch, 3, 16 x height, 16 x width)"
    loaded = torch.export.load(str(tmp_path / "m.pt2")).module()
    x = torch.randn(5, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_onnx_of_weights_and_of_maps(tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = randomised("rev_vit_tiny", **WINDOWS, num_classes=4).eval()
    backbones.save_weights(model, tmp_path / "own.safetensors")
    command = ["export", "--weights", str(tmp_path / "own.safetensors")]
    assert main([*command, "--to", str(tmp_path / "m.onnx")]) == 0
    assert "input (batch, 3, 16 x height, 16 x width); at most" in capsys.readouterr().out
    x = torch.randn(3, 3, 80, 112)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-5)
    assert main([*command, "--to", str(tmp_path / "f.pt2"), "--fixed-size", "--maps"]) == 0
    (maps,) = torch.export.load(str(tmp_path / "f.pt2")).module()(torch.zeros(1, 3, 64, 64))
    assert maps.shape == (1, 384, 4, 4)


def test_refusals_leave_no_file(tmp_path, monkeypatch, capsys):
    class Odd(nn.Module):
        """Another function in the graph than outside."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3)) + (1.0 if torch.compiler.is_exporting() else 0.0)

    with pytest.raises(UserError, match="gives other numbers than the model"):
        export_graph(Odd(), (3, 32, 32), tmp_path / "m.pt2", 16)
    with pytest.raises(UserError, match=r"64 x 64 pixels are one window.*at least 80"):
        model = backbones.create_model("vit_tiny", **{**WINDOWS, "window_size": 4})
        export_graph(model.eval(), (3, 64, 64), tmp_path / "m.pt2", 16)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    pytest.importorskip("onnxscript")
    with pytest.raises(MissingExtra, match=r"ONNX needs onnxruntime.*\[export\]"):
        export_graph(Odd(), (3, 32, 32), tmp_path / "m.onnx", 16)
    for arguments, message in (
        (["--pretrained", "--to", str(tmp_path / "m.onnx")], "--pretrained needs --model"),
        (["--pretrained", "--to", str(tmp_path / "m.pt")], "should end in .pt2 or .onnx"),
        (["--pretrained", "--to", str(Path("nowhere") / "m.pt2")], "there is no folder nowhere"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["export", *arguments])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
