"""Tiny Rev-ViT and Rev-MViT against numbers of the original implementations, in float64.

The files in tests/golden/ were computed with SlowFast's and mmpretrain's own code from random
weights, which come in, as the gradients do, through the conversion of this package. What these
tests were seen to catch: a norm epsilon of 1e-5 in any one kind of norm, the tanh form of GELU,
streams side by side in the wrong order, at the end or (images) in a transition. In a transition
that takes the mean (video), either order is the same function.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backbones import MemoryPolicy, convert_state_dict, set_memory
from tests.backbones.helpers import SAVERS, assert_near
from tests.backbones.test_weights import MMPRETRAIN, PYSLOWFAST, expected, original

PATHS = [*PYSLOWFAST, MMPRETRAIN]


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected.double(), rtol=0.0, atol=tolerance)


# With 3 stored blocks of a Rev-MViT some are reversed, some stored, some checkpointed.
POLICIES: list[tuple[MemoryPolicy, int]] = [("store", 0), *SAVERS, ("reversible", 3)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("policy, k", POLICIES)
@pytest.mark.parametrize("training", (True, False))
def test_original_implementation(path: Path, policy: MemoryPolicy, k: int, training: bool) -> None:
    numbers = expected(path)
    model = original(path).double().train(training)
    set_memory(model, policy, k)
    streams: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _module, args: streams.append(args[0].detach()))
    inputs = numbers["input"].double()
    logits = model(inputs)
    near(streams[0].flatten(1, 3), numbers["encoder_out"], 1e-6)  # [Y1 | Y2] in this order
    near(logits, numbers["logits"], 2e-7)
    near(logits.softmax(-1), numbers.get("eval_output", numbers["logits"].softmax(-1)), 2e-7)
    features = model.forward_features(inputs)
    near(features, numbers["features"], 1e-6)
    near(features.mean(1), numbers["pooled"], 1e-6)
    loss = nn.functional.cross_entropy(logits, numbers["labels"])
    assert loss.item() == pytest.approx(numbers["loss"], abs=2e-7)

    loss.backward()
    theirs = {name: grad.double() for name, grad in numbers["grads"].items()}
    grads = convert_state_dict(theirs, model)
    assert grads.keys() == dict(model.named_parameters()).keys()
    zero = [name for name in grads if name.endswith("norm_k.bias")]  # the same for all logits
    if zero:
        theirs_zero = numbers["structurally_zero_grads"]
        assert len(theirs_zero) == len(zero) and all("norm_k.bias" in name for name in theirs_zero)
    for name, param in model.named_parameters():
        if name in zero:
            assert max(param.grad.abs().max(), grads[name].abs().max()) < 1e-12, name
        else:
            assert_near(param.grad, grads[name], 1e-6, name)
