"""What comes with an installation of this package: its recipes, and how Detectron2 comes."""

from contextlib import AbstractContextManager
from pathlib import Path

from backbones.common.errors import extra
from backbones.common.recipes import Recipes

_HERE = Path(__file__).parent
RECIPES = Recipes(_HERE, ("detection",), ".py")


def detection_extra() -> AbstractContextManager[None]:
    """:func:`backbones.common.errors.extra` for what Detectron2 and this package import."""
    files = [folder / "detectron2-requirements.txt" for folder in (_HERE, _HERE.parent)]
    file = files[0] if files[0].is_file() else files[1]  # installed, or in a checkout
    return extra("detection", also=f", and Detectron2 itself as {file} says")
