"""The recipes that come with an adapter, found by name from any folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backbones.common.errors import UserError, near_names
from backbones.common.paths import local_path


@dataclass(frozen=True)
class Recipes:
    """Files ``DATASET/NAME``: installed in ``recipes/`` of the package, else in ``configs/``."""

    package: Path
    kinds: tuple[str, ...]  # the folders in configs/
    suffix: str

    def files(self) -> dict[str, Path]:
        """Where each recipe is, by its name: ``coco/mask_rcnn_rev_vit_base_100ep``."""
        inside, beside = self.package / "recipes", self.package.parent / "configs"
        return {
            path.relative_to(root).with_suffix("").as_posix(): path
            for root in ([inside] if inside.is_dir() else [beside / kind for kind in self.kinds])
            for path in sorted(root.glob(f"*/*{self.suffix}"))
            if path.parent.name != "common"  # what recipes import
        }

    def find(self, config: str) -> str:
        """The path of a recipe: ``config`` itself where it is a file, else that of this name; a
        UserError with the names that are near if it is neither."""
        config = local_path(config, "--config")
        known, name = self.files(), config.removesuffix(self.suffix)
        if Path(config).is_file():
            return config
        if name in known:
            return str(known[name])
        near = ", ".join(near_names("/".join(Path(name).parts[-2:]), known, cutoff=0.5))
        hint = f"there are {near}" if near else "--config list prints those that there are"
        raise UserError(f"config {config!r} does not exist; {hint}")
