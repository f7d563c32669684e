"""What setup.cfg cannot say: the recipes of configs/ are installed inside the packages."""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = {"revdet": ["configs/detection"], "revvideo": ["configs/video", "configs/image"]}


class BuildWithRecipes(build_py):
    """Puts them into revdet/recipes and revvideo/recipes, never beside the packages."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout has them where they are
            return
        for package, folders in RECIPES.items():
            inside = Path(self.build_lib, package)
            shutil.rmtree(inside / "recipes", ignore_errors=True)  # of an earlier build
            for folder in filter(os.path.isdir, folders):
                shutil.copytree(
                    folder,
                    inside / "recipes",
                    ignore=shutil.ignore_patterns("__pycache__"),
                    dirs_exist_ok=True,
                )
        shutil.copy("detectron2-requirements.txt", Path(self.build_lib, "revdet"))


setup(cmdclass={"build_py": BuildWithRecipes})
