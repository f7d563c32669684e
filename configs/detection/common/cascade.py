"""Three box heads, each on the boxes of the one before, in place of one (arXiv 1712.00726)."""

from copy import deepcopy

from detectron2.config import LazyCall as L
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads

# Weights of the box deltas, and the overlap from which a box counts as found, of each head.
STAGES = [((10, 10, 5, 5), 0.5), ((20, 20, 10, 10), 0.6), ((30, 30, 15, 15), 0.7)]


def make_cascade(model):
    """Change the heads of a Mask R-CNN's config, in place, into those of Cascade Mask R-CNN."""
    heads = model.roi_heads
    head, predictor = heads.pop("box_head"), heads.pop("box_predictor")
    heads.pop("proposal_matcher")
    # Regression by class would need the class, which the next head is about to change.
    predictor.update(cls_agnostic_bbox_reg=True, num_classes="${...num_classes}")
    predictors = [deepcopy(predictor) for _ in STAGES]
    for (weights, _), stage in zip(STAGES, predictors, strict=True):
        stage.box2box_transform.weights = weights
    heads.update(
        _target_=CascadeROIHeads,
        box_heads=[deepcopy(head) for _ in STAGES],
        box_predictors=predictors,
        proposal_matchers=[
            L(Matcher)(thresholds=[overlap], labels=[0, 1], allow_low_quality_matches=False)
            for _, overlap in STAGES
        ],
    )
