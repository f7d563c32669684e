"""Cascade Mask R-CNN, Rev-ViT-L, COCO: mask_rcnn_rev_vit_large_100ep.py with cascaded box heads."""

from ..common.cascade import make_cascade
from .mask_rcnn_rev_vit_large_100ep import dataloader, lr_multiplier, model, optimizer, train

make_cascade(model)

train.output_dir = "output/cascade_mask_rcnn_rev_vit_large_100ep"
