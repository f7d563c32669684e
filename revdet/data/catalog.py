"""Datasets by name: Detectron2's own, and the embedded one of the demo."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances


def datasets_root() -> Path:
    """Where datasets are looked for: ``$DETECTRON2_DATASETS``, or ``./datasets``."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def register_datasets() -> None:
    """Register ``demo_train`` and ``demo_val``. Detectron2 registers COCO and others itself."""
    root = datasets_root() / "demo"
    for split in ("train", "val"):
        name = f"demo_{split}"
        if name not in DatasetCatalog.list():
            annotations = root / "annotations" / f"instances_{split}.json"
            register_coco_instances(name, {}, str(annotations), str(root / split))
