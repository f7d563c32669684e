"""The weights that people have: each file against the model of the library that wrote it."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones import WeightsError, create_model, load_weights, set_memory
from tests.backbones.helpers import assert_near
from tests.backbones.test_bad_weights import refuse

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
HF = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
HF |= {"image_size": 32, "patch_size": 8}
CLASSES = 7


def ours(name: str = "vit_small", **options: Any) -> nn.Module:
    return create_model(name, **{**SMALL, "num_classes": CLASSES, **options}).double().eval()


def random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.1, generator=generator)
    return model.double().eval()


def timm_vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return random(VisionTransformer(**{**SMALL, "num_classes": CLASSES, **options}))


def timm_swiglu(**options: Any) -> nn.Module:
    from timm.layers import SwiGLUPacked

    return timm_vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=5.5, **options)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return random(VisionTransformer(32, 8, 3, 2, 32, 128, num_classes=CLASSES))


def transformers_vit(kind: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**HF, **options)
    head = "ForImageClassification" if kind == "ViT" else "Model"
    return random(getattr(transformers, kind + head)(config))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    if isinstance(out, Tensor):
        return out
    return out.logits if "logits" in out else out.pooler_output


AVG: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
TOKEN, DINO = {"class_token": True}, {"class_token": True, "num_classes": 0}
LAYOUTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "mean": (lambda: timm_vit(**AVG, fc_norm=False), {}, "timm"),
    "norm behind": (lambda: timm_vit(**AVG), {"fc_norm": True}, "timm"),
    "token": (timm_vit, TOKEN, "timm"),
    "token, mean": (
        lambda: timm_vit(global_pool="avg"),
        {**TOKEN, "global_pool": "avg", "fc_norm": True},
        "timm",
    ),
    "registers": (
        lambda: timm_vit(reg_tokens=4, init_values=0.1, no_embed_class=True),
        {**TOKEN, "num_registers": 4, "layer_scale": 1e-5},
        "timm",
    ),
    "folded": (
        lambda: timm_vit(reg_tokens=4, init_values=0.1),
        {**TOKEN, "num_registers": 4},
        "timm",
    ),
    "swiglu": (lambda: timm_swiglu(), {**TOKEN, "swiglu": True}, "timm"),
    "torchvision": (torchvision_vit, TOKEN, "torchvision"),
    "Hugging Face ViT": (
        lambda: transformers_vit("ViT", intermediate_size=128, num_labels=CLASSES),
        {**TOKEN, "norm_eps": 1e-12},
        "Hugging Face",
    ),
    "Hugging Face DINOv2": (lambda: transformers_vit("Dinov2"), DINO, "Hugging Face"),
    "Hugging Face DINOv2 with registers": (
        lambda: transformers_vit("Dinov2WithRegisters", use_swiglu_ffn=True),
        {**DINO, "num_registers": 4, "layer_scale": 1.0, "swiglu": True},
        "Hugging Face",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_library(layout: str, tmp_path: Path) -> None:
    make, options, name = LAYOUTS[layout]
    theirs, mine = make(), ours(**options)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    report = load_weights(mine, tmp_path / "weights.pth")
    assert report.format == name and not report.missing and "3 blocks of 32" in report.net
    assert sorted(report.loaded) == sorted(mine.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    expected = logits(theirs, x)
    expected.sum().backward()
    wanted = theirs.get_parameter(next(n for n, p in theirs.named_parameters() if p.ndim == 4)).grad
    for policy in ("store", "checkpoint"):
        set_memory(mine, policy)
        mine.zero_grad()
        out = mine(x)
        out.sum().backward()
        assert_near(out, expected, 1e-9)
        assert_near(mine.patch_embed.proj.weight.grad, wanted, 1e-9)
    assert_near(mine.float()(x.float()).double(), expected, 1e-5)


def test_another_size(tmp_path: Path) -> None:
    """Hugging Face's positions are resized as ours; timm's and torchvision's by another kernel."""
    theirs, mine = LAYOUTS["Hugging Face ViT"][0](), ours(**TOKEN, norm_eps=1e-12)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    load_weights(mine, tmp_path / "weights.pth")
    x = torch.randn(1, 3, 48, 64, dtype=torch.double)
    assert_near(mine(x), theirs(x, interpolate_pos_encoding=True).logits, 1e-9)
    other = ours(**TOKEN, norm_eps=1e-12, img_size=(48, 64))
    report = load_weights(other, tmp_path / "weights.pth")
    assert report.resized == {"pos_embed.weight": "from 4×4 to 6×8"}
    assert_near(other(x), mine(x), 1e-6)  # resized once in single precision


def test_what_is_left_out_and_said(tmp_path: Path) -> None:
    theirs, mine = timm_vit(init_values=0.1), ours()
    tensors = theirs.state_dict() | {
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(3),
        "decoder_pos_embed": torch.zeros(1, 17, 3),
        "head_dist.weight": torch.zeros(CLASSES, 32),
    }
    file = tmp_path / "weights.pth"
    torch.save({"model": tensors, "args": Namespace(lr=np.float64(0.1)), "epoch": 3}, file)
    text = str(report := load_weights(mine, file))
    assert report.missing == ["head.weight", "head.bias"]
    for words in (
        "(timm: 3 blocks of 32 channels, patches of 8, class token, LayerScale): 41 tensors",
        "converted LayerScale (6 tensors): folded into attn.proj and mlp.fc2",
        "left out prefix.cls_token: the model has no class token",
        "left out pos_embed.weight[:, :1]: of tokens that are no patches",
        "left out mask_token: stands for masked patches",
        "left out decoder_blocks.0.norm1.weight, decoder_pos_embed: of MAE's decoder",
        "left out head_dist.weight: of the distillation",
        "left out head.weight, head.bias: it reads the class token, the model's reads the mean",
    ):
        assert words in text
    x = torch.randn(1, 3, 32, 32, dtype=torch.double)
    plain = timm_vit(init_values=0.1, class_token=False, global_pool="avg", fc_norm=False)
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
    assert_near(mine.forward_features(x), plain.forward_features(x), 1e-9)


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.model.", "backbone.net.", "net.trunk."))
@pytest.mark.parametrize("key", ("model", "state_dict", "teacher", "student", "model_state", None))
def test_any_nesting_and_prefix(prefix: str, key: str | None, tmp_path: Path) -> None:
    theirs, mine = timm_vit(**AVG, fc_norm=False), ours()
    tensors = {prefix + name: value for name, value in theirs.state_dict().items()}
    torch.save(tensors if key is None else {key: tensors, "epoch": 1}, tmp_path / "x.pth")
    load_weights(mine, tmp_path / "x.pth")
    x = torch.randn(1, 3, 32, 32, dtype=torch.double)
    assert_near(mine(x), theirs(x), 1e-9)


def test_averaged_weights_are_named_and_chosen(tmp_path: Path) -> None:
    tensors = timm_vit(**AVG, fc_norm=False).state_dict()
    averaged = {name: 2 * value for name, value in tensors.items()}
    file, mine, weight = tmp_path / "x.pth", ours(), tensors["norm.weight"]
    both = {f"student.{name}": value for name, value in tensors.items()}
    both |= {f"teacher.{name}": value for name, value in averaged.items()}
    for content, name in (
        ({"state_dict": tensors, "state_dict_ema": averaged}, "state_dict_ema"),
        ({"student": tensors, "teacher": averaged}, "teacher"),
        ({"state_dict": both}, None),  # as Lightning nests them
    ):
        torch.save(content, file)
        report = load_weights(mine, file)
        assert report.averaged == name and (name is None or name in str(report))
        torch.testing.assert_close(mine.norm.weight.data, weight)
        assert load_weights(mine, file, ema=True).averaged is None
        torch.testing.assert_close(mine.norm.weight.data, 2 * weight)
    torch.save({"model": tensors}, file)
    with pytest.raises(WeightsError, match="holds no averaged weights: leave ema out"):
        load_weights(mine, file, ema=True)
    save_file({f"{p}.{n}": v + 0 for p in "ab" for n, v in tensors.items()}, file)
    refuse(mine, file, r"it holds 2 nets: a\., b\.")


def test_safetensors_in_several_files(tmp_path: Path) -> None:
    theirs, mine = timm_vit(**AVG, fc_norm=False), ours()
    tensors, places = theirs.state_dict(), {}
    for part in (0, 1):
        names = [*tensors][part::2]
        places |= dict.fromkeys(names, f"model-{part}.safetensors")
        save_file({name: tensors[name] for name in names}, tmp_path / f"model-{part}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=2))
    load_weights(mine, index)
    x = torch.randn(1, 3, 32, 32, dtype=torch.double)
    assert_near(mine(x), theirs(x), 1e-9)
    index.write_text(json.dumps({"weight_map": {**places, "extra": "model-0.safetensors"}}))
    refuse(mine, index, "names tensors that are in no file: extra")
    (tmp_path / "model-1.safetensors").unlink()
    refuse(mine, index, "names model-1.safetensors, which does not lie beside it")
    index.write_text("{}")
    refuse(mine, index, "is no index of a safetensors checkpoint")


@pytest.mark.parametrize("protocol", (0, 2, 4, 5))
def test_a_pickle_of_arrays(protocol: int, tmp_path: Path) -> None:
    """As Detectron2's zoo has them, with ViTDet's names: without final norm, with a class row."""
    from detectron2.modeling.backbone.vit import ViT

    theirs = ViT(
        **SMALL,
        window_size=2,
        window_block_indexes=(0, 2),
        residual_block_indexes=(),
        use_rel_pos=True,
        out_feature="x",
        pretrain_img_size=48,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        drop_path_rate=0.0,
    )
    random(theirs)
    arrays = {f"backbone.net.{n}": v.numpy() for n, v in theirs.state_dict().items()}
    arrays["backbone.simfp_2.0.weight"] = np.zeros((3, 3), np.float32)
    arrays["proposal_generator.rpn_head.conv.bias"] = np.asfortranarray(np.ones((2, 3), ">f4"))
    content = OrderedDict(model=arrays, __author__="somebody", matching_heuristics=True)
    file = tmp_path / "model_final.pkl"
    file.write_bytes(pickle.dumps(content, protocol))
    options = {"window_size": 2, "global_attn_indexes": (1,), "use_rel_pos": True}
    options["pretrain_img_size"] = 48
    mine = ours(**options, num_classes=0, final_norm=False)
    report = load_weights(mine, file)
    assert report.format == "Detectron2" and not report.missing
    assert set(report.left_out.values()) == {
        "of the detector around the trunk",
        "of tokens that are no patches",
    }
    x = torch.randn(1, 3, 40, 48, dtype=torch.double)
    assert_near(mine.feature_maps(x)[0], theirs(x)["x"], 1e-9)
    with_norm = ours(**options, num_classes=0)
    assert load_weights(with_norm, file).missing == ["norm.weight", "norm.bias"]
    # A trunk of clips or of another width says what it was taken for, and the first thing.
    refuse(
        ours(**options, num_classes=0, embed_dim=64),
        file,
        r"taken for Detectron2's layout, does not fit this ViT: of another shape: .* and 42 more",
    )


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize(
    "value, message",
    (
        (_Evil(), r"holds more than tensors \(builtins.print\), which is not loaded"),
        (np.array([_Evil()], dtype=object), "holds more than tensors|not of numbers"),
        (np.array(["text"]), "not of numbers"),
        (np.array(0.0).dtype, "no state dict"),
        (np.ones(3, np.complex64), "not of numbers"),
    ),
)
def test_what_else_a_pickle_may_hold(
    value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps({"model": {"norm.weight": value}}))
    refuse(ours(), file, message)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "name, words",
    (
        ("vit_base_patch16_clip_224", "a tower of CLIP"),
        ("vit_base_patch16_siglip_224", "a tower of SigLIP"),
        ("beit_base_patch16_224", "relative biases"),
        ("eva02_tiny_patch14_224", "biases of q and v apart|rotary|absolute"),
        ("vit_small_patch16_dinov3", "DINOv3"),
        ("mvitv2_tiny", "MViTv2"),
        ("swin_tiny_patch4_window7_224", "relative biases"),
        ("resnet18", "no vision transformer"),
    ),
)
def test_other_nets_are_refused_by_name(name: str, words: str, tmp_path: Path) -> None:
    import timm

    with torch.device("meta"):
        depth = {"depth": 1} if name.startswith(("vit", "beit", "eva")) else {}
        outline = timm.create_model(name, **depth)
    tensors = {key: torch.zeros(value.shape) for key, value in outline.state_dict().items()}
    torch.save(tensors, tmp_path / "x.pth")
    refuse(ours(), tmp_path / "x.pth", words)


@pytest.mark.parametrize("fuse", ("concat", "mean"))
def test_a_plain_net_goes_into_a_reversible_one(fuse: str, tmp_path: Path) -> None:
    theirs, mine = timm_vit(**AVG, fc_norm=False), ours("rev_vit_small", fuse=fuse)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    report = load_weights(mine, tmp_path / "x.pth")
    assert not report.missing and not report.left_out
    assert "fine-tune" in report.converted["blocks"]
    tensors = theirs.state_dict()
    assert torch.equal(mine.blocks.blocks[1].g.mlp.fc2.weight, tensors["blocks.1.mlp.fc2.weight"])
    if fuse == "concat":
        assert report.converted["norm.weight"] == "two copies, one for each stream"
        expected = torch.cat([tensors["head.weight"]] * 2, dim=1) / 2
    else:
        expected = tensors["head.weight"]
    assert torch.equal(mine.head.weight, expected)
    assert mine(torch.zeros(1, 3, 32, 32, dtype=torch.double)).shape == (1, CLASSES)


def test_our_twins_go_into_reversible_ones_and_not_back(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    for name, options in (("vit_small", SMALL), ("mvit_base", {"img_size": 32, "embed_dim": 8})):
        options = {**options, "num_classes": CLASSES}
        plain = create_model(name, **options)
        fusion = {"fusion": "avg"} if name == "mvit_base" else {}
        twin = create_model(f"rev_{name}", **options, **fusion)
        torch.save(plain.state_dict(), file)
        report = load_weights(twin, file)
        assert not report.missing and "blocks" in report.converted
        torch.save(twin.state_dict(), file)
        refuse(plain, file, "it is of a reversible net.*take its reversible twin")
    torch.save(plain.state_dict(), file)
    refuse(create_model("rev_mvit_base", **options), file, "create the model with fusion='avg'")


def test_patches_of_another_size_give_the_same_tokens(tmp_path: Path) -> None:
    theirs = timm_vit(**AVG, fc_norm=False)
    mine = ours(patch_size=12, img_size=48)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    report = load_weights(mine, tmp_path / "weights.pth")
    assert report.resized == {"patch_embed.proj.weight": "from patches of 8×8 to 12×12"}
    patch = torch.randn(2, 3, 8, 8, dtype=torch.double)
    larger = torch.nn.functional.interpolate(patch, size=(12, 12), mode="bicubic")
    expected = theirs.patch_embed.proj(patch)[:, :, 0, 0]
    assert_near(mine.patch_embed(larger)[:, 0, 0, 0], expected, 1e-9)
