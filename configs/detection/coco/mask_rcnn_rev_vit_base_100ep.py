"""Mask R-CNN, Rev-ViT-B, COCO: ViTDet's recipe (arXiv 2203.16527) on a reversible trunk.

The trunk starts from the released ImageNet weights; ViTDet starts from MAE pre-training.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from backbones import registry

from ..common.coco_loader import dataloader
from ..common.mask_rcnn import model
from ..common.optim import optimizer
from ..common.train import train

# Trunk: windows of 14 x 14 tokens, and four blocks that see the whole image.
trunk = model.backbone.net.model
trunk.update(name="rev_vit_base", img_size=1024, drop_path_rate=0.1, use_rel_pos=True)
trunk.update(window_size=14, global_attn_indexes=(2, 5, 8, 11))
train.init_checkpoint = registry.MODELS["rev_vit_base"].weights

# Schedule: 100 epochs of 118 k images, 64 at a time, with large-scale jitter at 1024 pixels.
dataloader.train.total_batch_size = 64
train.max_iter = 184375
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=184375
    ),
    warmup_length=250 / 184375,
    warmup_factor=0.001,
)

# Optimizer: AdamW; the learning rate is that of 64 images and falls from block to block.
train.reference_batch_size = 64
optimizer.update(lr=1e-4, weight_decay=0.1)
optimizer.params.layer_decay = 0.7

# Memory: nothing kept in the trunk; train.memory_budget=… stores as many blocks as fit.
train.memory = "reversible"
train.amp.enabled = True  # bfloat16

train.output_dir = "output/mask_rcnn_rev_vit_base_100ep"
