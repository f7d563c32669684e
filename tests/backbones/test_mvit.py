"""Rev-MViT and its twin, images and clips: sizes, operations, shapes, any input."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from backbones import MViT, ReversibleBlock, RevMViT, create_model
from backbones.engine.policies import blocks_of
from backbones.models.layers import MLPBranch, SpaceTimePositionEmbedding
from backbones.models.pooled_attention import PooledAttentionBranch, StageTransition

SMALL = {"img_size": 32, "embed_dim": 6, "depth": 6, "transitions": (1, 3), "num_classes": 3}
SMALL_CLIP = {**SMALL, "num_frames": 4, "kv_stride": 8, "qkv_bias": False}


def test_maps_before_the_last_are_the_streams_themselves() -> None:
    model = RevMViT(**SMALL).double()
    streams: list[tuple[Tensor, Tensor]] = []
    model.stages[1].register_forward_hook(lambda _module, _args, output: streams.append(output))
    maps = model.feature_maps(torch.randn(3, 3, 32, 32, dtype=torch.float64))
    assert torch.equal(maps[1], torch.cat(streams[0], -1).squeeze(1).permute(0, 3, 1, 2))


def count(name: str, **overrides: object) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in create_model(name, **overrides).parameters())


def test_parameters_of_other_fusions() -> None:
    """Of the released models test_zoo.py counts them."""
    assert count("rev_mvit_base_16x4", fusion="concat") == 35_737_264
    assert count("rev_mvit_base_16x4", fusion="concat_linear_2") == 38_837_872


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


@pytest.mark.parametrize(
    "name, strides",
    (("rev_mvit_base", (4, 2, 1, 1)), ("rev_mvit_base_16x4", (8, 4, 2, 1))),
)
def test_strides_of_keys_and_values(name: str, strides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    kernel = (3 if model.clips else 1, 3, 3)
    for stage, stride in zip(model.stages, strides, strict=True):
        attentions = [block.f.attn for block in blocks_of(stage).values()]
        for attention in attentions:
            for pool in (attention.pool_k, attention.pool_v):
                assert pool.stride == (1, stride, stride) and pool.kernel_size == kernel
        pools_q = [attention.pool_q for attention in attentions]
        assert all(pool is None for pool in pools_q[stage.transition is not None :])
        assert stage.transition is None or pools_q[0].stride == (1, 2, 2)


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
