"""Mask R-CNN on a trunk of several stages: a feature pyramid network and its usual heads."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from backbones import create_model
from revdet import TrunkBackbone

constants = model_zoo.get_config("common/data/constants.py").constants

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std
model.input_format = "RGB"
model.backbone.bottom_up = L(TrunkBackbone)(
    model=L(create_model)(name="rev_mvit_base", num_classes=0),
    out_features=["scale2", "scale3", "scale4", "scale5"],
)
