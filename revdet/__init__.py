"""Detectron2 adapter: detectors on the backbones of :mod:`backbones`."""

from importlib import import_module
from typing import Any

from backbones import __version__ as __version__

_HOMES = {"TrunkBackbone": "revdet.models", "load": "revdet.prediction.predictor"}


def __getattr__(name: str) -> Any:
    # Late, because the commands import this package and answer --help without Detectron2.
    if name in _HOMES:
        from revdet.install import detection_extra

        with detection_extra():
            return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
