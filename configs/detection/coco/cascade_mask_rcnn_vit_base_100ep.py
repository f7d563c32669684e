"""Cascade Mask R-CNN, ViT-B, COCO: mask_rcnn_vit_base_100ep.py with cascaded box heads."""

from ..common.cascade import make_cascade
from .mask_rcnn_vit_base_100ep import dataloader, lr_multiplier, model, optimizer, train

make_cascade(model)

train.output_dir = "output/cascade_mask_rcnn_vit_base_100ep"
