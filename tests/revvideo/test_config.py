"""Recipes: what is in them, what is refused, in which words, and which hardware they run on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from backbones.common.errors import UserError
from backbones.common.settings import keys_of
from revvideo.config import load_config, save_config
from revvideo.settings import Config, describe_schema
from revvideo.training.hardware import find_hardware

MOTION = "configs/video/demo/motion.yaml"


def refused(*overrides: str, config: str | Path = MOTION) -> str:
    with pytest.raises(UserError) as caught:
        load_config(config, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.num_frames=12", 12),
        ("optim.lr=3e-4", 3e-4),
        ("augment.scale=[0.3,1]", [0.3, 1.0]),
        ("train.memory=store", "store"),
        ("train.memory_budget=12GB", "12GB"),
        ("data.annotations=", ""),
        ("data.manifests=null", ""),
    ],
)
def test_overrides_reach_every_kind_of_value(override, value):
    section, _, key = override.partition("=")[0].partition(".")
    assert getattr(getattr(load_config(MOTION, [override]), section), key) == value


def test_overrides_of_arguments_stand_beside_those_of_the_recipe():
    changed = {"depth": 3, "transitions": [1, 2]}
    overrides = [f"model.arguments.{name}={value}" for name, value in changed.items()]
    own = load_config(MOTION).model.arguments
    assert "embed_dim" in own
    assert load_config(MOTION, overrides).model.arguments == {**own, **changed}


TEXTS = ["my videos", "[a, b]", "'a'", 'é"ü', "a,b", "{c: 1}", "x=y", "1e3", "${nowhere}", "#"]


@pytest.mark.parametrize("text", [*TEXTS, r"\\${a}"])
def test_a_text_is_taken_and_saved_as_it_was_typed(text, tmp_path):
    config = load_config(MOTION, [f"data.root={text}"])
    assert config.data.root == text
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("data.num_frame=8", "data.num_frames"),
        ("optim.learning_rate=1", "optim."),
        ("train.lr=1", "optim.lr"),  # in another section
        ("trian.seed=1", "train.seed"),
        ("optm.batchsize=3", "optim.batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest(override, near):
    message = refused(override)
    assert override.partition("=")[0] in message and near in message.partition("did you mean")[2]


def test_a_key_like_no_other_gets_no_guess():
    message = refused("nonsense=1")
    assert "'nonsense'" in message and "--help lists the keys" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.num_frames=many", ["data.num_frames", "int", "'many'"]),
        ("data.num_frames=2.5", ["data.num_frames", "int", "2.5"]),
        ("data.num_frames=", ["data.num_frames", "int"]),
        ("optim.lr=[1]", ["optim.lr", "float"]),
        ("augment.scale=0.5", ["augment.scale", "list"]),
        ("model.arguments=3", ["model.arguments", "dict"]),
        ("augment.scale=[1,0.5]", ["augment.scale", "smaller one first"]),
        ("augment.flip=1.5", ["augment.flip=1.5", "at most 1"]),
        ("optim.lr=nan", ["optim.lr=nan", "at least 0"]),
        ("data.num_frames=0", ["data.num_frames=0", "at least 1"]),
        ("train.precision=fp8", ["fp8", "bf16-mixed"]),
        ("train.memory=revresible", ["revresible", "checkpoint"]),
        ("test.crops=2", ["test.crops=2", "1 (centre) or 3"]),
        ("test.short_side=32", ["test.short_side=32", "data.crop_size=64"]),
        ("augment.rand_augment=rand-m7-mst0.5", ["rand-m7-mst0.5", "rand-m7-n4-mstd0.5-inc1"]),
        ("augment.rand_augment=rand-m7.5", ["augment.rand_augment=rand-m7.5"]),
        ("data.decode_short_side=70", ["data.decode_short_side=70", "test.short_side=72"]),
        ("train.output_dir=???", ["'???' can be no value"]),
        ("data=3", ["data", "section", "data.root"]),
        ("data.root", ["data.root", "key=value"]),
        ("=3", ["key=value"]),
        ("augment.scale=[", ["augment.scale=[", "cannot be read"]),
        ("augment.scale=[a,1]", ["augment.scale", "list", "'a'"]),
        ("train.memory_keep=products", ["train.memory_keep", "list", "products"]),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(override, parts):
    message = refused(override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("data: {num_frame: 3}", "data.num_frames"),
        ("data: [1]", "section"),
        ("data:", "section"),
        ("data: {root: [1]}", "data.root takes a value of type str"),
        ("data: {root: '${nowhere}'}", "'nowhere' not found"),
        ("- 1\n- 2", "no recipe"),
        ("a: [", "cannot be read"),
        ("", "ok"),
        ("data: {root: }\nmodel: {weights: null}", "ok"),
        ("base: nowhere.yaml", "nowhere.yaml"),
        ("base: recipe.yaml", "its own base"),
    ],
)
def test_files_are_checked_like_overrides(tmp_path, text, part):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    if part == "ok":
        assert load_config(file) == Config()
    else:
        assert part in refused(config=file)


def test_a_file_that_does_not_exist_names_the_nearest_recipe():
    line = refused(config="configs/video/demo/moton.yaml")
    assert line.endswith("moton.yaml' does not exist; there are demo/motion")


def test_a_recipe_holds_what_differs_from_its_base(tmp_path):
    first = "optim: {lr: 0.5, epochs: 7}\nmodel: {arguments: {depth: 2}}"
    (tmp_path / "first.yaml").write_text(first)
    second = "base: first.yaml\noptim: {lr: 0.25}\nmodel: {arguments: {embed_dim: 8}}"
    (tmp_path / "second.yaml").write_text(second)
    config = load_config(tmp_path / "second.yaml", ["optim.epochs=9"])
    assert (config.optim.lr, config.optim.epochs) == (0.25, 9)
    assert config.model.arguments == {"depth": 2, "embed_dim": 8}


def test_help_explains_every_key():
    text = describe_schema()
    for entry in keys_of(Config):
        assert entry.rules["text"]
        assert re.search(rf"^  {re.escape(entry.path)} \(", text, re.MULTILINE)
        assert all(choice in text for choice in entry.rules["choices"])
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("gpus", "overrides", "found"),
    [
        (0, [], ("cpu", 1)),
        (0, ["train.devices=2"], ("cpu", 2)),
        (4, [], ("cuda", 4)),
        (4, ["train.devices=2"], ("cuda", 2)),
        (4, ["train.device=cpu"], ("cpu", 1)),
        (0, ["train.device=cuda"], "no GPU is found"),
        (4, ["train.devices=5"], "4 GPUs are there"),
        (4, ["train.device=cpu", "train.precision=16-mixed"], "needs a GPU"),
        (4, ["train.strategy=fsdp", "train.precision=16-mixed"], "set bf16-mixed"),
        (4, ["train.strategy=fsdp", "optim.ema=0.9"], "set optim.ema=0, or ddp"),
    ],
)
def test_what_a_config_comes_to(monkeypatch, gpus, overrides, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = load_config(MOTION, overrides)
    if isinstance(found, tuple):
        assert find_hardware(config) == found
    else:
        with pytest.raises(UserError, match=found):
            find_hardware(config)
