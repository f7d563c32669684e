"""Weights of other projects for a detector: those of a whole ViTDet too, under their own names."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from detectron2.utils.file_io import Detectron2Handler
from torch import Tensor, nn

from backbones.common.errors import UserError, some_of
from backbones.common.paths import local_path, register
from backbones.weights.checkpoint import Checkpoint, WeightsError
from backbones.weights.download import ZOO, local_file
from backbones.weights.formats import prefixes_of
from backbones.weights.loading import fit_checkpoint, odd_numbers
from revdet.models import find_trunk

logger = logging.getLogger("revdet")

SHARDED = ".dcp"  # ends the name of a folder that is a checkpoint of a sharded run


def fetch_weights(source: str) -> Path:
    """The file that ``source`` names: a path, a name of ``ZOO``, or an address, downloaded once.

    Addresses are those of the web and what Detectron2's path manager knows (``detectron2://``). A
    UserError says that there is no such file, or that it cannot be had.
    """
    address = ZOO.get(source, source)
    if source in ZOO or not address.startswith(("http://", "https://")):
        register(Detectron2Handler())
        try:
            path = Path(local_path(address, "train.init_checkpoint")).expanduser()
        except UserError as error:
            remedy = "download it elsewhere, and give the file's path in its place"
            raise UserError(f"{source}: {error}: {remedy}") from error
    else:
        path = local_file(address)
    if not path.is_file() and not (path.suffix == SHARDED and path.is_dir()):
        raise UserError(f"checkpoint {path} does not exist: check the path")
    return path


def for_detector(model: nn.Module, checkpoint: Checkpoint, *, exact: bool) -> dict[str, Tensor]:
    """What a detector's file holds, by the names of ``model``: of this project or of ViTDet.

    A foreign trunk goes through :func:`backbones.load_weights`; what lies behind it has the same
    names in both. A pyramid that sees the two streams of a reversible trunk starts as if it saw
    their mean. ``exact`` refuses to make another function of the weights than they had. A
    WeightsError says that the trunk does not fit or, with ``exact``, is a plain one.
    """
    tensors = {name.removeprefix("module."): v for name, v in checkpoint.tensors.items()}
    own, path = model.state_dict(), checkpoint.path
    if odd := odd_numbers(tensors, own):
        raise WeightsError(f"{path} holds more than plain numbers: {some_of(odd)}")
    try:
        prefix, trunk = find_trunk(model)
    except ValueError:
        return tensors
    # Those of a plain trunk and of a reversible one differ in their names.
    blocks = [n for n in own if n.startswith(prefix) and ".blocks." in n]
    if not blocks or not tensors.keys().isdisjoint(blocks) or own.keys().isdisjoint(tensors):
        return tensors
    nets = prefixes_of(tensors)
    if len(nets) != 1:
        raise WeightsError(f"{path} is of a detector with another trunk than a vision transformer")
    net = {name: value for name, value in tensors.items() if name.startswith(nets[0])}
    report, fitted = fit_checkpoint(trunk, replace(checkpoint, tensors=net), f"the trunk in {path}")
    rewired = "blocks" in report.converted
    if exact and rewired:
        remedy = "starts from it, but has to be fine-tuned before it is evaluated"
        raise WeightsError(f"{path} is of a plain trunk: the model's reversible one {remedy}")
    logger.info(f"{report}")
    found = {f"{prefix}{name}": value for name, value in fitted.items()}
    for name, value in tensors.items():
        if rewired and name in own and name.startswith("backbone."):
            value = _for_two_streams(value, own[name])
        # Constants of the recipe are in the files of some versions of Detectron2.
        if name not in net and not name.startswith("pixel_") and "cell_anchors" not in name:
            found[name] = value
    return found


def _for_two_streams(value: Tensor, mine: Tensor) -> Tensor:
    """Copies where the model is twice as wide, halved where a layer adds them up."""
    if value.ndim != mine.ndim or 0 in value.shape:
        return value
    times = [b // a for a, b in zip(value.shape, mine.shape, strict=True)]
    # Where a layer (more than one axis) is twice as wide, its input is.
    repeated = value.repeat(times) / (2 if value.ndim > 1 and 2 in times else 1)
    return repeated if {*times} <= {1, 2} and repeated.shape == mine.shape else value
