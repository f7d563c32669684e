"""The non-reversible twin of mask_rcnn_rev_mvit_demo.py."""

from .mask_rcnn_rev_mvit_demo import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.model.name = "mvit_base"
train.memory = "store"

train.output_dir = "output/demo_mvit"
