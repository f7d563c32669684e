"""Reversible vision backbones whose activation memory is a policy.

>>> import torch, backbones
>>> model = backbones.create_model("rev_vit_small", num_classes=10)
>>> model(torch.zeros(2, 3, 224, 224)).shape
torch.Size([2, 10])
>>> backbones.set_memory(model, "reversible", stored_blocks=2)
"""

from backbones.memory import MemoryPolicy, set_memory
from backbones.models import create_model, list_models, register_model
from backbones.reversible import ReversibleBlock, ReversibleSequence
from backbones.vit import RevViT, ViT

__all__ = [
    "MemoryPolicy",
    "RevViT",
    "ReversibleBlock",
    "ReversibleSequence",
    "ViT",
    "create_model",
    "list_models",
    "register_model",
    "set_memory",
]
