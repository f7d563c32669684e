"""Video classification on reversible trunks: data, training and prediction for Kinetics."""

from importlib import import_module
from typing import Any

from backbones import __version__ as __version__
from backbones.common.errors import extra

_HOMES = {"load": "revvideo.prediction.predictor", "VideoPathHandler": "revvideo.data.pytorchvideo"}


def __getattr__(name: str) -> Any:
    # Late, because the commands import this package and answer --help in no time.
    if name in _HOMES:
        with extra("video"):
            return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
