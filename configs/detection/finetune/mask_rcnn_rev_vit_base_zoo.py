"""Mask R-CNN, Rev-ViT-B rewired from a plain net: mask_rcnn_vit_base_zoo.py in less memory.

The branches of the released trunk become those of a reversible one, whose streams end as their
mean, so that pyramid and heads of ViTDet-B are taken over as they are. What train.init_checkpoint
takes besides is the same. Another function at first: see docs/pretrained.md.
"""

from .mask_rcnn_vit_base_zoo import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.model.update(name="rev_vit_base", fuse="mean")
train.memory = "reversible"

train.output_dir = "output/finetune/mask_rcnn_rev_vit_base"
