"""Rev-MViT and its twin, images and clips: the original's numbers, policies, shapes, memory.

The files in tests/golden/ were computed with SlowFast's own code from random weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import MemoryPolicy, MViT, ReversibleBlock, RevMViT, create_model, set_memory
from backbones.layers import MLPBranch, SpaceTimePositionEmbedding
from backbones.measure import saved_bytes
from backbones.memory import MemoryManaged
from backbones.pooling import Fusion, PooledAttentionBranch, StageTransition
from tests.backbones.helpers import assert_grads_near, assert_near

GOLDEN = Path(__file__).parents[1] / "golden"

TRANSITIONS = (1, 3)
IMAGE = {
    "img_size": 64,
    "embed_dim": 10,
    "depth": 6,
    "transitions": TRANSITIONS,
    "num_classes": 5,
}
CLIP = {**IMAGE, "depth": 5, "num_frames": 4, "kv_stride": 8, "qkv_bias": False}
GOLDEN_MODELS = {
    "rev_mvit_image_tiny": IMAGE,
    "rev_mvit_video_tiny": {**CLIP, "fusion": "avg"},
}

# Every way to save memory; with 3 stored blocks some are reversed, some stored, some checkpointed.
SAVERS: list[tuple[MemoryPolicy, int]] = [
    ("checkpoint", 0),
    ("reversible", 0),
    ("reversible", 1),
    ("reversible", 3),
]


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """SlowFast's names for our names: layers are numbered within their stage, q, k, v fused."""

    def layer(match: re.Match[str]) -> str:
        index = int(match[1])
        stage = sum(index >= first for first in TRANSITIONS)
        if index in TRANSITIONS:
            return f"stages.{stage}.transition."
        first_block = TRANSITIONS[stage - 1] + 1 if stage else 0
        return f"stages.{stage}.blocks.blocks.{index - first_block}."

    renamed: dict[str, Tensor] = {}
    separate: dict[str, dict[str, Tensor]] = {}
    for key, value in theirs.items():
        key = re.sub(r"rev_backbone\.layers\.(\d+)\.", layer, key)
        key = key.replace(".F.", ".f.").replace(".G.", ".g.").replace("head.projection", "head")
        key = key.replace("pre_q_fuse.fuse_fn.", "fuse.")
        key = re.sub(r"^pos_embed$", "pos_embed.weight", key)
        key = key.replace("pos_embed_spatial", "pos_embed.spatial.weight")
        key = key.replace("pos_embed_temporal", "pos_embed.temporal")
        if match := re.fullmatch(r"(.*attn)\.([qkv])\.(weight|bias)", key):
            separate.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value
        else:
            renamed[key] = value
    return renamed | {
        key: torch.cat([qkv[name] for name in "qkv"]) for key, qkv in separate.items()
    }


def expected_of(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"{name}.expected.pt", weights_only=True)


def golden_model(name: str) -> RevMViT:
    checkpoint = torch.load(GOLDEN / f"{name}.pyth", weights_only=True)
    model = RevMViT(**GOLDEN_MODELS[name]).double()
    weights = {key: value.double() for key, value in ours(checkpoint["model_state"]).items()}
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@pytest.mark.parametrize("policy, k", [("store", 0), *SAVERS])
@pytest.mark.parametrize("training", (True, False))
def test_original_implementation(name: str, policy: MemoryPolicy, k: int, training: bool) -> None:
    expected = expected_of(name)
    model = golden_model(name).train(training)
    set_memory(model, policy, k)
    inputs = expected["input"].double()
    logits = model(inputs)
    torch.testing.assert_close(logits, expected["logits"].double(), rtol=0.0, atol=2e-7)
    features = model.forward_features(inputs)
    torch.testing.assert_close(features, expected["features"].double(), rtol=0.0, atol=1e-6)
    loss = nn.functional.cross_entropy(logits, expected["labels"])
    assert loss.item() == pytest.approx(expected["loss"], abs=2e-7)

    loss.backward()
    grads = ours({key: grad.double() for key, grad in expected["grads"].items()})
    zero = {key.replace("rev_backbone.layers.", "") for key in expected["structurally_zero_grads"]}
    assert len(zero) == model_depth(model) and all(key.endswith("norm_k.bias") for key in zero)
    assert grads.keys() == dict(model.named_parameters()).keys()
    for key, param in model.named_parameters():
        if key.endswith("norm_k.bias"):  # adds the same to every logit of a query
            assert param.grad.abs().max() < 1e-12, key
        else:
            assert_near(param.grad, grads[key], 1e-6, key)


def model_depth(model: nn.Module) -> int:
    return sum(isinstance(module, MemoryManaged) for module in model.modules())


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_streams_before_the_final_norm(name: str) -> None:
    """[Y1 | Y2] in this order."""
    model, expected = golden_model(name), expected_of(name)
    kept: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    model(expected["input"].double())
    streams = kept[0].flatten(1, 3)
    torch.testing.assert_close(streams, expected["encoder_out"].double(), rtol=0.0, atol=1e-6)


# Models of every kind, with everything random switched on.
DROPS = {
    "drop_path_rate": 0.5,
    "drop_rate": 0.2,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.1,
}
SMALL = {"img_size": 32, "embed_dim": 6, "depth": 6, "transitions": (1, 3), "num_classes": 3}
SMALL_CLIP = {**SMALL, "num_frames": 4, "kv_stride": 8, "qkv_bias": False}


def small_input(clips: bool, batch: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, 3, 4, *size) if clips else (batch, 3, *size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_model(model: type[MViT], **arguments: Any) -> MViT:
    """In float64, with weights far from those of a new model, whose branches do almost nothing."""
    torch.manual_seed(1)
    built = model(**arguments).double()
    with torch.no_grad():
        for param in built.parameters():
            param.add_(0.2 * torch.randn_like(param))
    return built


def grads_of(
    model: MViT, inputs: Tensor, policy: MemoryPolicy, k: int, maps: bool
) -> dict[str, Tensor | None]:
    """Gradients of the parameters and the input, and the loss, from a fixed seed."""
    set_memory(model, policy, k)
    model.zero_grad(set_to_none=True)
    inputs = inputs.clone().requires_grad_()
    torch.manual_seed(3)
    outputs = model.feature_maps(inputs) if maps else [model(inputs)]
    loss = torch.zeros((), dtype=torch.float64)
    for y in outputs:
        ramp = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)
        loss = loss + ((y - ramp) ** 2 * (1.5 + ramp)).mean()
    loss.backward()
    grads = {
        name: param.grad
        for name, param in model.named_parameters()
        if not name.endswith("norm_k.bias")  # zero but for rounding
    }
    return grads | {"input": inputs.grad, "loss": loss.detach()}


@pytest.mark.parametrize("maps", (False, True), ids=("logits", "every stage's map"))
@pytest.mark.parametrize("arguments", (SMALL, {**SMALL_CLIP, "fusion": "avg"}), ids=("2d", "3d"))
def test_policies_agree_with_everything_random(arguments: dict[str, Any], maps: bool) -> None:
    model = random_model(RevMViT, **arguments, **DROPS)
    inputs = small_input(model.clips)
    expected = grads_of(model, inputs, "store", 0, maps)
    assert all(grad is None or grad.isfinite().all() for grad in expected.values())
    for policy, k in SAVERS:
        assert_grads_near(grads_of(model, inputs, policy, k, maps), expected, 1e-9)


@pytest.mark.parametrize("maps", (False, True), ids=("logits", "every stage's map"))
@pytest.mark.parametrize("arguments", (SMALL, SMALL_CLIP), ids=("2d", "3d"))
def test_policies_of_the_twin_agree(arguments: dict[str, Any], maps: bool) -> None:
    model = random_model(MViT, **arguments, **DROPS)
    inputs = small_input(model.clips)
    expected = grads_of(model, inputs, "store", 0, maps)
    for k in (0, 3):
        assert_grads_near(grads_of(model, inputs, "checkpoint", k, maps), expected, 1e-9)


@pytest.mark.parametrize("fusion", ("avg", "concat", "concat_linear_2"))
def test_policies_agree_on_odd_grids(fusion: Fusion) -> None:
    model = random_model(RevMViT, **SMALL, fusion=fusion)
    inputs = small_input(False, batch=1, size=(34, 51))  # grids of 9 x 13, 5 x 7 and 3 x 4
    expected = grads_of(model, inputs, "store", 0, maps=True)
    for policy, k in SAVERS:
        assert_grads_near(grads_of(model, inputs, policy, k, maps=True), expected, 1e-9)


def test_neighbouring_and_last_transitions() -> None:
    model = random_model(RevMViT, **{**SMALL, "depth": 4, "transitions": (1, 2, 3)})
    inputs = small_input(False)
    expected = grads_of(model, inputs, "store", 0, maps=True)
    for policy, k in SAVERS:
        assert_grads_near(grads_of(model, inputs, policy, k, maps=True), expected, 1e-9)


def test_gradient_of_one_stage_alone() -> None:
    """The blocks behind it get none, and nobody rebuilds anything for them."""
    grads = {}
    for policy in ("store", "reversible"):
        model = random_model(RevMViT, **SMALL)
        set_memory(model, policy)
        model.feature_maps(small_input(False))[1].square().mean().backward()
        grads[policy] = {
            name: param.grad for name, param in model.named_parameters() if "norm_k" not in name
        }
    assert_grads_near(grads["reversible"], grads["store"], 1e-9)
    without = {name for name, grad in grads["store"].items() if grad is None}
    assert without and all(name.startswith(("stages.2", "norm", "head")) for name in without)


@pytest.mark.parametrize("arguments", (SMALL, {**SMALL_CLIP, "kv_stride": 4}), ids=("2d", "3d"))
def test_autocast(arguments: dict[str, Any]) -> None:
    """Policies agree with each other closely, and with float32 as far as bfloat16 can."""

    def step(policy: MemoryPolicy, autocast: bool) -> dict[str, Tensor | None]:
        model = random_model(RevMViT, **arguments).float()
        set_memory(model, policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(small_input(model.clips).float())
        logits.float().square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if "norm_k" not in name}

    stored = step("store", autocast=True)
    for policy in ("checkpoint", "reversible"):
        # bfloat16 has 8 bits: the rounding of a rebuilt input may flip the last one.
        assert_grads_near(step(policy, autocast=True), stored, 0.02)
    assert_grads_near(stored, step("store", autocast=False), 0.2)


@pytest.mark.parametrize("model", (RevMViT, MViT))
@pytest.mark.parametrize(
    "size", ((32, 32), (64, 64), (96, 40), (33, 50), (31, 7), (1, 1)), ids=lambda size: str(size)
)
@pytest.mark.parametrize("frames", (None, 1, 3, 4, 8))
def test_any_input_size(model: type[MViT], size: tuple[int, int], frames: int | None) -> None:
    """Sizes other than the configured one, and grids that are odd before a transition."""
    built = model(**(SMALL if frames is None else SMALL_CLIP))
    shape = (1, 3, *size) if frames is None else (1, 3, frames, *size)
    maps = built.feature_maps(torch.randn(shape))
    assert [info["reduction"] for info in built.feature_info] == [4, 8, 16]
    grid = torch.tensor(size)
    for stage_map, info in zip(maps, built.feature_info, strict=True):
        sides = [int(-(-side // info["reduction"])) for side in grid]
        time = [] if frames is None else [-(-frames // 2)]
        assert stage_map.shape == (1, info["num_chs"], *time, *sides)
    logits = built(torch.randn(shape))
    assert logits.shape == (1, 3) and logits.isfinite().all()
    logits.sum().backward()
    assert all(param.grad.isfinite().all() for param in built.pos_embed.parameters())


@pytest.mark.parametrize("clips", (False, True))
@pytest.mark.parametrize("model, width", ((RevMViT, 2), (MViT, 1)))
def test_shapes(model: type[MViT], width: int, clips: bool) -> None:
    built = model(**(SMALL_CLIP if clips else SMALL)).eval()
    inputs = small_input(clips, batch=2, size=(32, 64)).float()
    channels = [6 * width, 12 * width, 24 * width]
    assert [info["num_chs"] for info in built.feature_info] == channels
    assert built.num_features == channels[-1]
    maps = built.feature_maps(inputs)
    assert [stage_map.shape[1] for stage_map in maps] == channels
    features = built.forward_features(inputs)
    assert features.shape == (2, (2 if clips else 1) * 2 * 4, channels[-1])
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), features)
    torch.testing.assert_close(built(inputs), built.head(features.mean(1)))
    pooled = model(**{**(SMALL_CLIP if clips else SMALL), "num_classes": 0}).eval()
    torch.testing.assert_close(pooled(inputs), pooled.forward_features(inputs).mean(1))
    assert not any(key.startswith("head") for key in pooled.state_dict())


def test_maps_before_the_last_are_the_streams_themselves() -> None:
    model = RevMViT(**SMALL).double()
    streams: list[tuple[Tensor, Tensor]] = []
    model.stages[1].register_forward_hook(lambda _module, _args, output: streams.append(output))
    maps = model.feature_maps(small_input(False))
    assert torch.equal(maps[1], torch.cat(streams[0], -1).squeeze(1).permute(0, 3, 1, 2))


@pytest.mark.parametrize("clips", (False, True))
def test_samples_of_a_batch_do_not_touch_each_other(clips: bool) -> None:
    model = random_model(RevMViT, **(SMALL_CLIP if clips else SMALL)).eval()
    inputs = small_input(clips)
    alone = torch.cat([model(sample[None]) for sample in inputs])
    torch.testing.assert_close(model(inputs), alone)


def count(name: str, **overrides: object) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in create_model(name, **overrides).parameters())


def test_parameters_of_the_released_models() -> None:
    assert count("rev_mvit_base") == 39_689_320
    assert count("rev_mvit_base_16x4") == 34_963_120
    assert count("rev_mvit_base_16x4", fusion="concat") == 35_737_264
    assert count("rev_mvit_base_16x4", fusion="concat_linear_2") == 38_837_872


@pytest.mark.parametrize(
    "name, clip, macs",
    (("rev_mvit_base", (), 8_637_816_576), ("rev_mvit_base_16x4", (16,), 63_652_357_632)),
)
def test_operations_of_the_released_models(name: str, clip: tuple[int, ...], macs: int) -> None:
    """Multiply-accumulates in convolutions, linear layers and attention, as the original's."""
    with torch.device("meta"):
        model = create_model(name).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *clip, 224, 224))
    assert counter.get_total_flops() == 2 * macs


def test_parameters_of_the_twins() -> None:
    """The same as those of two streams that are averaged, but for the width of norm and head."""
    for name, classes in (("mvit_base", 1000), ("mvit_base_16x4", 400)):
        assert count(name) == count(f"rev_{name}", fusion="avg") - 768 * (2 + classes)
    reversible, twin = (model(**SMALL).state_dict() for model in (RevMViT, MViT))
    averaged = RevMViT(**SMALL, fusion="avg").state_dict()
    for state, differing in ((averaged, "norm|head"), (reversible, r"norm|head|.*\.transition")):
        renamed = {key.replace("blocks.blocks.", "blocks."): v.shape for key, v in state.items()}
        keys = renamed.keys() | twin.keys()
        differ = {key for key in keys if key not in twin or twin[key].shape != renamed.get(key)}
        assert all(re.match(differing, key) for key in differ)


@pytest.mark.parametrize("name", ("rev_mvit_base", "mvit_base"))
@pytest.mark.parametrize("clip", ((), (16,)), ids=("image", "clip"))
def test_every_model_at_its_published_size(name: str, clip: tuple[int, ...]) -> None:
    """On the meta device: a batch of two through the whole model, backward included."""
    name, classes = (f"{name}_16x4", 400) if clip else (name, 1000)
    with torch.device("meta"):
        model = create_model(name)
        maps = model.feature_maps(torch.empty(2, 3, *clip, 224, 224))
        logits = model(torch.empty(2, 3, *clip, 224, 224))
    time = (8,) if clip else ()
    shapes = [
        (2, info["num_chs"], *time, side, side)
        for info, side in zip(model.feature_info, (56, 28, 14, 7), strict=True)
    ]
    assert [tuple(stage_map.shape) for stage_map in maps] == shapes
    assert logits.shape == (2, classes)
    logits.sum().backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize(
    "name, strides",
    (("rev_mvit_base", (4, 2, 1, 1)), ("rev_mvit_base_16x4", (8, 4, 2, 1))),
)
def test_strides_of_keys_and_values(name: str, strides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    kernel = (3 if model.clips else 1, 3, 3)
    for stage, stride in zip(model.stages, strides, strict=True):
        attentions = [block.f.attn for block in stage.modules() if isinstance(block, MemoryManaged)]
        for attention in attentions:
            for pool in (attention.pool_k, attention.pool_v):
                assert pool.stride == (1, stride, stride) and pool.kernel_size == kernel
        pools_q = [attention.pool_q for attention in attentions]
        assert all(pool is None for pool in pools_q[stage.transition is not None :])
        assert stage.transition is None or pools_q[0].stride == (1, 2, 2)


def test_set_memory_counts_transitions() -> None:
    model = RevMViT(**SMALL)
    blocks = [block for block in model.modules() if isinstance(block, MemoryManaged)]
    reversed_and_not = ["reversible", "checkpoint", "reversible", "checkpoint"] + 2 * ["reversible"]
    assert [block.memory_policy for block in blocks] == reversed_and_not, "of a new model"
    assert [isinstance(block, StageTransition) for block in blocks] == [
        policy == "checkpoint" for policy in reversed_and_not
    ]
    set_memory(model, "store")
    assert {block.memory_policy for block in blocks} == {"store"}
    for k in range(7):
        set_memory(model, "reversible", k)
        policies = [block.memory_policy for block in blocks]
        assert policies == reversed_and_not[: 6 - k] + ["store"] * k
    assert {block.memory_policy for block in MViT(**SMALL).modules() if hasattr(block, "f")} == {
        "store"
    }
    with pytest.raises(ValueError, match="MViT has no reversible blocks"):
        set_memory(MViT(**SMALL), "reversible")


def held_bytes(model: nn.Module, inputs: Tensor, policy: MemoryPolicy) -> int:
    set_memory(model, policy)
    with saved_bytes(ignore=model) as held:
        loss = model(inputs).sum()
    assert loss.requires_grad
    return held.bytes


@pytest.mark.parametrize(
    "name, clip, times", (("rev_mvit_base", (), 30), ("rev_mvit_base_16x4", (16,), 25))
)
def test_bytes_held(name: str, clip: tuple[int, ...], times: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
        inputs = torch.empty(1, 3, *clip, 224, 224)
    stored, checkpointed, reversed_ = (
        held_bytes(model, inputs, policy) for policy in ("store", "checkpoint", "reversible")
    )
    assert reversed_ * times < stored
    assert reversed_ * 2 < checkpointed


def test_bytes_held_do_not_grow_with_the_depth_of_a_stage() -> None:
    inputs = torch.randn(2, 3, 32, 32)
    held = [
        held_bytes(RevMViT(**{**SMALL, "depth": depth}), inputs, "reversible") for depth in (6, 12)
    ]
    assert held[0] == held[1]


def make_transition(drop_path: float = 0.0) -> StageTransition:
    f = PooledAttentionBranch(4, 8, 2, (1, 3, 3), (1, 1, 1), (1, 2, 2))
    return StageTransition(f, MLPBranch(8), "avg", drop_path).double()


def test_drop_path_of_a_transition_spares_the_residual() -> None:
    transition = make_transition(drop_path=0.5)
    y1, y2 = torch.randn(2, 64, 1, 5, 4, 4, dtype=torch.float64)
    out = transition(y1, y2)
    residual = transition.f.attn.pool_like_queries(transition.res_proj((y1 + y2) / 2))
    dropped = (out == residual).flatten(1).all(1)
    assert out.shape == (64, 1, 3, 2, 8) and 0 < dropped.sum() < 64
    transition.eval()
    x = residual + transition.f((y1 + y2) / 2)
    torch.testing.assert_close(transition(y1, y2), x + transition.g(x))


def test_one_pooling_kernel_serves_all_heads() -> None:
    attention = make_transition().f.attn
    head = torch.randn(2, 1, 5, 4, 4, dtype=torch.float64)
    pooled = attention.pool_like_queries(torch.cat((head, head), -1))
    assert torch.equal(pooled[..., :4], pooled[..., 4:])


def test_position_embedding_is_resized_linearly_in_time() -> None:
    position = SpaceTimePositionEmbedding((4, 2, 3), 5)
    nn.init.zeros_(position.spatial.weight)
    with torch.no_grad():
        position.temporal.copy_(torch.arange(4.0).view(1, 4, 1).expand(1, 4, 5))
    added = position(torch.zeros(1, 8, 2, 3, 5))
    ramp = (torch.arange(8.0) / 2 - 0.25).clamp(0.0, 3.0)
    torch.testing.assert_close(added, ramp.view(1, 8, 1, 1, 1).expand_as(added))


@pytest.mark.parametrize("model", (RevMViT, MViT))
def test_errors(model: type[MViT]) -> None:
    for transitions in ((0,), (6,), (3, 3), (3, 2)):
        with pytest.raises(ValueError, match=r"transitions must rise within 1 … depth - 1"):
            model(**{**SMALL, "transitions": transitions})
    with pytest.raises(ValueError, match="width 6 is not divisible by num_heads 4"):
        model(**SMALL, num_heads=4)
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, H, W\), got \(1, 3, 4"):
        model(**SMALL)(torch.zeros(1, 3, 4, 32, 32))
    with pytest.raises(ValueError, match=r"expected clips of shape \(B, 3, T, H, W\), got \(1, 3,"):
        model(**SMALL_CLIP)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="fusion 'sum'"):
        model(**SMALL, fusion="sum")
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        model(**SMALL, drop_path_rate=1.0)


def test_the_blocks_of_a_stage_are_reversible() -> None:
    model = RevMViT(**SMALL)
    assert sum(isinstance(module, ReversibleBlock) for module in model.modules()) == 4
    assert [len(stage.blocks.blocks) for stage in model.stages] == [1, 1, 2]
