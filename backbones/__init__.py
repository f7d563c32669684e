"""Reversible vision backbones whose activation memory is a policy.

>>> import torch, backbones
>>> model = backbones.create_model("rev_vit_small", num_classes=10)
>>> model(torch.zeros(2, 3, 224, 224)).shape
torch.Size([2, 10])
>>> backbones.set_memory(model, "reversible", stored_blocks=2)
"""

from backbones.compiled import compile_blocks
from backbones.drift import DriftReport, probe_drift
from backbones.files import WeightsError
from backbones.fit import MemoryPlan, fit_memory
from backbones.formats import convert_state_dict
from backbones.memory import MemoryPolicy, set_memory
from backbones.models import create_model, list_models, register_model
from backbones.mvit import MViT, RevMViT
from backbones.restore import from_pyslowfast, load_model
from backbones.reversible import ReversibleBlock, ReversibleSequence
from backbones.vit import RevViT, ViT
from backbones.weights import LoadReport, load_weights, save_weights

__all__ = [
    "DriftReport",
    "LoadReport",
    "MViT",
    "MemoryPlan",
    "MemoryPolicy",
    "RevMViT",
    "RevViT",
    "ReversibleBlock",
    "ReversibleSequence",
    "ViT",
    "WeightsError",
    "compile_blocks",
    "convert_state_dict",
    "create_model",
    "fit_memory",
    "from_pyslowfast",
    "list_models",
    "load_model",
    "load_weights",
    "probe_drift",
    "register_model",
    "save_weights",
    "set_memory",
]
