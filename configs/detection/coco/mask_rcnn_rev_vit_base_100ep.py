"""Mask R-CNN, Rev-ViT-B, COCO, 100 epochs at 1024 pixels: ViTDet's length and augmentation."""

from ..common.coco_loader import dataloader
from ..common.mask_rcnn import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

model.backbone.net.model.img_size = 1024

train.output_dir = "output/mask_rcnn_rev_vit_base_100ep"
train.max_iter = 184375  # 100 epochs of 118 k images, 64 at a time
train.amp.enabled = True
lr_multiplier.warmup_length = 250 / 184375  # as a share of the run
