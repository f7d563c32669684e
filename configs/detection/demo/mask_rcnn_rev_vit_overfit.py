"""Mask R-CNN with a small Rev-ViT at 320 pixels, to learn a handful of images by heart.

Minutes on two CPU cores show whether the boxes, masks and classes of a dataset come through:
trained and tested on the same dozen or two of its images, the score must be high. Give them as
dataset.train_json, dataset.train_images, dataset.val_json and dataset.val_images.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from revdet.priors import PriorOutputLayers, PriorRPNHead

from ..common.coco_loader import dataloader
from ..common.mask_rcnn import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

width = 64  # channels of the pyramid and the heads
image_size = 320

trunk = model.backbone.net.model
trunk.update(name="rev_vit_tiny", img_size=image_size, embed_dim=192, depth=4, num_heads=3)

# Tokens have stride 16; the pyramid has strides 8, 16 and 32.
model.backbone.update(out_channels=width, scale_factors=(2.0, 1.0, 0.5), square_pad=image_size)
model.backbone.top_block = None

rpn = model.proposal_generator
rpn.in_features = ["p3", "p4", "p5"]
rpn.head.update(_target_=PriorRPNHead, in_channels=width, num_anchors=6, conv_dims=[-1])
rpn.anchor_generator.update(sizes=[[16, 32], [64, 128], [192, 256]], strides=[8, 16, 32])
rpn.update(pre_nms_topk=(200, 200), post_nms_topk=(100, 100))

heads = model.roi_heads
heads.batch_size_per_image = 64
heads.box_in_features = heads.mask_in_features = ["p3", "p4"]
for pooler in (heads.box_pooler, heads.mask_pooler):
    pooler.update(scales=[1 / 8, 1 / 16], sampling_ratio=2)
heads.box_head.input_shape.channels = heads.mask_head.input_shape.channels = width
heads.box_head.update(conv_dims=[], fc_dims=[256])
heads.box_predictor._target_ = PriorOutputLayers
heads.box_predictor.input_shape.channels = 256
heads.mask_head.conv_dims = [width, width]
heads.mask_pooler.output_size = heads.mask_head.input_shape.height = 7  # 14 x 14 masks
heads.mask_head.input_shape.width = 7

# The same pixels every time: there is nothing to generalise to.
resize = L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size)
dataloader.train.mapper.augmentations = [resize]
dataloader.train.update(total_batch_size=2, num_workers=1)
dataloader.test.mapper.augmentations = [resize]
dataloader.test.num_workers = 0

# A short memory of the squared gradients, because the run is short.
optimizer.update(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98), fused=True)

train.update(output_dir="output/overfit", max_iter=800, eval_period=200, clip_grad_norm=10.0)
train.checkpointer.period = 200
