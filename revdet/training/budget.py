"""A memory budget for the training of a whole detector, counted before it starts.

:func:`backbones.fit_memory` runs a training step on shape-only tensors. A detector cannot be run
on those as it is, because its proposals depend on what is in the image; here it is run with the
largest number of proposals that its heads ever train on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import Tensor, nn

import backbones
from backbones.common.errors import UserError
from backbones.memory.budget import parse_budget
from revdet.heads import listed, make_pieces
from revdet.models import find_trunk

logger = logging.getLogger("revdet")


def apply_memory_budget(
    cfg: DictConfig, model: Any, records: Iterable[Any], amp_dtype: torch.dtype | None
) -> None:
    """Choose ``train.memory``, ``stored_blocks``, ``memory_keep`` and ``memory_slices``.

    Writes them into the recipe, and gives its detector, pyramid and heads included, the policy.
    ``records`` are the training images, as Detectron2's dataset dictionaries. A UserError says that
    nothing fits the budget, or that it cannot be counted for this recipe.
    """
    settings, chosen = cfg.train, None
    if comm.is_main_process():
        plan = _plan(cfg, model, records, amp_dtype)
        kept = [plan.keep] if isinstance(plan.keep, str) else [*plan.keep]
        chosen = plan.policy, plan.stored_blocks, kept, plan.slices
    # Every process by the same plan, even where "auto" finds different GPUs.
    chosen = comm.all_gather(chosen)[0]
    settings.memory, settings.stored_blocks, settings.memory_keep, settings.memory_slices = chosen
    backbones.set_memory(ShapeOnlyDetector(model), *chosen)


def _plan(
    cfg: DictConfig, model: Any, records: Iterable[Any], amp_dtype: torch.dtype | None
) -> backbones.MemoryPlan:
    settings, budget, world_size = cfg.train, cfg.train.memory_budget, comm.get_world_size()
    images = cfg.dataloader.train.total_batch_size // (world_size * settings.accumulate)
    augmentations = instantiate(cfg.dataloader.train.mapper.augmentations)
    shape = (images, 3, *largest_image(model.backbone, augmentations, records, images))
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # Gradients that are there before the backward pass: of the batch before, or in DDP's buckets.
    besides = weights if settings.accumulate > 1 or world_size > 1 else 0
    besides += weights if settings.ema_decay > 0 else 0
    logger.info(f"counting the memory of a training step on {' x '.join(map(str, shape))}")
    slices = settings.memory_slices
    try:
        plan = fit_detector_memory(
            model, shape, budget, amp_dtype=amp_dtype, held_besides=besides, slices=slices
        )
    except ValueError as error:
        raise UserError(f"train.memory_budget={budget}: {error}") from error
    held = f"of which {besides / 1e9:.2f} GB for weights averaged and gradients kept"
    others = "what depends on the ground truth, and what the device needs for itself"
    logger.info(f"train.memory_budget={budget}, {held}: {plan}\n  not counted: {others}")
    return plan


def fit_detector_memory(
    detector: nn.Module,
    image_shape: tuple[int, ...],
    budget: int | str,
    *,
    amp_dtype: torch.dtype | None = None,
    held_besides: int = 0,
    slices: int = 1,
) -> backbones.MemoryPlan:
    """Give ``detector`` the fastest memory policy that trains within ``budget``.

    It is chosen for trunk, pyramid, RPN and heads together; the last blocks are those of the heads.
    Counted are parameters, gradients, AdamW's state and activations of all these. Not counted is
    what depends on the ground truth (masks, matching of anchors) and what the device needs itself.

    ``image_shape`` is (B, 3, H, W) of the padded batch that one process trains on at a time. The
    plan, which is returned and in force, is without the bytes ``held_besides`` by something else
    all the time. For the other arguments see :func:`backbones.fit_memory`. A ValueError says that
    the detector has no RPN and heads, or that the budget cannot be read or is too small.
    """
    step = ShapeOnlyDetector(detector)
    limit = parse_budget(budget, next(detector.parameters()).device) - held_besides
    if limit <= 0:
        raise ValueError(f"{held_besides} bytes are held besides the training step itself")
    images = torch.empty(image_shape, device="meta")
    return backbones.fit_memory(step, images, limit, autocast=amp_dtype, fused=True, slices=slices)


class ShapeOnlyDetector(nn.Module):
    """What a detector computes in training, without what depends on the values of tensors.

    Its parts stand in the order in which they run.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        try:
            heads = detector.roi_heads
            self.trunk: nn.Module | None = None
            with suppress(ValueError):  # Detectron2's own, which has no policy
                self.trunk = find_trunk(detector)[1]
            for name, modules in make_pieces(detector).items():
                self.add_module(name, nn.ModuleList(modules))
            self.box_predictors = listed(heads.box_predictor)
            _ = detector.backbone, detector.proposal_generator.rpn_head, heads.box_pooler
        except AttributeError as error:
            needs = f"a memory budget needs a detector with an RPN and box heads ({error})"
            remedy = "set train.memory and train.stored_blocks instead"
            raise ValueError(f"{needs}; {remedy}") from error
        self.detector = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> everything that a loss is computed on."""
        detector: Any = self.detector
        features = detector.backbone(images)
        rpn, heads = detector.proposal_generator, detector.roi_heads
        scores, deltas = rpn.rpn_head([features[name] for name in rpn.in_features])
        boxes = len(images) * heads.batch_size_per_image
        outputs = [*scores, *deltas]
        for head, predictor in zip(listed(heads.box_head), self.box_predictors, strict=True):
            pooled = _pool(features, heads.box_in_features, heads.box_pooler, boxes)
            outputs += predictor(head(pooled))
        if heads.mask_on:
            objects = int(boxes * heads.positive_fraction)
            pooled = _pool(features, heads.mask_in_features, heads.mask_pooler, objects)
            outputs.append(heads.mask_head.layers(pooled))
        return outputs


def _pool(features: dict[str, Tensor], names: Sequence[str], pooler: Any, count: int) -> Tensor:
    """(count, C, h, w): as large as regions of the maps, and with a gradient for each map."""
    vector = torch.stack([features[name].mean(dim=(0, 2, 3)) for name in names]).sum(dim=0)
    return vector[:, None, None].expand(count, -1, *pooler.output_size).contiguous()


def largest_image(
    backbone: Any, augmentations: Sequence[T.Augmentation], records: Iterable[Any], batch: int
) -> tuple[int, int]:
    """The largest (H, W) in pixels that a batch of images is padded to, which the pyramid asks for.

    Of the training mapper's augmentations those that flip, resize the shorter edge or crop to a
    fixed size are understood; what others leave may be of any shape.
    """
    if square := backbone.padding_constraints.get("square_size", 0):
        return square, square
    shapes = {(record["height"], record["width"]) for record in records}
    known = True
    for change in augmentations:
        if isinstance(change, T.ResizeShortestEdge):
            edge, limit = max(change.short_edge_length), change.max_size
            resized = {change.get_output_shape(h, w, edge, limit) for h, w in shapes}
            shapes = resized if known else {(edge, limit), (limit, edge)}
        elif isinstance(change, T.FixedSizeCrop):
            shapes, known = {tuple(change.crop_size)}, True
        elif not isinstance(change, T.RandomFlip):
            known = False
    if batch == 1:
        groups = [[shape] for shape in shapes]
    elif known:  # images that are wider than high are not batched with others
        groups = [[s for s in shapes if (s[1] > s[0]) is wide] for wide in (True, False)]
    else:
        groups = [[*shapes]]
    largest = max((np.max(group, axis=0) for group in groups if group), key=np.prod)
    divisor = max(backbone.size_divisibility, 1)
    height, width = (-(-int(side) // divisor) * divisor for side in largest)
    return height, width
