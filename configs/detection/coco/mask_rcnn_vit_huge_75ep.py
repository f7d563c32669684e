"""Mask R-CNN, ViT-H, COCO: Detectron2's ViTDet, twin of mask_rcnn_rev_vit_huge_75ep.py.

Takes the files of Detectron2's zoo as a whole. Published, from MAE: 56.7 box AP, 50.2 mask AP.

    python revdet/train_net.py --config … --eval-only train.init_checkpoint=vitdet_huge

To train it as published, set train.init_checkpoint=mae_vit_huge; else the trunk starts from random
weights.
"""

from .mask_rcnn_rev_vit_huge_75ep import dataloader, lr_multiplier, model, optimizer, train

# No norm behind the blocks, and positions of the pretraining at 224 pixels.
model.backbone.net.model.update(name="vit_huge", final_norm=False, pretrain_img_size=224)
train.memory = "store"

train.output_dir = "output/mask_rcnn_vit_huge_75ep"
