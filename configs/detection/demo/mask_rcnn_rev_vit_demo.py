"""Mask R-CNN with a very small Rev-ViT on the embedded dataset: minutes on two CPU cores."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from revdet.priors import PriorOutputLayers, PriorRPNHead

from ..common.coco_loader import dataloader
from ..common.mask_rcnn import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

width = 64  # channels of the pyramid and the heads

trunk = model.backbone.net.model
trunk.update(name="rev_vit_tiny", img_size=144, patch_size=8, embed_dim=96, depth=4)
trunk.update(num_heads=3)

# Tokens have stride 8; the pyramid has strides 8 and 16.
model.backbone.in_feature = "scale3"
model.backbone.update(out_channels=width, scale_factors=(1.0, 0.5), square_pad=0)
model.backbone.top_block = None

rpn = model.proposal_generator
rpn.in_features = ["p3", "p4"]
rpn.head.update(_target_=PriorRPNHead, in_channels=width, conv_dims=[-1])
rpn.anchor_generator.update(sizes=[[32], [80]], strides=[8, 16])
rpn.update(pre_nms_topk=(200, 100), post_nms_topk=(100, 50))

heads = model.roi_heads
heads.update(num_classes=5, batch_size_per_image=32)
heads.box_in_features = heads.mask_in_features = ["p3"]
for pooler in (heads.box_pooler, heads.mask_pooler):
    pooler.update(scales=[1 / 8], sampling_ratio=2)
heads.box_head.input_shape.channels = heads.mask_head.input_shape.channels = width
heads.box_head.update(conv_dims=[], fc_dims=[128])
heads.box_predictor._target_ = PriorOutputLayers
heads.box_predictor.input_shape.channels = 128
heads.mask_head.conv_dims = [width, width, width]
heads.mask_pooler.output_size = heads.mask_head.input_shape.height = 7  # 14 x 14 masks
heads.mask_head.input_shape.width = 7

dataloader.train.dataset.update(names="demo_train", filter_empty=False)
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(horizontal=True)]
dataloader.train.update(total_batch_size=2, num_workers=1)
dataloader.test.dataset.names = "demo_val"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 0

# A short memory of the squared gradients, because the run is short.
optimizer.update(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), fused=True)

train.output_dir = "output/demo"
train.max_iter = 1200
train.eval_period = 400
train.clip_grad_norm = 10.0
train.checkpointer.period = 300
