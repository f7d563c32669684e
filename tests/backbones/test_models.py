"""The models by name: sizes, shapes, input sizes and error messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones import (
    MViT,
    RevMViT,
    RevViT,
    ViT,
    create_model,
    list_models,
    register_model,
    set_memory,
)
from backbones.registry import MODELS, input_shape
from tests.backbones.helpers import random_model
from tests.backbones.test_mvit import SMALL as MVIT
from tests.backbones.test_mvit import SMALL_CLIP as CLIPS
from tests.backbones.test_windows import SMALL as WINDOWS

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def meta_model(name: str, **overrides: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


def test_list_models() -> None:
    names = list_models()
    for size in ("small", "base", "large"):
        assert {f"rev_vit_{size}", f"vit_{size}"} <= set(names)
    assert names == sorted(set(names))
    for name in names:
        assert not name.startswith("rev_") or name.removeprefix("rev_") in names, "has no twin"


@pytest.mark.parametrize("name", list_models())
def test_every_model_at_its_published_width(name: str) -> None:
    """On the meta device: a batch of two through the model and back. One block a stage says all."""
    shallow = {"depth": 5, "transitions": (1, 2, 3)} if "mvit" in name else {"depth": 2}
    model = meta_model(name, **shallow)
    inputs = torch.empty(2, *input_shape(model), device="meta")
    reductions = (
        [4, 8, 16, 32] if "mvit" in name else [14 if name.endswith(("huge", "giant")) else 16]
    )
    assert [info["reduction"] for info in model.feature_info] == reductions
    for stage_map, info in zip(model.feature_maps(inputs), model.feature_info, strict=True):
        time = (8,) if inputs.ndim == 5 else ()
        side = 224 // info["reduction"]
        assert stage_map.shape == (2, info["num_chs"], *time, side, side)
    logits = model(inputs)
    assert logits.shape == (2, 400 if "16x4" in name else 1000)
    logits.sum().backward()
    assert all(param.grad is not None for param in model.parameters())


KINDS: dict[str, tuple[tuple[type[nn.Module], ...], dict[str, Any]]] = {
    "vit": ((ViT, RevViT), {**SMALL, "num_classes": 3}),
    "windows": ((ViT, RevViT), WINDOWS),
    "mvit": ((MViT, RevMViT), MVIT),
    "clips": ((MViT, RevMViT), CLIPS),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("streams", (1, 2), ids=("twin", "reversible"))


def small_model(kind: str, streams: int, **overrides: Any) -> nn.Module:
    pair, arguments = KINDS[kind]
    return pair[streams - 1](**{**arguments, **overrides})


def random_input(kind: str, batch: int, *size: int, frames: int = 4) -> Tensor:
    return torch.randn(batch, 3, *((frames,) if kind == "clips" else ()), *size)


@every_kind
@both
def test_shapes(kind: str, streams: int) -> None:
    model = small_model(kind, streams).eval()
    inputs = random_input(kind, 2, 32, 64)
    widths = {"vit": [32], "windows": [8]}.get(kind, [6, 12, 24])
    channels = [streams * width for width in widths]
    assert [info["num_chs"] for info in model.feature_info] == channels
    assert model.num_features == channels[-1]
    maps = model.feature_maps(inputs)
    assert [stage_map.shape[1] for stage_map in maps] == channels
    features = model.forward_features(inputs)
    assert features.shape == (2, maps[-1].shape[2:].numel(), channels[-1])
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), features)
    torch.testing.assert_close(model(inputs), model.head(features.mean(1)))
    pooled = small_model(kind, streams, num_classes=0).eval()
    torch.testing.assert_close(pooled(inputs), pooled.forward_features(inputs).mean(1))
    assert not any(key.startswith("head") for key in pooled.state_dict())


@pytest.mark.parametrize(
    "size",
    ((32, 32), (64, 64), (48, 24), (96, 40), (120, 16), (33, 71), (33, 50), (31, 7), (1, 1)),
    ids=str,
)
@every_kind
@both
def test_any_input_size(kind: str, streams: int, size: tuple[int, int]) -> None:
    """Other than the configured one, no multiples of a patch or a window, odd at a transition."""
    model = small_model(kind, streams)
    for frames in (1, 3, 4, 8) if kind == "clips" else (1,):
        inputs = random_input(kind, 1, *size, frames=frames)
        for stage_map, info in zip(model.feature_maps(inputs), model.feature_info, strict=True):
            sides = [-(-side // info["reduction"]) for side in size]
            time = [-(-frames // 2)] if kind == "clips" else []
            assert stage_map.shape == (1, info["num_chs"], *time, *sides)
        logits = model(inputs)
        assert logits.shape == (1, 3) and logits.isfinite().all()
        model.zero_grad()
        logits.sum().backward()
        assert all(param.grad.isfinite().all() for param in model.pos_embed.parameters())


@every_kind
def test_samples_of_a_batch_do_not_touch_each_other(kind: str) -> None:
    (_, reversible), arguments = KINDS[kind]
    model = random_model(reversible, **arguments).eval()
    inputs = random_input(kind, 3, 50, 37).double()
    alone = torch.cat([model(sample[None]) for sample in inputs])
    torch.testing.assert_close(model(inputs), alone)


@both
def test_few_blocks(streams: int) -> None:
    for depth in (0, 1):
        model = small_model("vit", streams, depth=depth)
        assert model(random_input("vit", 1, 32, 32)).isfinite().all()


def test_an_image_is_padded_on_the_right_and_at_the_bottom() -> None:
    model = create_model("rev_vit_small", **SMALL).eval()
    images = torch.randn(1, 3, 30, 27)
    padded = nn.functional.pad(images, (0, 32 - 27, 0, 32 - 30))
    assert torch.equal(model(images), model(padded))


def test_position_embedding_of_a_rectangle_is_resized_along_each_axis() -> None:
    model = create_model("vit_small", **{**SMALL, "img_size": (16, 64)})
    position = model.pos_embed
    assert position.grid == (2, 8) and position.weight.shape == (1, 16, 32)
    with torch.no_grad():  # grows along the width, is constant along the height
        ramp = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 2, 8, 32)
        position.weight.copy_(ramp.reshape(1, 16, 32))
    resized = position(torch.zeros(1, 1, 5, 16, 32))[0, 0, :, :, 0]
    assert torch.allclose(resized, resized[:1].expand(5, 16), atol=1e-5)
    # Bicubic interpolation is not exact on a ramp, but close.
    torch.testing.assert_close(
        resized[0, 4:12], torch.arange(4, 12) / 2 - 0.25, atol=0.05, rtol=0.0
    )


@pytest.mark.parametrize("name", ("rev_vit_small", "vit_small"))
def test_other_arguments(name: str) -> None:
    model = create_model(name, **SMALL, in_chans=1, qkv_bias=False, mlp_ratio=2.5)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 1000)
    shapes = {key: tuple(param.shape) for key, param in model.named_parameters()}
    assert not any(key.endswith("qkv.bias") for key in shapes)
    assert {shape for key, shape in shapes.items() if key.endswith("fc1.weight")} == {(80, 32)}


def test_twins_have_the_same_parameters_but_for_the_width_of_norm_and_head() -> None:
    reversible, twin = RevViT(**SMALL).state_dict(), ViT(**SMALL).state_dict()
    renamed = {key.replace("blocks.blocks.", "blocks."): v.shape for key, v in reversible.items()}
    assert renamed.keys() == twin.keys()
    differ = {key for key, v in twin.items() if v.shape != renamed[key]}
    assert differ == {"norm.weight", "norm.bias", "head.weight"}


def test_reversible_is_the_policy_of_a_new_model() -> None:
    policies = [block.memory_policy for block in RevViT(**SMALL).blocks.blocks]
    assert policies == ["reversible"] * 2


def test_stored_blocks_are_the_last_ones() -> None:
    model = RevViT(**{**SMALL, "depth": 5})
    for policy in ("reversible", "checkpoint", "store"):
        set_memory(model, policy, stored_blocks=2)
        policies = [block.memory_policy for block in model.blocks.blocks]
        assert policies == [policy] * 3 + ["store"] * 2
    set_memory(model, "reversible")
    assert {block.memory_policy for block in model.blocks.blocks} == {"reversible"}


@pytest.mark.parametrize("shape", ((2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32), (2, 3, 4, 32, 32)))
def test_inputs_that_are_no_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, H, W\)"):
        create_model("rev_vit_small", **SMALL)(torch.zeros(shape))


def test_errors_of_create_model() -> None:
    with pytest.raises(ValueError, match=r"no model 'rev_vit_smal'; did you mean rev_vit_small"):
        create_model("rev_vit_smal")
    with pytest.raises(
        ValueError, match=r"no model 'xyz': backbones\.list_models\(\) has all names"
    ):
        create_model("xyz")
    with pytest.raises(ValueError, match=r"takes no argument 'embed_dims'; did you mean embed_dim"):
        create_model("vit_small", embed_dims=3)
    with pytest.raises(ValueError, match="pretrained=False"):
        create_model("vit_small", pretrained=True)
    with pytest.raises(ValueError, match="'vit_small' is registered already"):
        register_model("vit_small", ViT)
    with pytest.raises(ValueError, match="img_size 30 is not divisible by patch_size 8"):
        create_model("vit_small", **{**SMALL, "img_size": 30})
    with pytest.raises(ValueError, match="embed_dim 32 is not divisible by num_heads 3"):
        create_model("vit_small", **{**SMALL, "num_heads": 3})
    for arguments, message in (
        ({"class_token": True, "window_size": 2}, "no place in windows"),
        ({"num_registers": 1, "use_rel_pos": True}, "no place in windows"),
        ({"global_pool": "token"}, "global_pool 'token': choose 'avg', or .* class_token=True"),
        ({"global_pool": "max"}, "global_pool 'max'"),
        ({"fuse": "mean"}, "fuse 'mean': .* one of a single stream has nothing to fuse"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model("vit_small", **SMALL, **arguments)
    with pytest.raises(ValueError, match="fuse 'sum': a reversible model takes 'concat' or 'mean'"):
        create_model("rev_mvit_base", fuse="sum")


@pytest.mark.parametrize("reversible", (True, False))
def test_tokens_in_front_of_the_patches(reversible: bool) -> None:
    options = {"class_token": True, "num_registers": 2, "num_classes": 3, "fc_norm": True}
    model = create_model("rev_vit_small" if reversible else "vit_small", **SMALL, **options).eval()
    inputs = torch.randn(2, 3, 32, 48)
    tokens = model.forward_features(inputs)
    assert model.num_prefix_tokens == 3 and tokens.shape == (2, 3 + 24, model.num_features)
    (stage_map,) = model.feature_maps(inputs)
    assert torch.equal(stage_map.flatten(2).transpose(1, 2), tokens[:, 3:])
    torch.testing.assert_close(model(inputs), model.head(model.fc_norm(tokens[:, 0])))
    model.global_pool = "avg"
    expected = model.head(model.fc_norm(tokens[:, 3:].mean(1)))
    torch.testing.assert_close(model(inputs), expected)


def test_errors_of_set_memory() -> None:
    model = create_model("rev_vit_small", **SMALL)
    with pytest.raises(ValueError, match=r"'reverse' does not exist; .*'store', 'checkpoint'"):
        set_memory(model, "reverse")
    for k in (-1, 3):
        with pytest.raises(ValueError, match=rf"must be 0 … 2 for RevViT, got {k}"):
            set_memory(model, "reversible", stored_blocks=k)
    with pytest.raises(ValueError, match=r"ViT has no reversible blocks; use 'checkpoint'"):
        set_memory(create_model("vit_small", **SMALL), "reversible")
    with pytest.raises(ValueError, match="Linear holds no block"):
        set_memory(nn.Linear(2, 2), "store")


def test_channels_last() -> None:
    """The usual flag for models of images; those of clips say which one is theirs."""
    images = create_model("rev_mvit_base", img_size=32, depth=4, transitions=(1, 2, 3)).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = images(x)
    images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(images(x.to(memory_format=torch.channels_last)), expected)
    clips = create_model("rev_mvit_base_16x4", img_size=32, depth=4, transitions=(1, 2, 3))
    with pytest.raises(RuntimeError, match="channels_last_3d"):
        clips.to(memory_format=torch.channels_last)
    clips.to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("name", ("rev_vit_tiny", "rev_mvit_base_16x4"))
def test_init_weights_after_to_empty(name: str) -> None:
    """Every parameter is initialised, as a new model's are."""
    settings = {"img_size": 32, "use_rel_pos": True}
    with torch.device("meta"):
        model = create_model(name, **settings)
    model.to_empty(device="cpu")
    for param in model.parameters():
        nn.init.constant_(param, float("nan"))
    model.init_weights()
    usual = dict(create_model(name, **settings).named_parameters())
    for key, param in model.named_parameters():
        assert param.isfinite().all(), key
        torch.testing.assert_close(param.std(), usual[key].std(), rtol=0.5, atol=1e-2, msg=key)


def test_a_registered_model_may_take_any_keyword() -> None:
    class Keywords(nn.Module):
        def __init__(self, **given: int) -> None:
            super().__init__()
            self.given = given

    register_model("any_keyword", Keywords)
    try:
        assert create_model("any_keyword", width=3).given == {"width": 3}
    finally:
        del MODELS["any_keyword"]
