"""Our decoder in PyTorchVideo's datasets, and models of its hub in our runs."""

from __future__ import annotations

import json
import logging
from itertools import count

import pytest
import torch
from iopath.common.file_io import PathHandler, g_pathmgr
from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
from pytorchvideo.models import hub as theirs
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader, SequentialSampler

import revvideo
from backbones.common.errors import UserError
from revvideo import hub
from revvideo.errors import VideoError
from revvideo.predict import main as predict
from revvideo.settings import Config
from revvideo.training.weights import read_weights
from tests.revvideo.tiny_set import predictions

X3D = (
    "model.name=pytorchvideo/x3d_xs",
    "model.arguments={}",
    "data.num_frames=4",
    "data.crop_size=160",
    "data.decode_short_side=0",
    "test.short_side=160",
    "train.memory=store",
)


def dataset(paths, handler=None):
    labelled = [(str(path), {"label": number}) for number, path in enumerate(paths)]
    sampler = make_clip_sampler("uniform", 0.5)
    made = LabeledVideoDataset(labelled, sampler, SequentialSampler, decode_audio=False)
    if handler is not None:
        made.video_path_handler = handler
    return made


def test_their_dataset_gets_the_same_clips_from_our_decoder(make):
    paths = [make("constant.mp4"), make("mpeg4.avi")]
    expected = list(dataset(paths[:1]))
    ours = dataset(paths[:1], revvideo.VideoPathHandler())
    worker = DataLoader(ours, batch_size=None, num_workers=1)
    for clips in (list(ours), list(worker)):
        assert [clip["video_name"] for clip in clips] == ["constant.mp4"] * len(expected)
        assert len(clips) == len(expected) > 1
        for clip, other in zip(clips, expected, strict=True):
            assert torch.equal(clip["video"], other["video"]), clip["clip_index"]
    few = list(dataset(paths, revvideo.VideoPathHandler(frames=4, short_side=24)))
    assert {clip["video"].shape[:3] for clip in few} == {(3, 4, 24)}
    spread = torch.linspace(0, expected[0]["video"].shape[1] - 1, 4).long()
    all_of_them = revvideo.VideoPathHandler(frames=4).video_from_path(str(paths[0]))
    assert torch.equal(all_of_them.get_clip(0, 0.5)["video"], expected[0]["video"][:, spread])


def test_a_clip_that_does_not_decode_is_said(make, caplog, monkeypatch):
    video = revvideo.VideoPathHandler().video_from_path(str(make("constant.mp4")), True)
    assert "no sound" in caplog.text
    assert video.get_clip(99, 100)["video"] is None

    def fail(*_):
        raise VideoError("frame 3 is damaged")

    monkeypatch.setattr(video._video, "frames", fail)
    with caplog.at_level(logging.WARNING):
        assert video.get_clip(0, 1)["video"] is None
    assert "constant.mp4" in caplog.text and "frame 3 is damaged" in caplog.text


def test_a_model_of_the_hub_trains_tests_and_predicts(run, videos, tmp_path):
    torch.manual_seed(0)
    published = theirs.x3d_xs()
    torch.save({"model_state": published.state_dict()}, tmp_path / "X3D_XS.pyth")
    start = f"model.weights={tmp_path / 'X3D_XS.pyth'}"
    assert run(tmp_path / "run", *X3D, start, "optim.max_steps=1", "optim.batch_size=2") == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "PyTorchVideo" in log and "of 400 classes, the model has 3" in log
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["run"]["steps"] == 1 and len(predictions(tmp_path / "run")) == 7
    again = tmp_path / "again"
    last = f"model.weights={tmp_path}/run/checkpoints/last.ckpt"
    assert run(again, *X3D, last, "--eval-only") == 0
    assert predictions(again) == predictions(tmp_path / "run")
    given = ["--config", str(tmp_path / "run" / "config.yaml"), "--workers", "0", "--no-drawings"]
    given += ["--input", str(videos / "val" / "dark"), "--output", str(tmp_path / "out")]
    assert predict([*given, "--weights", f"{tmp_path}/run/checkpoints/last.ckpt"]) == 0
    (entry, _) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert revvideo.load(tmp_path / "run", device="cpu")(entry["path"]) == entry["top"]
    with pytest.raises(VideoError, match="missing"):
        revvideo.load(tmp_path / "run", device="cpu")("gone.mp4")
    with pytest.raises(UserError, match=r"config\.yaml' does not exist"):
        revvideo.load(tmp_path)


class Lab(PathHandler):
    """``lab://``, which is a folder of this machine."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _get_supported_prefixes(self):
        return ["lab://"]

    def _get_local_path(self, path, force=False, **_):
        return str(self.folder / path.removeprefix("lab://"))


@pytest.fixture
def lab(tmp_path):
    g_pathmgr.register_handler(Lab(tmp_path))
    yield tmp_path
    g_pathmgr._path_handlers.pop("lab://")


def test_config_videos_manifests_and_weights_may_lie_behind_a_prefix(run, videos, lab, capfd):
    (lab / "videos").symlink_to(videos)
    assert run(lab / "first", "optim.max_steps=1", root="lab://videos") == 0
    more = [
        "data.manifests=lab://first",
        "model.weights=lab://first/checkpoints/last.ckpt",
        "optim.max_steps=1",
    ]
    assert run(lab / "second", *more, root="lab://videos") == 0
    log = (lab / "second" / "log.txt").read_text()
    assert f"{lab}/first/checkpoints/last.ckpt" in log or "lab://first/checkpoints" in log
    assert run(lab / "third", root="s4://videos") == 2
    assert "data.root=s4://videos: iopath has no handler for s4://" in capfd.readouterr().err


def test_the_hubs_scores(tmp_path):
    config = Config()
    config.model.name, config.train.memory = "pytorchvideo/x3d_xs", "store"
    config.data.num_frames, config.data.crop_size = 4, 160
    torch.manual_seed(0)
    published = theirs.x3d_xs().eval()
    torch.save({"model_state": published.state_dict()}, tmp_path / "x3d.pyth")
    model = hub.build(config, 400)
    report = hub.load(model, read_weights(tmp_path / "x3d.pyth").checkpoint, "x3d.pyth")
    assert not report.missing and not report.left_out
    clip = torch.randn(2, 3, 4, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(clip).softmax(dim=1), published(clip))


MVIT = {
    "depth": 2,
    "head_num_classes": 5,
    "embed_dim_mul": [[1, 2.0]],
    "atten_head_mul": [[1, 2.0]],
    "pool_q_stride_size": [[1, 1, 2, 2]],
}


def test_checkpointed_blocks_of_the_hub_have_the_gradients_of_stored_ones():
    config = Config()
    config.model.name, config.model.arguments = "pytorchvideo/mvit_base_16x4", MVIT
    config.model.drop_path_rate = config.model.drop_rate = 0.2
    config.data.num_frames, config.data.crop_size = 4, 32
    gradients, kept = [], []
    for config.train.memory in ("store", "checkpoint"):
        torch.manual_seed(0)
        model = hub.build(config, 5)
        torch.manual_seed(1)
        clip, held = torch.randn(2, 3, 4, 32, 32), count()
        with saved_tensors_hooks(lambda x, held=held: (next(held), x)[1], lambda x: x):
            loss = model(clip).logsumexp(1).sum()
        kept.append(next(held))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    "more, parts",
    [
        (["model.name=pytorchvideo/slowfast_r50"], ["two clips", "pytorchvideo/slow_r50"]),
        (["model.name=pytorchvideo/slow_r51"], ["pytorchvideo/slow_r51", "slow_r50"]),
        (["train.memory=reversible"], ["rev_mvit_base_16x4", "train.memory=store"]),
        (["train.memory=checkpoint"], ["batch norms", "train.memory=store"]),
        (["train.memory_budget=1GB"], ["a memory budget needs", "train.memory=store"]),
        (["train.stored_blocks=1"], ["train.stored_blocks is for models of backbones"]),
        (["data.num_frames=2"], ["does not take 2 frames", "data.num_frames=4"]),
        (["model.drop_path_rate=0.1"], ["model.drop_path_rate=0"]),
        (["optim.layer_decay=0.7"], ["optim.layer_decay=1"]),
        (["model.arguments={colour: 1}"], ["pytorchvideo/x3d_xs cannot be built", "colour"]),
    ],
)
def test_what_a_model_of_the_hub_cannot_do_is_refused(run, tmp_path, capfd, more, parts):
    assert run(tmp_path / "run", *X3D, *more) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert error.startswith("error: ") and all(part in error for part in parts), error


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(run, tmp_path, capfd):
    torch.save({"model_state": theirs.slow_r50().state_dict()}, tmp_path / "slow.pyth")
    assert run(tmp_path / "run", *X3D, f"model.weights={tmp_path / 'slow.pyth'}") == 2
    assert "does not fit this model of PyTorchVideo" in capfd.readouterr().err
    assert hub.address("pytorchvideo/x3d_xs").endswith("X3D_XS.pyth")
