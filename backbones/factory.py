"""Models by name, with their weights."""

from __future__ import annotations

import logging
from typing import Any

from backbones.engine.compiled import compile_blocks
from backbones.models.trunk import Trunk
from backbones.registry import MODELS, build, record_of
from backbones.weights.loading import load_weights

_log = logging.getLogger(__name__)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    compile: bool = False,
    **overrides: Any,
) -> Trunk:
    """Build a model by name.

    >>> create_model("rev_vit_small", num_classes=10, drop_path_rate=0.1)  # a classifier
    >>> create_model(  # the trunk of a detector, after ViTDet
    ...     "rev_vit_base", num_classes=0, img_size=1024,
    ...     window_size=14, global_attn_indexes=(2, 5, 8, 11), use_rel_pos=True,
    ... )

    Args:
        name: one of :func:`backbones.list_models`.
        num_classes: outputs of the head, 0 for pooled features; None for the published number.
        pretrained: load the authors' released weights, downloaded at the first use (see
            :mod:`backbones.weights.download`). Other ``num_classes`` than the released ones give a
            new head. What was loaded goes to the log, at level INFO.
        compile: compile the branches of the blocks when they first run; see
            :func:`backbones.compile_blocks`.
        overrides: constructor arguments of the model (``img_size``, ``depth``, …) that replace
            those of the name.

    Returns:
        the model; its attribute ``config`` holds ``name`` and all ``arguments`` that were not left
        to the constructor.

    Raises:
        ValueError: unknown name or argument (the message lists the near ones); ``pretrained``
            without released weights, or with weights that cannot be had or do not fit the
            arguments (:class:`backbones.WeightsError`).
    """
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    released = record_of(name).weights if pretrained else None
    if pretrained and released is None:
        others = ", ".join(sorted(other for other in MODELS if MODELS[other].weights))
        only = f"only for {others}; use pretrained=False"
        raise ValueError(f"no weights are released for {name!r}, {only}")
    model = build(name, **overrides)
    if released is not None:
        _log.info("%s", load_weights(model, released))
    if compile:
        compile_blocks(model)
    return model
