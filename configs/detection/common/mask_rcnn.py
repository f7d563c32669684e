"""Mask R-CNN on a plain trunk: a simple feature pyramid and the heads of ViTDet."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from backbones import create_model
from revdet import TrunkBackbone

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net = L(TrunkBackbone)(model=L(create_model)(name="rev_vit_base", num_classes=0))
model.backbone.in_feature = "scale4"
