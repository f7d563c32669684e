"""The hardware of a run is found once, from the config and what is there."""

from __future__ import annotations

import pytest
import torch

from backbones.common.errors import UserError
from revvideo.config import load_config
from revvideo.training.hardware import Hardware, find_hardware


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
    config = load_config("configs/video/demo/motion.yaml", overrides)
    if isinstance(found, tuple):
        assert find_hardware(config) == Hardware(*found)
    else:
        with pytest.raises(UserError, match=found):
            find_hardware(config)
