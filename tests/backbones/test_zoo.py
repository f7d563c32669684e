"""The zoo: its numbers are those of the released models, its columns are aligned."""

from __future__ import annotations

import pytest
import torch

from backbones import RevViT, create_model
from backbones.__main__ import main
from backbones.commands.zoo import describe, zoo_table
from backbones.registry import MODELS, name_of
from tests.backbones.helpers import Capture, refused

# Parameters; fvcore's total for the original, which counts layer norms; and without them.
RELEASED = {
    "rev_vit_small": (22_434_664, 4_584_195_072, 4_574_410_752),
    "rev_vit_base": (87_335_656, 17_491_986_432, 17_472_417_792),
    "rev_mvit_base": (39_689_320, 8_674_319_616, 8_637_816_576),
    "rev_mvit_base_16x4": (34_963_120, 63_847_667_712, 63_652_357_632),
}


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_of_the_released_models(name: str) -> None:
    parameters, fvcore, without_norms = RELEASED[name]
    entry = describe(name)
    assert entry.parameters == parameters
    assert entry.macs == without_norms  # so fused attention was counted
    assert entry.macs == pytest.approx(fvcore, rel=0.005)
    assert entry.released
    assert entry.top1 == MODELS[name].top1 is not None
    assert entry.input_shape == ((3, 16, 224, 224) if "16x4" in name else (3, 224, 224))
    assert entry.reversible_bytes is not None
    assert entry.stored_bytes > 5 * entry.reversible_bytes


def test_a_model_that_is_neither_released_nor_reversible() -> None:
    entry = describe("vit_tiny")
    assert (entry.released, entry.top1, entry.reversible_bytes) == (False, None, None)
    cells = ["vit_tiny", "5.72", "1.25", "3x224x224", "-", "-", f"{entry.stored_bytes / 1e6:.1f}"]
    assert zoo_table([entry]).splitlines()[1].split() == [*cells, "-"]


def test_scores_are_scores() -> None:
    for name, record in MODELS.items():
        assert record.top1 is None or 70 < record.top1 < 90, name
        assert record.top5 is None or record.top1 < record.top5 < 100, name


def test_names_of_the_zoo() -> None:
    small = {"embed_dim": 384, "num_heads": 6}
    with torch.device("meta"):
        for name, arguments, expected in (
            ("rev_vit_base", small, "rev_vit_small"),
            ("vit_base", {**small, "num_classes": 7, "img_size": 64}, "vit_small"),
            ("rev_vit_small", {"depth": 11}, None),
            # The same parameters, another function of them.
            ("rev_vit_small", {"num_heads": 12}, None),
            ("vit_small", {"window_size": 7}, None),
            ("rev_mvit_base", {"kv_stride": 2}, None),
            ("rev_mvit_base", {"residual_pooling": True}, None),
            ("rev_mvit_base", {"fusion": "concat_linear_2"}, "rev_mvit_base"),
            ("mvit_base", {"drop_path_rate": 0.1}, "mvit_base"),
            # Lists, as a file has them; and what the other one for clips has in its record.
            ("rev_mvit_base", {"transitions": [1, 3, 14]}, "rev_mvit_base"),
            ("rev_mvit_base", {**MODELS["rev_mvit_base_16x4"].arguments}, "rev_mvit_base_16x4"),
            ("rev_mvit_base_16x4", {"num_frames": 32, "img_size": 256}, "rev_mvit_base_16x4"),
            ("rev_mvit_base_16x4", {"num_frames": None}, None),
        ):
            assert name_of(create_model(name, **arguments)) == expected, (name, arguments)
        assert name_of(RevViT()) is None  # which does not know its arguments


def test_columns_are_aligned(capsys: Capture) -> None:
    assert main(["zoo", "rev_vit_tiny", "vit_tiny"]) == 0
    captured = capsys.readouterr()
    header, *rows = captured.out.splitlines()[:3]
    assert captured.err == ""  # the progress is for terminals
    assert [row.split()[0] for row in rows] == ["rev_vit_tiny", "vit_tiny"]
    for row in rows:
        assert row.index("3x224x224") == header.index("input")
        assert len(row) == len(header)


def test_an_unknown_name_is_one_line(capsys: Capture) -> None:
    assert "did you mean rev_vit_small" in refused(["zoo", "rev_vit_smal"], capsys)
