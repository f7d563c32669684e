"""Mask R-CNN, ViT-B, COCO: Detectron2's ViTDet, twin of mask_rcnn_rev_vit_base_100ep.py.

Takes the files of Detectron2's zoo as a whole. Published, from MAE: 51.6 box AP, 45.9 mask AP.

    python revdet/train_net.py --config … --eval-only train.init_checkpoint=vitdet_base

To train it as published, set train.init_checkpoint=mae_vit_base; else the trunk starts from random
weights.
"""

from .mask_rcnn_rev_vit_base_100ep import dataloader, lr_multiplier, model, optimizer, train

# No norm behind the blocks, and positions of the pretraining at 224 pixels.
model.backbone.net.model.update(name="vit_base", final_norm=False, pretrain_img_size=224)
train.init_checkpoint = ""
train.memory = "store"

train.output_dir = "output/mask_rcnn_vit_base_100ep"
