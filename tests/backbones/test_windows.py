"""Rev-ViT and its twin as trunks of ViTDet: windows, a few global blocks, relative positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import (
    RevViT,
    WeightsError,
    create_model,
    load_model,
    load_weights,
    save_weights,
)
from backbones.models.attention import Attention, from_windows, to_windows
from tests.backbones.helpers import random_model

GOLDEN = Path(__file__).parents[1] / "golden" / "rev_vit_tiny.pyth"

SIZES = ((6, 6), (9, 9), (7, 10), (2, 4), (1, 1), (3, 8))
WINDOW = 3


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_windows_tile_the_grid(size: tuple[int, int]) -> None:
    x = torch.randn(2, 2, *size, 5)
    windows = to_windows(x, WINDOW)
    rows, columns = -(-size[0] // WINDOW), -(-size[1] // WINDOW)
    assert windows.shape == (2 * rows * columns, 2, WINDOW, WINDOW, 5)
    assert torch.equal(from_windows(windows, *size), x)
    padded = F.pad(x, (0, 0, 0, columns * WINDOW - size[1], 0, rows * WINDOW - size[0]))
    for index, window in enumerate(windows):
        sample, place = divmod(index, rows * columns)
        top, left = (WINDOW * step for step in divmod(place, columns))
        expected = padded[sample, :, top : top + WINDOW, left : left + WINDOW]
        assert torch.equal(window, expected)


def random_attention(**options: Any) -> Attention:
    torch.manual_seed(1)
    attention = Attention(12, 3, **options).double()
    for param in attention.parameters():
        nn.init.normal_(param)
    return attention


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rel_pos", (False, True))
def test_each_window_is_attended_to_alone(size: tuple[int, int], rel_pos: bool) -> None:
    """Padding included: its tokens are keys like all others, as in ViTDet."""
    sides = (0, WINDOW, WINDOW) if rel_pos else None
    windowed = random_attention(window_size=WINDOW, rel_pos_sides=sides)
    whole = random_attention(rel_pos_sides=sides)
    x = torch.randn(2, 1, *size, 12, dtype=torch.float64)
    out = windowed(x)
    for top in range(0, size[0], WINDOW):
        for left in range(0, size[1], WINDOW):
            window = x[:, :, top : top + WINDOW, left : left + WINDOW]
            height, width = window.shape[2:4]
            alone = whole(F.pad(window, (0, 0, 0, WINDOW - width, 0, WINDOW - height)))
            theirs = alone[:, :, :height, :width]
            ours = out[:, :, top : top + height, left : left + width]
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("window", (WINDOW, 0), ids=("windows", "global"))
def test_detectron2(size: tuple[int, int], window: int) -> None:
    """The block of its ViT without the residual and the MLP, window functions and all."""
    vit = pytest.importorskip("detectron2.modeling.backbone.vit")
    sides = (0, window or 6, window or 6)
    ours = random_attention(window_size=window, rel_pos_sides=sides)
    block = vit.Block(12, 3, use_rel_pos=True, window_size=window, input_size=(6, 6)).double()
    block.norm1, block.mlp = nn.Identity(), nn.Identity()
    block.norm2.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
    block.attn.load_state_dict(ours.state_dict())
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x[:, None])[:, 0], block(x) - x, rtol=1e-11, atol=1e-11)


# ---- Whole models

SMALL = {
    "img_size": 40,
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 3,
    "window_size": 3,
    "global_attn_indexes": (1, 3),
    "use_rel_pos": True,
}


def test_which_blocks_have_windows_and_which_tables() -> None:
    with torch.device("meta"):
        model = create_model(
            "rev_vit_large",
            img_size=(1024, 768),
            window_size=14,
            global_attn_indexes=(5, 11, 17, 23),
            use_rel_pos=True,
        )
    for index, block in enumerate(model.blocks.blocks):
        attention = block.f.attn
        everywhere = index in (5, 11, 17, 23)
        assert attention.window_size == (0 if everywhere else 14)
        assert attention.rel_pos_h.shape == (127 if everywhere else 27, 64)
        assert attention.rel_pos_w.shape == (95 if everywhere else 27, 64)
        assert attention.rel_pos_t is None
    plain = create_model("rev_vit_tiny", depth=2, window_size=14, global_attn_indexes=[1])
    assert not [name for name in plain.state_dict() if "rel_pos" in name]


def test_one_window_over_the_whole_grid_is_no_window() -> None:
    """And new tables, all zeros, are no relative positions."""
    plain = random_model(
        RevViT, **{**SMALL, "window_size": 0, "global_attn_indexes": (), "use_rel_pos": False}
    ).float()
    windowed = RevViT(**{**SMALL, "window_size": 5})
    missing = windowed.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("rel_pos" in name for name in missing.missing_keys)
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(windowed.eval()(images), plain.eval()(images))
    smaller = RevViT(**SMALL).eval()
    smaller.load_state_dict(plain.state_dict(), strict=False)
    assert (smaller(images) - plain(images)).abs().max() > 1e-3, "windows change nothing"


@pytest.mark.parametrize(
    "overrides, message",
    (
        ({"window_size": 0}, "global_attn_indexes.*without windows.*set window_size too"),
        ({"window_size": -1}, "window_size must be 0 .* or positive, got -1"),
        ({"global_attn_indexes": (1, 4)}, r"there is no block 4, only 0 … 3"),
        ({"global_attn_indexes": (-1,)}, "there is no block -1"),
    ),
)
def test_errors(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RevViT(**{**SMALL, **overrides})


# ---- Weights

DETECTOR = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 0,
    "window_size": 5,
    "global_attn_indexes": (2,),
    "use_rel_pos": True,
}


def tables_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: table for name, table in model.named_parameters() if "rel_pos" in name}


def test_weights_of_a_classifier() -> None:
    """All of the trunk is loaded; the tables, which the file has not, stay zeros and are listed."""
    model = create_model("rev_vit_small", **DETECTOR)
    report = load_weights(model, GOLDEN)
    tables = tables_of(model)
    assert len(tables) == 6 and not any(table.any() for table in tables.values())
    assert sorted(report.missing) == sorted(tables)
    assert sorted(report.loaded) == sorted(model.state_dict().keys() - tables.keys())
    assert list(report.resized) == ["pos_embed.weight"]
    assert sorted(report.left_out) == ["head.bias", "head.weight"]
    assert "unchanged: 6 tables of relative positions" in str(report)

    classifier = create_model(
        "rev_vit_small", **{**DETECTOR, "img_size": 32, "num_classes": 5, "window_size": 4}
    )
    load_weights(classifier, GOLDEN)
    expected = torch.load(GOLDEN.with_name("rev_vit_tiny.expected.pt"), weights_only=True)
    logits = classifier.double().eval()(expected["input"].double())  # one window of 4 x 4
    torch.testing.assert_close(logits, expected["logits"].double(), rtol=0.0, atol=2e-7)


def test_tables_are_resized_as_at_run_time(tmp_path: Path) -> None:
    model = create_model("rev_vit_small", **DETECTOR)
    for table in tables_of(model).values():
        nn.init.normal_(table)
    file = tmp_path / "detector.safetensors"
    save_weights(model, file)
    assert torch.equal(load_model(file).state_dict()["pos_embed.weight"], model.pos_embed.weight)

    larger = create_model("rev_vit_small", **{**DETECTOR, "img_size": 128})
    report = load_weights(larger, file)
    assert report.resized == {
        "pos_embed.weight": "from 12×12 to 16×16",
        "blocks.blocks.2.f.attn.rel_pos_h": "from 23 to 31 distances",
        "blocks.blocks.2.f.attn.rel_pos_w": "from 23 to 31 distances",
    }
    images = torch.randn(1, 3, 128, 128)
    (stage_map,) = larger.feature_maps(images)
    torch.testing.assert_close(stage_map, model.feature_maps(images)[0], rtol=1e-4, atol=1e-4)


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    model = create_model("rev_vit_small", **DETECTOR)
    tensors = dict(model.state_dict())
    name = "blocks.blocks.0.f.attn.rel_pos_w"
    file = tmp_path / "weights.pth"

    def load_without(**changed: Tensor) -> None:
        torch.save({**tensors, **changed}, file)
        load_weights(model, file)

    load_without()
    with pytest.raises(WeightsError, match=r"of another shape: .*rel_pos_w \(9, 8\) for \(9, 16\)"):
        load_without(**{name: torch.zeros(9, 8)})
    plain = create_model("rev_vit_small", **{**DETECTOR, "use_rel_pos": False})
    with pytest.raises(WeightsError, match=r"not in the model: .*rel_pos"):
        load_weights(plain, file)
    del tensors[name]  # some tables, but not all
    with pytest.raises(WeightsError, match=f"not in the file: {name}"):
        load_without()
