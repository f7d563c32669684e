"""What the commands do not show: deprecations in Detectron2, which their users cannot act on."""

from __future__ import annotations

import logging
import warnings

# Detectron2 is older than the torch it runs on here. The last message is about RLE masks.
_MESSAGES = (
    ".*torch.jit.script. is deprecated|pkg_resources is deprecated|"
    "torch.meshgrid: in an upcoming release|The given NumPy array is not writable"
)
_LOGGERS = (
    "torch.utils.cpp_extension",
    "torch.fx._symbolic_trace",
    "detectron2.data.common",
    "detectron2.data.datasets.coco",
    "detectron2.data.dataset_mapper",
)


def quiet() -> None:
    """Hide them in this process; to be called before Detectron2 is imported, by commands alone."""
    warnings.filterwarnings("ignore", message=_MESSAGES)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
