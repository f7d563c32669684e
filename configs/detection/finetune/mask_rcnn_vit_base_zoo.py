"""Mask R-CNN, ViT-B, on a dataset of your own, from weights that others have released.

    python revdet/train_net.py --config configs/detection/finetune/mask_rcnn_vit_base_zoo.py \\
        dataset.train_json=FILE dataset.train_images=FOLDER \\
        dataset.val_json=FILE dataset.val_images=FOLDER

Starts from all of Detectron2's ViTDet-B but the layers of its classes. train.init_checkpoint=
mae_vit_base or dinov2_vit_base starts the trunk alone, which takes longer: more train.epochs.
"""

from ..coco.mask_rcnn_vit_base_100ep import dataloader, model, optimizer, train
from ..common.optim import lr_multiplier

train.init_checkpoint = "vitdet_base"

# Schedule: a cosine over 50 epochs, 16 images at a time, of which lr is, behind 100 iterations of
# warm-up. 16 images fit a card of 12 GB; with less, set dataloader.train.total_batch_size.
dataloader.train.total_batch_size = 16
train.reference_batch_size = 16
train.epochs = 50
train.warmup_iters = 100
train.eval_period = 500
train.checkpointer.period = 250
optimizer.lr = 5e-5

# Memory: the input of each block, and of the rest what the card has room for; without a card,
# train.memory_budget= keeps none.
train.memory = "checkpoint"
train.memory_budget = "auto"

train.output_dir = "output/finetune/mask_rcnn_vit_base"
