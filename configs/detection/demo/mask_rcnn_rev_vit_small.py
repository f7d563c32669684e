"""Mask R-CNN with a small Rev-ViT at 320 pixels, for some photographs of your own without a GPU.

Minutes on two CPU cores for a hundred images (train.epochs=40). From random weights, so it shows
the road rather than how good a detector can be: with a GPU, take configs/detection/finetune.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .mask_rcnn_rev_vit_overfit import dataloader, lr_multiplier, model, optimizer, resize, train

dataloader.train.mapper.augmentations = [L(T.RandomFlip)(horizontal=True), resize]
optimizer.weight_decay = 0.05

train.update(output_dir="output/small", max_iter=2000, eval_period=500)
