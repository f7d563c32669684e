"""Mask R-CNN with FPN, Rev-MViT-B, COCO, 36 epochs: the detector of the paper (arXiv 2302.04869).

Published: 48.0 box AP, 43.5 mask AP. Schedule and augmentation are those of MViTv2 (arXiv
2112.01526) in Detectron2, since the paper gives none of its own.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from backbones import registry

from ..common.coco_loader_multiscale import dataloader
from ..common.mask_rcnn_fpn import model
from ..common.optim import optimizer
from ..common.train import train

# Trunk: 16 blocks in four stages, a map of each; positions follow the size of the image.
model.backbone.bottom_up.model.update(name="rev_mvit_base", drop_path_rate=0.2)
train.init_checkpoint = registry.MODELS["rev_mvit_base"].weights

# Schedule: 36 epochs of 118 k images, 64 at a time, shorter edges of 480 to 800 pixels.
dataloader.train.total_batch_size = 64
train.max_iter = 67500
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[52500, 62500], num_updates=67500
    ),
    warmup_length=250 / 67500,
    warmup_factor=0.001,
)

# Optimizer: AdamW; the learning rate is that of 64 images.
train.reference_batch_size = 64
optimizer.update(lr=1.6e-4, weight_decay=0.1)

# Memory: stage transitions are checkpointed, the rest of the trunk keeps nothing. What a block of
# the first stage needs while it runs is large, so images run one by one, up to eight of a batch.
train.memory = "reversible"
train.memory_slices = 8
train.amp.enabled = True  # bfloat16

train.output_dir = "output/mask_rcnn_rev_mvit_base_36ep"
