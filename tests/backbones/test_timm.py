"""The models in timm's registry: what timm's own tests ask of every model, and its training."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import backbones
from backbones.registry import MODELS, input_shape

timm = pytest.importorskip("timm")
for part in ("data", "models", "optim", "utils"):
    importlib.import_module(f"timm.{part}")
importlib.import_module("backbones.timm")

TINY = {"embed_dim": 16, "depth": 4, "img_size": 32}


@pytest.mark.parametrize("name", MODELS)
def test_the_registry_checks_of_timm(name):
    assert (
        timm.models.is_model(name)
        and name in timm.list_models(name)
        and timm.models.model_entrypoint(name)
    )
    assert (name in timm.list_models(pretrained=True)) is bool(MODELS[name].weights)
    depth = {"depth": 5, "transitions": (1, 2, 3)} if "mvit" in name else {"depth": 2}
    place = {"device": "meta", "dtype": torch.float32, **depth}
    model = timm.create_model(name, **place).eval()
    assert type(model) is MODELS[name].constructor
    assert {p.device.type for p in model.parameters()} == {"meta"}
    cfg, state = model.default_cfg, model.state_dict()
    assert model.in_chans == cfg["input_size"][0] and model.num_classes == cfg["num_classes"]
    assert f"{cfg['classifier']}.weight" in state and f"{cfg['first_conv']}.weight" in state
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, not_an_argument=1, **place)

    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    blocks = len(backbones.engine.policies.blocks_of(model))
    assert groups["patch_embed.proj.weight"] == 0 and groups["head.weight"] == blocks + 1
    assert {*groups.values()} == {*range(blocks + 2)}
    assert model.no_weight_decay() <= state.keys()

    image = torch.zeros(2, *input_shape(model), device="meta")
    tokens = model.forward_features(image)
    before = model.forward_head(tokens, pre_logits=True)
    assert tokens.shape[2] == model.num_features
    assert before.shape == (2, model.head_hidden_size)
    last, maps = model.forward_intermediates(image)
    assert last.shape == tokens.shape and len(maps) == len(model.feature_info)
    features = timm.create_model(name, features_only=True, **place)
    channels, reductions = features.feature_info.channels(), features.feature_info.reduction()
    for got, chans, reduction in zip(features(image), channels, reductions, strict=True):
        assert got.shape[:2] == (2, chans) and got.shape[-1] == -(-image.shape[-1] // reduction)
    model.reset_classifier(0)
    assert model(image).shape == before.shape
    model.reset_classifier(7)
    assert model(image).shape == (2, 7) and model.get_classifier().weight.is_meta
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(7, "max")
    assert model.to(torch.bfloat16)(image.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["rev_vit_tiny", "rev_mvit_base", "vit_tiny", "mvit_base"])
def test_training_as_by_the_script_of_timm(name, tmp_path):
    extra = {"transitions": (1, 2)} if "mvit" in name else {"num_heads": 2}
    arguments = {**TINY, **extra}
    model = timm.create_model(name, num_classes=3, drop_rate=0.0, bn_eps=None, **arguments)
    image = torch.randn(2, 3, 32, 32)
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 224, 224) and config["interpolation"] == "bicubic"

    def policies() -> set[str]:
        return {b.memory_policy for b in backbones.engine.policies.blocks_of(model).values()}

    model.set_grad_checkpointing(False)
    assert policies() == {"store"}
    stored = model(image)
    model.set_grad_checkpointing()
    assert ("reversible" in policies()) is name.startswith("rev_") and "store" not in policies()
    torch.testing.assert_close(model(image), stored)

    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.5
    )
    names = {p: n for n, p in model.named_parameters()}
    decay = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert decay["head.weight"]["lr_scale"] == 1 and decay["head.weight"]["weight_decay"]
    assert decay["patch_embed.proj.weight"]["lr_scale"] == 0.5**5
    assert decay[next(n for n in decay if "pos_embed" in n)]["weight_decay"] == 0
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    losses = []
    for step in range(6):
        loss = torch.nn.functional.cross_entropy(model(image), torch.tensor([0, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=step)
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    saver = timm.utils.CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=tmp_path, recovery_dir=tmp_path
    )
    saver.save_checkpoint(0, metric=1.0)
    again = timm.create_model(name, num_classes=3, **arguments)
    timm.models.load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=False)
    backbones.set_memory(again, "store")
    torch.testing.assert_close(again(image), model(image))


def test_features_start_from_a_file_of_anybody(tmp_path):
    arguments = {**TINY, "num_heads": 2}
    theirs = timm.models.VisionTransformer(
        class_token=False, global_pool="avg", fc_norm=False, num_classes=5, **arguments
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = timm.create_model(
        "vit_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "theirs.pth")},
        num_classes=5,
        **arguments,
    ).eval()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(image), theirs(image))
    with pytest.raises(ValueError, match="no weights are released for 'vit_tiny'"):
        timm.create_model("vit_tiny", pretrained=True)


def test_without_timm_one_line_says_what_is_missing():
    code = "import sys; sys.modules['timm'] = None; import backbones, backbones.timm"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.endswith("backbones.timm needs timm: pip install 'revvit-toolkit[timm]'")
