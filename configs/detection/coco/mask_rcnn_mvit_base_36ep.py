"""Mask R-CNN with FPN, MViT-B, COCO: the non-reversible twin of mask_rcnn_rev_mvit_base_36ep.py.

The trunk starts from random weights unless train.init_checkpoint names some.
"""

from .mask_rcnn_rev_mvit_base_36ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.model.name = "mvit_base"
train.init_checkpoint = ""
train.memory = "store"

train.output_dir = "output/mask_rcnn_mvit_base_36ep"
