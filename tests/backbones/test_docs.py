"""The code in the documentation runs as it stands, and its heads train under every policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from backbones import MemoryPolicy, probe_drift, set_memory
from tests.backbones.helpers import assert_grads_near

ROOT = Path(__file__).resolve().parents[2]
HEADS = "docs/heads.md"
OTHERS = r"^\s*(from|import) (revdet|revvideo|iopath|numpy)\b"


def blocks_of(document: str) -> list[tuple[str, int, str]]:
    """The Python blocks that need torch alone: file, line, code. Others: tests/test_pages.py."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        (document, text.count("\n", 0, match.start(1)), match[1])
        for match in found
        if not re.search(
            r"^\s*(from|import) (revdet|revvideo|iopath|numpy)\b", match[1], re.MULTILINE
        )
    ]


def run(block: tuple[str, int, str]) -> dict[str, Any]:
    """The names that a block defines. Errors point to the line in the document."""
    document, line, code = block
    names: dict[str, Any] = {"__name__": "documentation"}
    exec(compile("\n" * line + code, str(ROOT / document), "exec"), names)
    return names


DOCUMENTS = ("README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")))
BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{name}:{line}" for name, line, _ in BLOCKS])
def test_it_runs(
    block: tuple[str, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(block)
    if "report" in names:
        text = (ROOT / block[0]).read_text(encoding="utf-8")
        assert str(names["report"]) in text.replace("\n    ", "\n")


def test_the_blocks_were_found() -> None:
    assert len(blocks_of(HEADS)) == 3
    assert any("create_model" in code for _, _, code in blocks_of("README.md"))


def assert_same_under_every_policy(module: torch.nn.Module, loss_of: Callable[[], Tensor]) -> None:
    stored = None
    # Attention does not depend on a constant in all keys: the gradient of norm_k.bias is rounding.
    params = {n: p for n, p in module.named_parameters() if not n.endswith("norm_k.bias")}
    for policy, k in product(get_args(MemoryPolicy), (0, 1)):  # "store" is the first
        set_memory(module, policy, k)
        module.zero_grad()
        loss_of().backward()
        grads = {name: param.grad for name, param in params.items()}
        stored = stored or grads
        assert_grads_near(grads, stored, 1e-9)


def test_linear_probe() -> None:
    names = run(blocks_of(HEADS)[0])
    assert all(param.grad is None for param in names["trunk"].parameters())
    assert names["features"].shape == (8, 384) and not names["features"].requires_grad


def test_segmentation_head() -> None:
    names = run(blocks_of(HEADS)[1])
    segmenter, images = names["segmenter"].double(), names["images"].double()
    assert all(param.grad is not None for param in segmenter.parameters())
    assert segmenter(images[:1, :, :50, :70]).shape == (1, 3, 50, 70)
    loss = names["cross_entropy"]
    assert_same_under_every_policy(segmenter, lambda: loss(segmenter(images), names["target"]))
    assert probe_drift(segmenter, images).ok


def test_two_towers() -> None:
    names = run(blocks_of(HEADS)[2])
    towers, images = names["towers"].double(), names["images"].double()
    assert_same_under_every_policy(towers, lambda: towers(images, images.flip(-1)))
    assert_same_under_every_policy(towers, lambda: towers(images, images[..., :48, :48]))
