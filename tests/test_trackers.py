"""What trackers are told: the scalars of a run, each once; their libraries may be missing."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
from detectron2.utils.events import EventStorage, TensorboardXWriter
from lightning.pytorch.loggers import TensorBoardLogger

from backbones.common.errors import MissingExtra, UserError, require_trackers
from revdet.config import load_config
from revdet.training.trackers import trackers
from revvideo.config import load_config as load_video_config
from revvideo.run import main as video
from revvideo.training import metrics
from tests.revdet.conftest import DEMO


@pytest.fixture
def told(monkeypatch) -> dict[str, Mock]:
    """Both libraries, as far as they are used."""
    run = Mock()
    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    wandb.init = Mock(return_value=run)
    names = ("set_tracking_uri", "set_experiment", "start_run", "log_metrics", "end_run")
    for name in names:
        setattr(mlflow, name, Mock())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return {"run": run, "wandb": wandb, "mlflow": mlflow}


def test_detection_hands_on_every_scalar_once(told, tmp_path):
    settings = SimpleNamespace(output_dir=str(tmp_path / "run"), loggers=["wandb", "mlflow"])
    require_trackers(settings.loggers)
    writers = trackers(SimpleNamespace(train=settings), 0)
    with EventStorage(3) as storage:
        storage.put_scalar("loss", 0.5)
        for writer in (*writers, *writers):
            writer.write()
        storage.step()
        storage.put_scalar("loss", 0.25)
        for writer in writers:
            writer.write()
            writer.close()
    calls = [(call.args[0], call.kwargs["step"]) for call in told["run"].log.call_args_list]
    assert calls == [({"loss": 0.5}, 3), ({"loss": 0.25}, 4)]
    calls = [(c.args[0], c.kwargs["step"]) for c in told["mlflow"].log_metrics.call_args_list]
    assert calls == [({"loss": 0.5}, 3), ({"loss": 0.25}, 4)]
    assert told["wandb"].init.call_args.kwargs["name"] == "run"
    assert told["mlflow"].set_tracking_uri.call_args.args[0].endswith("run/mlflow.db")
    assert told["run"].finish.called and told["mlflow"].end_run.called


def test_defaults_bad_names_and_missing_libraries(tmp_path, monkeypatch, capsys):
    cfg = load_config(DEMO, [f"train.output_dir={tmp_path}"])
    assert [type(writer) for writer in trackers(cfg, 0)] == [TensorboardXWriter]
    (made,) = metrics.trackers(["tensorboard"], tmp_path, 0)
    assert isinstance(made, TensorBoardLogger)
    for load, recipe in (
        (load_config, DEMO),
        (load_video_config, "configs/video/demo/motion.yaml"),
    ):
        with pytest.raises(UserError, match=r"train\.loggers=.*choose one of tensorboard, wandb"):
            load(recipe, ["train.loggers=[tensorbord]"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"=\[wandb\] needs wandb.*\[trackers\]"):
        require_trackers(["wandb"])
    # Before anything is looked at.
    given = ["data.root=nowhere", "train.loggers=[wandb]", f"train.output_dir={tmp_path}"]
    assert video(["--config", "configs/video/demo/motion.yaml", *given]) == 2
    assert "[wandb] needs wandb" in capsys.readouterr().err


def test_video_makes_lightnings(told, tmp_path, monkeypatch):
    made = {name: Mock() for name in ("WandbLogger", "MLFlowLogger")}
    for name, mock in made.items():
        monkeypatch.setattr(metrics, name, mock)
    assert metrics.trackers(["wandb", "mlflow"], tmp_path / "run", 0) == [
        made["WandbLogger"].return_value,
        made["MLFlowLogger"].return_value,
    ]
    assert made["WandbLogger"].call_args.kwargs["save_dir"] == tmp_path / "run"
    assert made["MLFlowLogger"].call_args.kwargs["tracking_uri"].endswith("run/mlflow.db")
