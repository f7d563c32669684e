"""Checkpoints on disk: whole or not there, and never executed."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import backbones
from backbones.common.errors import UserError
from backbones.weights.checkpoint import read_checkpoint
from revdet.models import find_trunk
from revdet.training.checkpoint import Checkpointer, load_initial_weights
from revdet.training.trainer import Trainer
from tests.revdet.conftest import DEMO, detector

GOLDEN = Path(__file__).parents[1] / "golden"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("fails", ["torch.save", "os.fsync"])
def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch, fails):
    model = nn.Linear(3, 2)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("last")
    before = (tmp_path / "last.pth").read_bytes()

    def disk_full(*_args, **_kwargs):
        raise OSError("no space left on device")

    with torch.no_grad():
        model.weight.zero_()
    monkeypatch.setattr(fails, disk_full)
    with pytest.raises(UserError, match=r"no space.*--resume"):
        checkpointer.save("last")
    assert (tmp_path / "last.pth").read_bytes() == before
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "last.pth")


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_bad_files_end_in_one_line_and_leave_the_model_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    model, untouched = nn.Linear(3, 2), nn.Linear(3, 2)
    untouched.load_state_dict(model.state_dict())
    torch.save({"model": nn.Linear(3, 2).state_dict()}, path)
    for content in (path.read_bytes()[:-200], pickle.dumps(Malicious())):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.pth") as error:
            Checkpointer(model).load(str(path))
        assert "\n" not in str(error.value)
        assert same(model, untouched)
    assert not (tmp_path / "executed").exists()


def test_missing_and_unknown_weights(tmp_path):
    small = nn.Sequential(nn.Linear(3, 2))
    Checkpointer(small, str(tmp_path)).save("one")
    path = str(tmp_path / "one.pth")
    larger = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"2 weights are missing \(first: 1\.weight\)"):
        Checkpointer(larger).load(path)
    # Starting from pretrained weights, what is not there is trained from scratch.
    Checkpointer(larger).start_from(read_checkpoint(Path(path)))
    assert same(larger[0], small[0])
    with pytest.raises(UserError, match="another architecture"):
        Checkpointer(nn.Conv2d(1, 1, 1)).start_from(read_checkpoint(Path(path)))


def test_a_file_of_averaged_weights_is_not_resumed_without_them(tmp_path):
    averaged, trained = nn.Linear(3, 2), nn.Linear(3, 2)
    Checkpointer(averaged, str(tmp_path), training_model=trained).save("one")
    path = str(tmp_path / "one.pth")
    model, training_model = nn.Linear(3, 2), nn.Linear(3, 2)
    # To evaluate and to predict, nothing needs to be known of the average.
    Checkpointer(model).load(path)
    assert same(model, averaged)
    Checkpointer(model, training_model=training_model).load(path)
    assert same(model, averaged) and same(training_model, trained)
    with pytest.raises(UserError, match=r"with averaged weights.*train\.ema_decay"):
        Checkpointer(model, trainer=nn.Identity()).load(path)
    Checkpointer(model, str(tmp_path), trainer=nn.Identity()).save("two")
    with pytest.raises(UserError, match=r"without averaged weights.*train\.ema_decay"):
        Checkpointer(model, training_model=training_model).load(str(tmp_path / "two.pth"))


def test_an_optimizer_of_other_groups_is_not_resumed(tmp_path):
    """As another layer_decay makes them."""
    model = nn.Linear(3, 2)
    one = torch.optim.AdamW(model.parameters())
    Checkpointer(model, str(tmp_path), optimizer=one).save("one")
    two = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    with pytest.raises(UserError, match=r"one\.pth is of other groups.*layer_decay"):
        Checkpointer(model, optimizer=two).load(str(tmp_path / "one.pth"))


def test_weights_alone_are_not_what_a_run_resumes_from(tmp_path):
    checkpointer = Checkpointer(nn.Linear(3, 2), str(tmp_path), trainer=nn.Linear(1, 1))
    checkpointer.save("model_0000009")
    checkpointer.save_weights("model_best", iteration=10)
    assert Path(checkpointer.get_checkpoint_file()).name == "model_0000009.pth"
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best.keys() == {"model", "iteration"}


# The trunks of tests/golden, whose images have 32 or 64 pixels, in the demo's detectors.
TRUNKS = {
    "rev_vit_tiny.pyth": dict(embed_dim=32, depth=3, num_heads=2),
    "rev_vit_tiny_mmpretrain.pth": dict(embed_dim=32, depth=3, num_heads=2),
    "rev_mvit_image_tiny.pyth": dict(embed_dim=10, depth=6),
    "rev_mvit_video_tiny.pyth": dict(
        name="rev_mvit_base_16x4", embed_dim=10, depth=5, num_frames=4
    ),
}


@pytest.mark.parametrize("file", TRUNKS)
def test_a_detector_starts_from_every_golden_trunk(file, tmp_path, caplog):
    recipe = DEMO.replace("rev_vit", "rev_mvit") if "mvit" in file else DEMO
    section = "model.backbone.bottom_up" if "mvit" in file else "model.backbone.net"
    overrides = [f"{section}.model.{key}={value}" for key, value in TRUNKS[file].items()]
    model = detector(*overrides, recipe=recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="revdet"):
        load_initial_weights(model, str(GOLDEN / file))

    prefix, trunk = find_trunk(model)
    arguments = {**trunk.config["arguments"], "num_classes": 5}
    arguments["img_size"] = 64 if "mvit" in file else 32
    original = backbones.create_model(trunk.config["name"], **arguments)
    backbones.load_weights(original, GOLDEN / file)
    theirs = original.state_dict()
    resized = []
    for name, value in trunk.state_dict().items():
        if value.shape == theirs[name].shape:
            assert torch.equal(value, theirs[name]), name
        else:
            resized.append(name)
            assert not torch.equal(value, before[prefix + name])
    assert len(resized) == 1 and resized[0].startswith("pos_embed.")
    backbones.save_weights(trunk, tmp_path / "trunk.safetensors")
    assert backbones.load_model(tmp_path / "trunk.safetensors").config == trunk.config
    assert f": {len(trunk.state_dict())} tensors loaded" in caplog.text
    assert f"resized {resized[0]}: from" in caplog.text
    rest = {name for name in before if not name.startswith(prefix)}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in rest)


def test_initial_weights_that_do_not_fit(tmp_path):
    model = detector()
    with pytest.raises(UserError, match=r"train\.init_checkpoint: .*rev_vit_tiny.*does not fit"):
        load_initial_weights(model, str(GOLDEN / "rev_vit_tiny.pyth"))
    cut = tmp_path / "cut.pyth"
    cut.write_bytes((GOLDEN / "rev_vit_tiny.pyth").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.pyth is no checkpoint, or a damaged one"):
        load_initial_weights(model, str(cut))
    with pytest.raises(UserError, match=r"REV_VIT_B\.pyth does not exist: check the path"):
        load_initial_weights(model, "file:///no/such/REV_VIT_B.pyth")


def test_initial_weights_of_a_detector(tmp_path):
    shallow = "model.backbone.net.model.depth=1"
    saved = detector(shallow)
    Checkpointer(saved, str(tmp_path)).save("detector")
    loaded = detector(shallow, "model.roi_heads.num_classes=9")
    load_initial_weights(loaded, str(tmp_path / "detector.pth"))
    assert same(saved.backbone, loaded.backbone)
    assert same(saved.roi_heads.box_head, loaded.roi_heads.box_head)


def test_the_scale_of_the_loss_goes_along():
    """Of float16, also out of and into runs without it."""

    def trainer(dtype: torch.dtype) -> Trainer:
        model = nn.Linear(2, 1)
        return Trainer(model, [], torch.optim.SGD(model.parameters(), 0.1), amp_dtype=dtype)

    first, again, plain = map(trainer, (torch.float16, torch.float16, torch.bfloat16))
    first.grad_scaler.scale(torch.ones(1))
    first.grad_scaler.update(512.0)
    again.load_state_dict(first.state_dict())
    assert again.grad_scaler.get_scale() == 512
    plain.load_state_dict(first.state_dict())
    again.load_state_dict(plain.state_dict())
    assert again.grad_scaler.get_scale() == 512
