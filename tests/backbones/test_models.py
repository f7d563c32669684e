"""The models by name: sizes, shapes, input sizes and error messages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backbones import RevViT, ViT, create_model, list_models, register_model, set_memory

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def meta_model(name: str, **overrides: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


@pytest.mark.parametrize(
    "name, count", [("rev_vit_small", 22_434_664), ("rev_vit_base", 87_335_656)]
)
def test_parameters_of_the_released_models(name: str, count: int) -> None:
    assert sum(param.numel() for param in meta_model(name).parameters()) == count


VIT_NAMES = [name for name in list_models() if "mvit" not in name]


def test_list_models() -> None:
    names = list_models()
    for size in ("small", "base", "large"):
        assert {f"rev_vit_{size}", f"vit_{size}"} <= set(names)
    assert names == sorted(set(names))
    for name in names:
        assert not name.startswith("rev_") or name.removeprefix("rev_") in names, "has no twin"


@pytest.mark.parametrize("name", VIT_NAMES)
def test_every_model_at_its_published_width(name: str) -> None:
    """On the meta device: a batch of two through the model and back. Two blocks say it all."""
    model = meta_model(name, depth=2)
    logits = model(torch.empty(2, 3, 224, 224, device="meta"))
    assert logits.shape == (2, 1000)
    logits.sum().backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("name", VIT_NAMES)
@pytest.mark.parametrize("depth", (0, 1, 3))
def test_shapes_of_every_model(name: str, depth: int) -> None:
    model = create_model(name, num_classes=5, **{**SMALL, "depth": depth}).eval()
    images = torch.randn(2, 3, 32, 48)
    channels = model.num_features
    assert channels == (64 if name.startswith("rev_") else 32)
    features = model.forward_features(images)
    assert features.shape == (2, 4 * 6, channels)
    (features_as_map,) = model.feature_maps(images)
    assert features_as_map.shape == (2, channels, 4, 6)
    assert torch.equal(features_as_map.flatten(2).transpose(1, 2), features)
    assert model.feature_info == [{"num_chs": channels, "reduction": 8}]
    logits = model(images)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(logits, model.head(features.mean(1)))


@pytest.mark.parametrize("name", ("rev_vit_small", "vit_small"))
@pytest.mark.parametrize("size", ((32, 32), (64, 64), (8, 8), (48, 24), (33, 50), (31, 7), (1, 1)))
def test_any_input_size(name: str, size: tuple[int, int]) -> None:
    model = create_model(name, num_classes=3, **SMALL)
    images = torch.randn(1, 3, *size)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    assert model.feature_maps(images)[0].shape[-2:] == (rows, columns)
    logits = model(images)
    assert logits.shape == (1, 3) and logits.isfinite().all()
    logits.sum().backward()
    assert model.pos_embed.weight.grad.isfinite().all()


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


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    model = create_model("rev_vit_small", **SMALL).eval()
    images = torch.randn(3, 3, 32, 32)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone)


@pytest.mark.parametrize("name", ("rev_vit_small", "vit_small"))
def test_pooled_features_without_classes(name: str) -> None:
    model = create_model(name, num_classes=0, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    pooled = model(images)
    torch.testing.assert_close(pooled, model.forward_features(images).mean(1))
    assert not any(key.startswith("head") for key in model.state_dict())


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
    with pytest.raises(ValueError, match=r"no model 'xyz'; .*rev_vit_base.*vit_small"):
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
