"""Mask R-CNN, ViT-B, on a dataset of your own, from weights that others have released.

    python revdet/train_net.py --config configs/detection/finetune/mask_rcnn_vit_base_zoo.py \\
        dataset.train_json=FILE dataset.train_images=FOLDER \\
        dataset.val_json=FILE dataset.val_images=FOLDER

Starts from all of Detectron2's ViTDet-B but the layers of its classes. train.init_checkpoint=
mae_vit_base or dinov2_vit_base starts the trunk alone, which takes longer; set train.max_iter.
"""

from ..coco.mask_rcnn_vit_base_100ep import dataloader, model, optimizer, train
from ..common.optim import lr_multiplier

train.init_checkpoint = "vitdet_base"

# Schedule: warm-up and a cosine over 5000 iterations of 16 images, of which lr is.
dataloader.train.total_batch_size = 16
train.reference_batch_size = 16
train.max_iter = 5000
train.eval_period = 1000
train.checkpointer.period = 1000
optimizer.lr = 5e-5

# Memory: the input of each block, and the rest computed again.
train.memory = "checkpoint"

train.output_dir = "output/finetune/mask_rcnn_vit_base"
