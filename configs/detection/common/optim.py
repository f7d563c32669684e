"""AdamW as in ViTDet and MViTv2, and a warmed-up cosine schedule stretched to the run."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from revdet.training.optim import get_optimizer_params

optimizer = L(torch.optim.AdamW)(
    # train_net.py sets params.model once the model is built.
    params=L(get_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0, layer_decay=1.0),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=0.05,
    warmup_method="linear",
    warmup_factor=0.001,
)
