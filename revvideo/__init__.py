"""Video classification on reversible trunks: data, training and prediction for Kinetics."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Late, because the commands import this package and answer --help in no time.
    if name == "VideoPathHandler":
        from revvideo.data.pytorchvideo import VideoPathHandler

        return VideoPathHandler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
