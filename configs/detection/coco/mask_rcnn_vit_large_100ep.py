"""Mask R-CNN, ViT-L, COCO: Detectron2's ViTDet, twin of mask_rcnn_rev_vit_large_100ep.py.

Takes the files of Detectron2's zoo as a whole. Published, from MAE: 55.5 box AP, 49.2 mask AP.

    python revdet/train_net.py --config … --eval-only train.init_checkpoint=vitdet_large

To train it as published, set train.init_checkpoint=mae_vit_large; else the trunk starts from random
weights.
"""

from .mask_rcnn_rev_vit_large_100ep import dataloader, lr_multiplier, model, optimizer, train

# No norm behind the blocks, and positions of the pretraining at 224 pixels.
model.backbone.net.model.update(name="vit_large", final_norm=False, pretrain_img_size=224)
train.init_checkpoint = ""
train.memory = "store"

train.output_dir = "output/mask_rcnn_vit_large_100ep"
