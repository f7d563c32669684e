"""Images, and a model that knows their colour: what the tests of the image commands look at."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import backbones
from backbones import RevViT

# Written out here, so that a wrong one in the package is seen.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}

# The class of each rank, likeliest first, by the colour of the image. Class 5 is that of no colour.
RANKING = {"red": (0, 1, 2, 3, 4, 5), "green": (1, 2, 3, 4, 0, 5), "blue": (2, 0, 4, 3, 1, 5)}


def save_colour_model(file: Path, scale: float = 1.0, img_size: int | tuple[int, int] = 32) -> str:
    """Save a tiny model whose logits rank the classes as :data:`RANKING` says.

    Its blocks add nothing. The first three channels of a token are the image's mean red, green and
    blue in [0, 1], and the head turns the largest of them into the ranks.
    """
    model = backbones.create_model(
        "rev_vit_tiny", img_size=img_size, embed_dim=12, depth=1, num_heads=2, num_classes=6
    )
    assert isinstance(model, RevViT)
    patch = model.patch_embed.patch_size
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
        model.norm.weight.fill_(1.0)
        for channel in range(3):
            model.patch_embed.proj.weight[channel, channel] = STD[channel] / patch**2
            assert model.patch_embed.proj.bias is not None
            model.patch_embed.proj.bias[channel] = MEAN[channel]
        for channel, ranking in enumerate(RANKING.values()):
            for rank, label in enumerate(ranking):
                model.head.weight[label, channel] = -scale * rank
    backbones.save_weights(model, file)
    return str(file)


def save_image(path: Path, colour: str, size: tuple[int, int] = (40, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path)
    return path


def save_truncated(path: Path) -> Path:
    """A PNG of noise that breaks off in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(256, (40 * 48 * 3,), dtype=torch.uint8)
    Image.frombytes("RGB", (40, 48), bytes(noise.tolist())).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
