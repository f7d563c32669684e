"""What a user can get wrong: one clear line that names the thing and the remedy, status 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig

from backbones.common.errors import UserError
from revdet import predict, train_net
from revdet.config import MOVED, load_config
from tests.revdet.conftest import DEMO


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.max_itr=3", ["train.max_itr", "train.max_iter"]),
        ("trian.max_iter=3", ["trian", "train"]),
        ("train.max_iter.x=3", ["train.max_iter.x", "no key"]),
        ("optimizer.learning_rate=1", ["optimizer.learning_rate", "optimizer.lr"]),
        ("model.backbone.nrom=LN", ["model.backbone.nrom", "model.backbone.norm"]),
        ("model.backbone.net.model.dpeth=3", ["dpeth", "depth"]),
        ("train.max_iter=many", ["train.max_iter", "many", "int"]),
        ("train.max_iter=1e3", ["train.max_iter", "1000.0", "int"]),
        ("train.amp=true", ["train.amp", "section"]),
        ("train.amp={enabeld:true}", ["train.amp.enabeld", "train.amp.enabled"]),
        ("train.max_iter={a:1}", ["train.max_iter", "int"]),
        ("train.seed=-1", ["train.seed=-1"]),
        ("train.enabled=true", ["train.amp.enabled"]),
        ("train.max_iter=1,2", ["several values"]),
        ("train.max_iter=[1", ["train.max_iter=[1", "quotes"]),
        ("+train.max_iter=1", ["without '+'"]),
        ("~train.max_iter", ["'~'"]),
        ("train.output_dir=???", ["???"]),
        ("train.output_dir=", ["train.output_dir= cannot be made", "another folder"]),
        ("model=3", ["model is a section, with the keys backbone, proposal_gen"]),
        ("model.backbone.net.0=1", ["model.backbone.net.0"]),
        ("model.backbone.in_feature=scale4", ["scale4"]),
        ("train.max_iter", ["train.max_iter", "key=value"]),
        ("train.memory=revresible", ["revresible", "reversible"]),
        ("train.stored_blocks=9", ["stored_blocks", "9"]),
        ("train.memory_keep=[g.mlp.fc3]", ["'g.mlp.fc3'", "mean g.mlp.fc"]),
        ("train.memory_keep=products", ["train.memory_keep", "list", "products"]),
        ("train.amp.enabled=true train.amp.dtype=int8", ["train.amp.dtype", "bfloat16"]),
        ("train.device=cuda", ["train.device"]),
        ("train.init_checkpoint=nothing.pth", ["nothing.pth", "does not exist"]),
        ("dataloader.train.total_batch_size=0", ["total_batch_size=0"]),
        ("dataloader.train.dataset.names=demo_trian", ["demo_trian", "demo_train"]),
        (
            "dataloader.train.dataset.names=coco_2017_train",
            ["'coco_2017_train'", "DETECTRON2_DATA"],
        ),
        ("model.roi_heads.num_classes=7", ["7 classes", "5 categories"]),
        ("train.accumulate=0", ["train.accumulate=0", "at least 1"]),
        ("train.checkpointer.period=0", ["train.checkpointer.period=0", "at least 1"]),
        ("train.device=abacus", ["train.device=abacus", "cpu"]),
        ("--num-gpus 0", ["--num-gpus 0", ">= 1"]),
        ("--num-machines 2 --machine-rank 2", ["--machine-rank 2", "counted from 0"]),
        ("--eval-only", ["--eval-only", "train.init_checkpoint"]),
        ("train.accumulate=3", ["total_batch_size=2", "3: 1 processes × train.accumulate=3"]),
        ("train.ema_decay=1", ["train.ema_decay=1", "0.9999"]),
        ("train.memory_budget=much", ["'much'", "8GiB"]),
        ("train.memory_budget=auto", ["needs a GPU", "on cpu", "such as 12GB"]),
        ("train.memory_budget=3MB", ["train.memory_budget=3MB", "smallest budget"]),
        ("train.memory_budget=1GB train.stored_blocks=1", ["train.stored_blocks", "one of"]),
        ("train.memory_budget=1GB train.memory_keep=[f.*]", ["train.memory_keep", "one of"]),
        ("train.memory_slices=0", ["train.memory_slices", "at least 1"]),
        ("optimizer.params.layer_decay=2", ["layer_decay", "(0, 1], got 2"]),
        ("optimizer.lr=1e30 train.max_iter=9", ["NaN", "Lower optimizer.lr"]),
    ],
)
def test_bad_arguments(refusal, argument, words):
    if argument == "train.device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    message = refusal(*argument.split())
    assert all(word in message for word in words), message


def test_a_config_that_does_not_exist(refusal):
    config = DEMO.replace("_demo.py", "_dmeo.py")
    message = refusal(config=config)
    assert config in message and "there are demo/mask_rcnn_rev_vit_demo" in message


def test_a_config_that_is_no_recipe(tmp_path):
    path = tmp_path / "half.py"
    path.write_text("train = dict(max_iter=1)\n")
    with pytest.raises(UserError, match=r"lacks the section.* model"):
        load_config(str(path))
    path.write_text("train = dict(\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train.max_itr = 3", "train.max_itr.*train.max_iter"),
        ("optimizer.learning_rate = 1", "optimizer.learning_rate.*did you mean"),
        ("train.amp.enabeld = 1", "train.amp.enabeld.*train.amp.enabled"),
        ("train.max_iter = 'many'", "train.max_iter.*'many'.*Integer"),
        ("train.amp = 5", "train: .*AmpConfig"),
        ("train.ema_decay = 1.0", "train.ema_decay=1.0.*at most"),
    ],
)
def test_a_config_with_an_unknown_key(tmp_path, line, words):
    path = tmp_path / "mine.py"
    demo = Path(DEMO).resolve()
    path.write_text(
        "from detectron2.config import LazyConfig\n"
        f"whole = LazyConfig.load({str(demo)!r})\n"
        "model, dataloader, optimizer = whole.model, whole.dataloader, whole.optimizer\n"
        f"lr_multiplier, train = whole.lr_multiplier, whole.train\n{line}\n"
    )
    with pytest.raises(UserError, match=words):
        load_config(str(path))


def test_an_argument_of_the_target_may_be_set_though_the_recipe_does_not_name_it():
    cfg = load_config(DEMO, ["optimizer.eps=1e-6", "model.backbone.net.model.qkv_bias=false"])
    assert cfg.optimizer.eps == 1e-6
    assert cfg.model.backbone.net.model.qkv_bias is False


def test_what_an_override_sets():
    typed = ["train.output_dir=2017_01", "dataset.val_images=007", "train.memory_budget=8000000000"]
    cfg = load_config(
        DEMO, [*typed, "dataset.val_json=7.json", "train.amp={enabled:true,dtype:float16}"]
    )
    # A number where a name belongs is one: folders are called like that.
    assert (cfg.train.output_dir, cfg.dataset.val_images) == ("2017_01", "007")
    assert cfg.train.memory_budget == "8000000000"
    assert cfg.train.amp == {"enabled": True, "dtype": "float16"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("revdet.TrunkBackbone", "gone.Backbone", "may build"),
        ("revdet.TrunkBackbone", "revdet.models.Gone", "cannot be imported"),
        ("revdet.TrunkBackbone", "os.mkdir", "may build"),
        # By a module that it is allowed to name.
        ("revdet.TrunkBackbone", "detectron2.data.build.os.mkdir", "cannot be imported|may build"),
        ("revdet.TrunkBackbone", "detectron2.data.transforms.__dict__", "may build"),
        ("\ntrain:", "\nzz: !!python/object/apply:os.mkdir [MARK]\ntrain:", "constructor"),
        ("\ntrain:", "\nzz: ${oc.decode:1}\ntrain:", "no key"),
        ("\ntrain:", "\nzz: " + "[" * 3000 + "]" * 3000 + "\ntrain:", "cannot be read"),
    ],
)
def test_a_config_of_strangers_executes_nothing(tmp_path, old, new, words):
    path, mark = tmp_path / "config.yaml", tmp_path / "mark"
    LazyConfig.save(load_config(DEMO), str(path))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new.replace("MARK", str(mark)), 1))
    with pytest.raises(UserError, match=words):
        load_config(str(path))
    assert not mark.exists()


TYPED = ["a=b", "/d/[1,2]", "{x}", "${train.seed}", r"\${x}", 'it\'s "two"', "c, d", "", " "]
TYPED += ["true", "null", "a:b", "~/x", "#1", "%d", "1e3", "007", "ä\\", "{a:1}", "[1", "$HOME"]


@pytest.mark.parametrize("path", TYPED)
def test_a_path_is_taken_as_it_is_typed_and_saved_so(tmp_path, path):
    cfg = load_config(DEMO, [f"train.output_dir={path}", f"train.init_checkpoint={path}"])
    assert (cfg.train.output_dir, cfg.train.init_checkpoint) == (path, path)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = load_config(str(tmp_path / "config.yaml"))
    assert (again.train.output_dir, again.train.init_checkpoint) == (path, path)


def test_a_saved_config_is_plain_and_names_of_earlier_versions_are_found(tmp_path):
    path = tmp_path / "config.yaml"
    LazyConfig.save(load_config(DEMO), str(path))
    text, saved = path.read_text(), load_config(str(path))
    assert "revdet.settings" not in text and "  device: auto" in text
    for old, new in MOVED.items():
        text = text.replace(new, old)
    for module in ("backbone", "dataloader", "evaluation", "solver"):
        assert f"revdet.{module}." in text
    path.write_text(text)
    assert load_config(str(path)) == saved


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (train_net.main, ["train.checkpointer.period (int, 5000)", "dataset.skip_broken (bool,"]),
        (predict.main, ["--input photo.jpg", "predictions.json"]),
    ],
)
def test_the_help_has_keys_and_examples(capsys, command, words):
    with pytest.raises(SystemExit):
        command(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in words)
