"""Tools that record, transform or only look at the shapes of a model, under every policy."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import backbones
from backbones import MemoryPolicy, set_memory
from tests.backbones.helpers import DIM, make_sequence


@pytest.mark.parametrize("policy", ("store", "checkpoint", "reversible"))
def test_tools_see_plain_operations(policy: MemoryPolicy) -> None:
    module = make_sequence(2, dtype=torch.float32)
    set_memory(module, policy)
    x = torch.randn(2, 5, DIM)
    expected = module(x, x)[0]
    traced = torch.jit.trace(module, (x, x), check_trace=False)
    torch.testing.assert_close(traced(x, x)[0], expected)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x)[0], expected)

    params = dict(module.named_parameters())

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, params, (x, x))[0].square().sum()

    grads = torch.func.grad(loss)(params)
    module(x, x)[0].square().sum().backward()
    for name, param in params.items():
        if param.grad is not None:
            torch.testing.assert_close(grads[name], param.grad)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("policy", ("store", "checkpoint", "reversible"))
@pytest.mark.parametrize("name", ("rev_vit_tiny", "rev_mvit_base"))
def test_on_fake_tensors(policy: MemoryPolicy, name: str, device: str) -> None:
    """Also of a GPU without a driver, where devices that are mixed up are found."""
    small: dict[str, Any] = {"depth": 4, "img_size": 32, "num_classes": 3, "drop_path_rate": 0.1}
    if "mvit" in name:
        small |= {"embed_dim": 16, "transitions": (1, 2, 3)}
    with torch.device("meta"):
        model = backbones.create_model(name, **small)
    set_memory(model, policy)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model.to_empty(device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # there is no GPU
            with torch.autocast(device, torch.bfloat16):
                loss = model(torch.randn(2, 3, 32, 32)).float().square().sum()
        assert loss.device.type == device and loss.requires_grad
        if device == "cpu":  # autograd itself wants a driver for the others
            loss.backward()
            assert all(param.grad is not None for param in model.parameters())
