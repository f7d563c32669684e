"""Video classification on reversible trunks: data, training and prediction for Kinetics."""

from typing import Any

from backbones import __version__ as __version__
from backbones.common.errors import extra


def __getattr__(name: str) -> Any:
    # Late, because the commands import this package and answer --help in no time.
    if name == "load":
        with extra("video"):
            from revvideo.prediction.predictor import load
        return load
    if name == "VideoPathHandler":
        with extra("video"):
            from revvideo.data.pytorchvideo import VideoPathHandler
        return VideoPathHandler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
