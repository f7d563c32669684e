"""Mask R-CNN with FPN and a very small Rev-MViT on the embedded dataset: minutes on two cores."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import FPN

from backbones import create_model
from revdet import TrunkBackbone

from .mask_rcnn_rev_vit_demo import dataloader, lr_multiplier, model, optimizer, train, width

# Three stages with strides 4, 8 and 16; the pyramid and the heads see the last two.
model.backbone = L(FPN)(
    bottom_up=L(TrunkBackbone)(
        model=L(create_model)(
            name="rev_mvit_base",
            num_classes=0,
            img_size=144,
            embed_dim=24,
            depth=5,
            transitions=(1, 3),
        ),
        out_features=["scale3", "scale4"],
    ),
    in_features="${.bottom_up.out_features}",
    out_channels=width,
    norm="LN",
)

train.output_dir = "output/demo_rev_mvit"
