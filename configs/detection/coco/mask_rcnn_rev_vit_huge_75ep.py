"""Mask R-CNN, Rev-ViT-H, COCO: the recipe of Rev-ViT-B with ViTDet's changes for ViT-H.

Patches of 16 pixels, 75 epochs. No weights are released for Rev-ViT-H: set train.init_checkpoint to
your own, else the trunk starts from random ones.
"""

from .mask_rcnn_rev_vit_base_100ep import dataloader, lr_multiplier, model, optimizer, train

trunk = model.backbone.net.model
trunk.update(name="rev_vit_huge", patch_size=16, drop_path_rate=0.5)
trunk.update(global_attn_indexes=(7, 15, 23, 31))
train.init_checkpoint = ""

optimizer.params.layer_decay = 0.9

train.max_iter = 138281
lr_multiplier.scheduler.update(milestones=[122916, 133159], num_updates=138281)

train.output_dir = "output/mask_rcnn_rev_vit_huge_75ep"
