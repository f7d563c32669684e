"""Weights for clips: from Kinetics, from ImageNet, from a run; and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import backbones
from backbones.common.errors import UserError
from backbones.weights.checkpoint import Checkpoint
from revvideo.config import load_config
from revvideo.models import build_model
from revvideo.training.weights import (
    Weights,
    load_pretrained,
    load_run,
    read_weights,
    require_complete,
)
from tests.revvideo.tiny_set import GOLDEN, GOLDEN_MODEL

IMAGES = GOLDEN.with_name("rev_mvit_image_tiny.pyth")
MOTION = "configs/video/demo/motion.yaml"


def image_model_for_clips(classes: int, size: int = 64) -> torch.nn.Module:
    """The architecture of the file, taken from its own config, for clips."""
    arguments = dict(backbones.from_pyslowfast(IMAGES).config["arguments"])
    arguments |= {"num_frames": 6, "img_size": size, "num_classes": classes}
    return backbones.create_model("rev_mvit_base", **arguments).double().eval()


def test_a_still_clip_is_classified_as_its_image_is():
    """Positions and convolutions in time begin as if there were one frame."""
    images = backbones.from_pyslowfast(IMAGES).double().eval()
    expected = torch.load(IMAGES.with_suffix(".expected.pt"), weights_only=True)
    model = image_model_for_clips(classes=images.head.out_features)
    report = load_pretrained(model, read_weights(IMAGES))
    still = expected["input"].double()
    with torch.no_grad():
        logits = model(still[:, :, None].expand(-1, -1, 6, -1, -1))
        torch.testing.assert_close(logits, images(still), rtol=0, atol=1e-9)
        moving = torch.stack([still] * 4 + [still.flip(-1)] * 2, dim=2)
        assert not torch.allclose(model(moving), images(still), atol=1e-3)
    assert not report.missing
    parts = ("patch_embed.proj.weight", "other convolutions", "pos_embed.temporal")
    assert all(part in str(report) for part in parts)


def test_inflating_resizes_positions_and_leaves_another_head_out():
    model = image_model_for_clips(size=96, classes=7)
    report = load_pretrained(model, read_weights(IMAGES))
    assert "pos_embed.spatial.weight" in report.resized
    assert report.missing == ["head.weight", "head.bias"]
    with pytest.raises(UserError, match="its head does not fit"):
        require_complete(report)


def test_image_weights_for_another_architecture_name_the_right_one():
    model = backbones.create_model("rev_mvit_base_16x4", num_frames=4, img_size=64, embed_dim=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = backbones.create_model("rev_mvit_base", img_size=64, embed_dim=8)
    name = "REV_MVIT_B.pyth"
    weights = Weights(name, Checkpoint(Path(name), dict(images.state_dict())), [])
    with pytest.raises(UserError, match=r"model\.name=rev_mvit_base"):
        load_pretrained(model, weights)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def golden_config(*overrides: str):
    return load_config(MOTION, [*GOLDEN_MODEL, *overrides])


def test_a_kinetics_file_is_a_model_to_predict_with():
    model, classes = load_run(GOLDEN, golden_config())
    expected = torch.load(GOLDEN.with_suffix(".expected.pt"), weights_only=True)
    assert not model.training and classes == ["0", "1", "2", "3", "4"]
    with torch.no_grad():
        scores = model(expected["input"]).softmax(dim=1)
    torch.testing.assert_close(scores, expected["eval_output"], rtol=0, atol=1e-5)


def test_more_frames_extend_the_positions_in_time():
    model = build_model(golden_config("data.num_frames=8"), 5)
    report = load_pretrained(model, read_weights(GOLDEN))
    assert report.resized["pos_embed.temporal"] == "from 2 in time to 4 in time"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.num_classes=6"], "its head does not fit (5 classes, the model has 6)"),
        (["model.arguments.depth=6"], "not in the file"),
        (["model.arguments.embed_dim=12"], "of another shape"),
        (["model.num_classes=0"], "model.num_classes=0"),
        (["model.name=rev_mvit_bse"], "rev_mvit_base"),
        (["model.name=rev_vit_small"], "is for images"),
        (["model.arguments.widht=3"], "no argument 'widht'"),
        (["model.arguments.embed_dim=wide"], "cannot be built"),
        (["train.stored_blocks=99"], "stored_blocks must be"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, part):
    with pytest.raises(UserError) as caught:
        load_run(GOLDEN, golden_config(*overrides))
    assert part in str(caught.value) and "\n" not in str(caught.value)
