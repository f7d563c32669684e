"""Mask R-CNN, ViT-L, COCO: the non-reversible twin of mask_rcnn_rev_vit_large_100ep.py.

The trunk starts from random weights unless train.init_checkpoint names some.
"""

from .mask_rcnn_rev_vit_large_100ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.model.name = "vit_large"
train.init_checkpoint = ""
train.memory = "store"

train.output_dir = "output/mask_rcnn_vit_large_100ep"
