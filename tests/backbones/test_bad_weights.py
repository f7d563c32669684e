"""Files that are no weights, or not of this model: one clear line, and the model as it was."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import backbones
from backbones import WeightsError, load_model, load_weights
from tests.backbones.test_weights import GOLDEN, MMPRETRAIN, VIT, read, tensors_of, tiny


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def refuse(model: nn.Module, file: Path, message: str) -> None:
    """Loading ``file`` is an error of one line, and changes nothing in ``model``."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(model, file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "bad.pyth"
    refuse(tiny(), file, "cannot read .*No such file")
    refuse(tiny(), tmp_path, "cannot read .*directory")
    whole = VIT.read_bytes()
    backbones.save_weights(tiny(), tmp_path / "good.safetensors")
    own = (tmp_path / "good.safetensors").read_bytes()
    for content, message in (
        (b"", "is empty"),
        (b"x", "no checkpoint, or a damaged one"),
        (b"<!DOCTYPE html><html>404</html>\n", "a web page, not the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (whole[:1000], "no checkpoint, or a damaged one"),
        (whole[:-1000], "no checkpoint, or a damaged one"),
        (own[:100], "no valid safetensors file"),
        (own[:-4], "no valid safetensors file"),
    ):
        file.write_bytes(content)
        refuse(tiny(), file, message)


@pytest.mark.parametrize(
    "save", (torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, 2)))
)
def test_code_in_a_pickle_is_not_run(save: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    file, made = tmp_path / "code.pyth", tmp_path / "made"
    save({**read(VIT), "cfg": Code(made)}, file)
    why = "which is not loaded because it could run code"
    refuse(tiny(), file, rf"holds more than tensors \(.*\), {why}")
    with pytest.raises(WeightsError):
        backbones.from_pyslowfast(file)
    assert not made.exists()


def test_contents_that_are_no_state_dict(tmp_path: Path) -> None:
    file = tmp_path / "bad.pth"
    for content, message in (
        (torch.zeros(3), "no state dict but a Tensor"),
        ({}, "no state dict"),
        ({"model_state": {}}, "no state dict"),
        ({"state_dict": {"a": 1}}, "no state dict"),
        ({"epoch": 3, "norm.weight": torch.zeros(3)}, "no state dict"),
        ({3: torch.zeros(3)}, "no state dict"),
    ):
        torch.save(content, file)
        refuse(tiny(), file, message)


@pytest.mark.parametrize(
    "overrides, message",
    (
        ({"embed_dim": 64}, r"another shape: .*\(32.*\) for \(64"),
        ({"depth": 2}, r"not in the model: rev_backbone.layers.2.* and 13 more"),
        ({"depth": 4}, r"not in the file: blocks.blocks.3.* and 9 more"),
        ({"patch_size": 16}, r"patch_embed.proj.weight \(32, 3, 8, 8\) for \(32, 3, 16, 16\)"),
        ({"in_chans": 1}, r"patch_embed.proj.weight"),
        ({"qkv_bias": False}, "not in the model: .*attn.k.bias"),
    ),
)
def test_other_models(overrides: dict[str, Any], message: str) -> None:
    refuse(tiny(**overrides), VIT, f"does not fit this RevViT: .*{message}")


def test_detectors(tmp_path: Path) -> None:
    """As Detectron2 and mmdetection save them, whose trunks lie under "backbone.": their trunk."""
    names = ("roi_heads.box_head.fc1.weight", "proposal_generator.rpn_head.conv.bias", "rpn_head.x")
    file = tmp_path / "model_final.pth"
    for name in names:
        trunk = {f"backbone.net.{key}": value for key, value in tiny().state_dict().items()}
        torch.save({"model": {**trunk, name: torch.zeros(2)}, "iteration": 9}, file)
        model = tiny()
        report = load_weights(model, file)
        assert report.left_out == {name: "of the detector around the trunk"}
        assert len(report.loaded) == len(model.state_dict())


def test_other_architectures() -> None:
    twin = backbones.ViT(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    refuse(twin, VIT, r"does not fit this ViT: it is of a reversible net")
    refuse(tiny(), GOLDEN / "rev_mvit_image_tiny.pyth", "does not fit this RevViT")
    refuse(nn.Linear(2, 2), MMPRETRAIN, "does not fit this Linear")
    refuse(nn.Linear(2, 2), VIT, "does not fit this Linear")
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(WeightsError, match="on the meta device"):
        load_weights(model, VIT)


NORM, QKV = "norm.bias", "rev_backbone.layers.0.F.attn.q.weight"


@pytest.mark.parametrize(
    "key, value, message",
    (
        (NORM, torch.zeros(63), r"norm.bias \(63,\) for \(64,\)"),
        (NORM, torch.zeros(64, dtype=torch.int64), "not plain numbers: norm.bias"),
        (NORM, torch.zeros(64, dtype=torch.complex64), "not plain numbers: norm.bias"),
        (NORM, torch.zeros(64, device="meta"), "not plain numbers: norm.bias"),
        (NORM, torch.zeros(64).to_sparse(), "not plain numbers: norm.bias"),
        (NORM, None, "not in the file: norm.bias"),
        ("extra.weight", torch.zeros(2), "not in the model: extra.weight"),
        ("cls_token", torch.zeros(1, 1, 32), "not in the model: cls_token"),
        ("module.norm.bias", torch.zeros(64), "norm.bias twice"),
        ("head.projection.weight", torch.zeros(5, 32), r"head.weight \(5, 32\) for \(5, 64\)"),
        ("head.projection.bias", torch.tensor(1.0), r"head.bias \(\) for \(5,\)"),
        ("head.other.weight", torch.zeros(2), "not in the model: head.other.weight"),
        ("pos_embed", torch.zeros(1, 15, 32), r"pos_embed.weight \(1, 15, 32\) for \(1, 16, 32\)"),
        ("pos_embed", torch.zeros(1, 9, 16), r"pos_embed.weight \(1, 16, 16\) for \(1, 16, 32\)"),
        ("pos_embed", torch.zeros(1, 0, 32), "another shape: pos_embed.weight"),
        ("pos_embed", torch.zeros(2, 9, 32), "another shape: pos_embed.weight"),
        ("pos_embed", torch.tensor(1.0), "another shape: pos_embed.weight"),
        (QKV, None, "no single set of q, k and v for blocks.blocks.0.f.attn.qkv.weight"),
        (QKV, torch.zeros(32, 31), "q, k and v for .* differ in shape"),
        (QKV, torch.tensor(1.0), "q, k and v for .* differ in shape"),
        (QKV.replace(".q.", ".qkv."), torch.zeros(96, 32), "no single set of q, k and v"),
    ),
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_one_wrong_tensor(tmp_path: Path, key: str, value: Tensor | None, message: str) -> None:
    tensors = tensors_of(VIT)
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    torch.save({"model_state": tensors}, tmp_path / "bad.pyth")
    refuse(tiny(), tmp_path / "bad.pyth", message)


def test_bad_metadata(tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    model = tiny()
    for grids in ("{", "3", '{"pos_embed.weight": 3}', '{"pos_embed.weight": [1, "a", 2]}'):
        save_file(model.state_dict(), file, metadata={"backbones.grids": grids})
        refuse(model, file, "metadata is damaged")
    small = '{"name": "rev_vit_small", "arguments": %s}'
    for config, message in (
        ("{", "metadata is damaged"),
        ("[]", "metadata is damaged"),
        ('{"name": ["a"], "arguments": {}}', "cannot be built"),
        ('{"name": "rev_vit_smal", "arguments": {}}', "did you mean rev_vit_small"),
        (small % '{"pretrained": true}', "no argument 'pretrained'"),
        (small % '{"depth": 1, "img_size": 32}', "does not fit"),
    ):
        save_file(model.state_dict(), file, metadata={"backbones.config": config})
        with pytest.raises(WeightsError, match=message):
            load_model(file)
