"""Checkpoints of three kinds in, our own out: names, numbers, sizes that differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import backbones
from backbones import create_model, from_pyslowfast, load_model, load_weights, save_weights
from backbones.weights.checkpoint import WeightsError, read_checkpoint
from tests.backbones.helpers import assert_near

GOLDEN = Path(__file__).parents[1] / "golden"
VIT, MMPRETRAIN = GOLDEN / "rev_vit_tiny.pyth", GOLDEN / "rev_vit_tiny_mmpretrain.pth"
VIDEO = GOLDEN / "rev_mvit_video_tiny.pyth"
PYSLOWFAST = [VIT, GOLDEN / "rev_mvit_image_tiny.pyth", VIDEO]
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def tiny(**overrides: Any) -> nn.Module:
    return create_model("rev_vit_small", **{"num_classes": 5, **TINY, **overrides}).eval()


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def expected(path: Path) -> dict[str, Any]:
    return read(path.with_name(path.stem + ".expected.pt"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    content = read(path)
    return content.get("model_state") or content["state_dict"]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def original(path: Path) -> nn.Module:
    """The model of a golden file with its weights, whose numbers test_golden.py compares."""
    if path in PYSLOWFAST:
        return from_pyslowfast(path)
    model = tiny()
    load_weights(model, path)
    return model


@pytest.mark.parametrize("path", [*PYSLOWFAST, MMPRETRAIN], ids=lambda path: path.stem)
def test_all_of_a_file_is_loaded(path: Path) -> None:
    model = original(path)
    twin = create_model(model.config["name"], **model.config["arguments"])
    report = load_weights(twin, path)
    assert same_weights(twin, model)
    assert report.format == ("mmpretrain" if path == MMPRETRAIN else "PySlowFast")
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert not report.resized and not report.left_out and not report.missing


def save_as_pyslowfast(file: Path, tensors: dict[str, Tensor], path: Path, **changes: Any) -> None:
    """The checkpoint ``path`` with other tensors, and with changes to the MVIT part of its cfg."""
    cfg = yaml.safe_load(read(path)["cfg"])
    assert changes.keys() <= cfg["MVIT"].keys()
    cfg["MVIT"] |= changes
    torch.save({"model_state": tensors, "cfg": yaml.safe_dump(cfg)}, file)


def test_from_pyslowfast_names_the_size(tmp_path: Path) -> None:
    """And a model of no size of the zoo, as above, by its kind."""
    reference = create_model("rev_vit_tiny", img_size=32, num_classes=5)
    sizes = {"EMBED_DIM": 192, "DEPTH": 12, "NUM_HEADS": 3}
    patches = {"PATCH_KERNEL": [16, 16], "PATCH_STRIDE": [16, 16]}
    file = tmp_path / "tiny.pyth"
    save_as_pyslowfast(file, reference.state_dict(), VIT, **sizes, **patches)
    model = from_pyslowfast(file)
    assert model.config["name"] == "rev_vit_tiny" and same_weights(model, reference)


@pytest.mark.parametrize("path", PYSLOWFAST, ids=lambda path: path.stem)
def test_from_pyslowfast_with_relative_positions(path: Path, tmp_path: Path) -> None:
    """The options of MViTv2, none of which a released model has. Of clips, in time as well."""
    plain = from_pyslowfast(path).double().eval()
    options = {"use_rel_pos": True}
    cfg = {"REL_POS_SPATIAL": True, "REL_POS_TEMPORAL": path == VIDEO}
    if path != VIT:
        options["residual_pooling"] = cfg["RESIDUAL_POOLING"] = True
    config = plain.config
    reference = create_model(config["name"], **{**config["arguments"], **options}).double().eval()
    reference.load_state_dict(plain.state_dict(), strict=False)
    tensors = tensors_of(path)
    order = [name for name, module in reference.named_modules() if hasattr(module, "f")]
    for name, table in reference.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(table)
            block, _, rest = name.partition(".f.")
            tensors[f"rev_backbone.layers.{order.index(block)}.F.{rest}"] = table.detach()
    tables = sum("rel_pos" in name for name in tensors)
    assert tables == config["arguments"]["depth"] * (3 if path == VIDEO else 2)
    save_as_pyslowfast(tmp_path / "x.pyth", tensors, path, **cfg)
    model = from_pyslowfast(tmp_path / "x.pyth").double().eval()
    x = expected(path)["input"].double()
    torch.testing.assert_close(model(x), reference(x))
    assert (model(x) - plain(x)).abs().max() > 1e-3
    if path == VIDEO:
        save_as_pyslowfast(tmp_path / "x.pyth", tensors, path, **{**cfg, "REL_POS_TEMPORAL": False})
        with pytest.raises(WeightsError, match=r"TEMPORAL False with .*SPATIAL True"):
            from_pyslowfast(tmp_path / "x.pyth")


def test_what_a_cfg_lacks_or_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = read(VIT)

    def from_cfg(old: str, new: str) -> None:
        assert old in content["cfg"]
        torch.save({**content, "cfg": content["cfg"].replace(old, new)}, tmp_path / "x.pyth")
        from_pyslowfast(tmp_path / "x.pyth")

    for old, new, message in (
        ("  EMBED_DIM: 32\n", "", "lacks MVIT.EMBED_DIM"),
        ("REL_POS_SPATIAL: false", "REL_POS_SPATIAL: true", "not in the file: .*rel_pos_h and 3 m"),
        ("REL_POS_TEMPORAL: false", "REL_POS_TEMPORAL: true", "REL_POS_TEMPORAL True with"),
        ("RESIDUAL_POOLING: false", "RESIDUAL_POOLING: true", "RESIDUAL_POOLING True without st"),
        ("    ENABLE: true\n    PRE_Q", "    ENABLE: false\n    PRE_Q", "REV.ENABLE False"),
        ("NUM_HEADS: 2", "NUM_HEADS: 3", "not divisible by num_heads 3"),
        ("NUM_HEADS: 2", "NUM_HEADS: 0", "modulo"),
        ("NUM_CLASSES: 5", "NUM_CLASSES: 7", "head.weight: 5 classes, the model has 7"),
        ("NUM_HEADS: 2", "NUM_HEADS: two", "x.pyth"),
        ("DEPTH: 3", "DEPTH: 2", "not in the model: .*layers.2"),
        ("MVIT:", "MVIT: [", "no YAML"),
    ):
        with pytest.raises(WeightsError, match=message):
            from_cfg(old, new)
    # The published Kinetics configuration says so, although its model has no class token.
    from_cfg("CLS_EMBED_ON: false", "CLS_EMBED_ON: true")
    with pytest.raises(WeightsError, match="no PySlowFast cfg"):
        from_pyslowfast(MMPRETRAIN)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"needs yaml: pip install .*\[weights\]"):
        from_pyslowfast(VIT)


@pytest.mark.parametrize("path", (VIT, MMPRETRAIN), ids=lambda path: path.stem)
def test_prefixes_and_plain_state_dicts(path: Path, tmp_path: Path) -> None:
    reference = tiny()
    load_weights(reference, path)
    file = tmp_path / "weights.bin"
    for prefix in ("", "module."):
        for tensors in (tensors_of(path), reference.state_dict()):
            torch.save({prefix + key: value for key, value in tensors.items()}, file)
            model = tiny()
            load_weights(model, file)
            assert same_weights(model, reference)
    report = load_weights(model, file)
    assert report.format == "own" and str(report) == f"{file} (own): 43 tensors loaded"


def test_containers(tmp_path: Path) -> None:
    """A run's other entries stay in reach: of Detectron2's checkpoints, for one."""
    tensors, file = tiny().state_dict(), tmp_path / "run.pth"
    for container in ("model_state", "state_dict", "model"):
        torch.save({container: tensors, "iteration": 3}, file)
        checkpoint = read_checkpoint(str(file))
        assert checkpoint.tensors.keys() == tensors.keys() and checkpoint.content["iteration"] == 3
        assert load_weights(tiny(), file).format == "own"
    torch.save(tensors, file)
    assert read_checkpoint(file).content == {}


def test_convert_state_dict_leaves_our_names_and_the_model_alone() -> None:
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert backbones.convert_state_dict(before, model) == before
    backbones.convert_state_dict(tensors_of(VIT), model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_positions_are_resized_as_at_run_time(tmp_path: Path) -> None:
    small, large = tiny(), tiny(img_size=(48, 64))
    load_weights(small, VIT)
    report = load_weights(large, VIT)
    assert report.resized == {"pos_embed.weight": "from 4×4 to 6×8"}
    assert "resized pos_embed.weight: from 4×4 to 6×8" in str(report)
    images = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(large(images), small(images), rtol=0.0, atol=1e-5)
    # Same number of tokens, another grid: what foreign files hold is square.
    assert load_weights(tiny(img_size=(16, 64)), VIT).resized

    # A rectangle, whose sides the number of its rows does not tell, from and to our own format.
    save_weights(large, tmp_path / "large.safetensors")
    report = load_weights(tiny(img_size=(64, 48)), tmp_path / "large.safetensors")
    assert report.resized == {"pos_embed.weight": "from 6×8 to 8×6"}
    torch.save(large.state_dict(), tmp_path / "large.pth")
    with pytest.raises(WeightsError, match="another shape: pos_embed"):
        load_weights(small, tmp_path / "large.pth")


def test_positions_in_time_are_resized() -> None:
    model = from_pyslowfast(VIDEO).eval()
    arguments = {**model.config["arguments"], "num_frames": 10, "img_size": 96}
    other = create_model(model.config["name"], **arguments).eval()
    report = load_weights(other, VIDEO)
    assert report.resized == {
        "pos_embed.spatial.weight": "from 16×16 to 24×24",
        "pos_embed.temporal": "from 2 in time to 5 in time",
    }
    clips = torch.randn(1, 3, 10, 96, 96)
    torch.testing.assert_close(other(clips), model(clips), rtol=0.0, atol=1e-5)


def test_half_precision_and_dtype_of_the_model(tmp_path: Path) -> None:
    torch.save({key: value.half() for key, value in tensors_of(VIT).items()}, tmp_path / "h.pth")
    model, reference = tiny(img_size=48).double(), tiny(img_size=48).double()
    load_weights(model, tmp_path / "h.pth")
    load_weights(reference, VIT)
    for name, value in model.state_dict().items():
        assert_near(value, reference.state_dict()[name], 1e-3, name)


def test_another_number_of_classes(tmp_path: Path) -> None:
    model = tiny(num_classes=7)
    head = model.head.weight.clone()
    report = load_weights(model, VIT)
    assert torch.equal(model.head.weight, head)
    assert list(report.left_out) == report.missing == ["head.weight", "head.bias"]
    assert "left out head.weight, head.bias: 5 classes, the model has 7" in str(report)
    assert "unchanged: head.weight, head.bias" in str(report)
    assert "not in the file" not in str(report)

    headless = tiny(num_classes=0)
    report = load_weights(headless, VIT)
    assert list(report.left_out) == ["head.weight", "head.bias"] and not report.missing
    save_weights(headless, tmp_path / "headless.safetensors")
    report = load_weights(model, tmp_path / "headless.safetensors")
    assert report.missing == ["head.weight", "head.bias"] and not report.left_out


@pytest.mark.parametrize("img_size", (32, 48))
def test_stale_rows_of_early_mmpretrain_files(tmp_path: Path, img_size: int) -> None:
    content = read(MMPRETRAIN)
    tensors = content["state_dict"]
    tensors["backbone.cls_token"] = torch.randn(1, 1, 32)
    row = torch.randn(1, 1, 32)
    tensors["backbone.pos_embed"] = torch.cat([row, tensors["backbone.pos_embed"]], dim=1)
    torch.save(content, tmp_path / "early.pth")
    model, reference = tiny(img_size=img_size), tiny(img_size=img_size)
    report = load_weights(model, tmp_path / "early.pth")
    assert list(report.left_out) == ["cls_token", "pos_embed.weight[:, 0]"]
    load_weights(reference, MMPRETRAIN)
    assert same_weights(model, reference)


@pytest.mark.parametrize("path", PYSLOWFAST, ids=lambda path: path.stem)
def test_our_own_format(path: Path, tmp_path: Path) -> None:
    model = from_pyslowfast(path)
    file = tmp_path / "model.safetensors"
    save_weights(model, file)
    again = load_model(file)
    assert type(again) is type(model) and same_weights(again, model)
    assert again.config["name"] == model.config["name"]
    assert list(tmp_path.iterdir()) == [file], "a partial file is left"
    other = load_model(file)
    nn.init.zeros_(other.norm.weight)
    report = load_weights(other, str(file))
    assert report.format == "own" and same_weights(other, model)


def test_our_own_format_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbones.RevViT(**TINY, num_classes=5)
    file = tmp_path / "model.safetensors"
    save_weights(model, file)
    load_weights(model, file)
    with pytest.raises(WeightsError, match="does not say which model"):
        load_model(file)
    model = tiny()
    model.head = nn.Linear(64, 9)
    save_weights(model, file)
    with pytest.raises(WeightsError, match=r"describes: head\.bias: 9 classes, .* 5; .* 5$"):
        load_model(file)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs safetensors: .*\[weights\]"):
        load_weights(model, file)
