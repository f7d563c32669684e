"""The non-reversible twin of mask_rcnn_rev_vit_demo.py."""

from .mask_rcnn_rev_vit_demo import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.model.name = "vit_tiny"
train.memory = "store"

train.output_dir = "output/demo_vit"
