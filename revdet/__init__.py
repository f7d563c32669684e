"""Detectron2 adapter: detectors on the backbones of :mod:`backbones`."""

from typing import Any

from backbones import __version__ as __version__


def __getattr__(name: str) -> Any:
    # Late, because the commands import this package and answer --help without Detectron2.
    if name in ("TrunkBackbone", "load"):
        from revdet.install import detection_extra

        with detection_extra():
            if name == "load":
                from revdet.prediction.predictor import load

                return load
            from revdet.models import TrunkBackbone
        return TrunkBackbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
