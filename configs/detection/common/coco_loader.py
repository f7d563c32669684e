"""COCO with large-scale jitter at 1024 pixels, as in ViTDet."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)

from revdet.data.loader import TrainMapper, build_train_loader
from revdet.training.evaluation import FasterCOCOEvaluator

image_size = 1024

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train", filter_empty=True),
        mapper=L(TrainMapper)(
            is_train=True,
            augmentations=[
                L(T.RandomFlip)(horizontal=True),
                L(T.ResizeScale)(
                    min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size
                ),
                L(T.FixedSizeCrop)(crop_size=(image_size, image_size), pad=False),
            ],
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format="bitmask",
            recompute_boxes=True,
        ),
        total_batch_size=64,
        num_workers=4,
        seed="${train.seed}",
        accumulate="${train.accumulate}",
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size)
            ],
            image_format="RGB",
        ),
        num_workers=4,
    ),
    evaluator=L(FasterCOCOEvaluator)(
        dataset_name="${..test.dataset.names}", tasks=["bbox", "segm"]
    ),
)
