"""Mask R-CNN, Rev-ViT-L, COCO: the recipe of Rev-ViT-B with ViTDet's changes for ViT-L.

No weights are released for Rev-ViT-L: set train.init_checkpoint to your own, else the trunk
starts from random ones.
"""

from .mask_rcnn_rev_vit_base_100ep import dataloader, lr_multiplier, model, optimizer, train

trunk = model.backbone.net.model
trunk.update(name="rev_vit_large", drop_path_rate=0.4, global_attn_indexes=(5, 11, 17, 23))
train.init_checkpoint = ""

optimizer.params.layer_decay = 0.8

train.output_dir = "output/mask_rcnn_rev_vit_large_100ep"
