"""Reversible vision backbones whose activation memory is a policy.

>>> import torch, backbones
>>> model = backbones.create_model("rev_vit_small", num_classes=10)
>>> model(torch.zeros(2, 3, 224, 224)).shape
torch.Size([2, 10])
>>> backbones.set_memory(model, "reversible", stored_blocks=2)
"""

from backbones.engine.compiled import compile_blocks
from backbones.engine.policies import MemoryPolicy, set_memory
from backbones.engine.reversible import ReversibleBlock, ReversibleSequence
from backbones.factory import create_model
from backbones.memory.budget import MemoryPlan, fit_memory
from backbones.memory.drift import DriftReport, probe_drift
from backbones.models.mvit import MViT, RevMViT
from backbones.models.vit import RevViT, ViT
from backbones.registry import list_models, register_model
from backbones.weights.checkpoint import WeightsError
from backbones.weights.formats import convert_state_dict
from backbones.weights.loading import LoadReport, load_model, load_weights, save_weights
from backbones.weights.pyslowfast import from_pyslowfast

__version__ = "0.2.0"

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
