"""What both datasets share: the photographs, a folder that is made once, and the command line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import Image

from backbones.common.console import make_parser, run_command
from backbones.common.errors import UserError, optional_import
from backbones.common.files import write_json


@cache
def photograph(file: str) -> Image.Image:
    """A photograph, RGB or grey, which the wheel of scikit-image installs beside its code."""
    data = optional_import("skimage.data", "dev", "the demo")
    return Image.open(Path(data.__file__).parent / file).copy()


def make_once(output: Path, made_by: str, write: Callable[[Path], None]) -> Path:
    """Fill the folder ``output`` by ``write(folder)``, unless ``made_by`` has filled it before.

    That happens in a hidden folder, renamed at the end: an interrupted build leaves nothing.

    Raises:
        UserError: there is something else. It is not touched.
    """
    output = output.absolute()
    record = output / "demo.json"
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        found = json.loads(record.read_text()) if record.is_file() else {}
        lost = [name for name in found.get("files", ()) if not (output / name).is_file()]
        if lost or found.get("made_by") != made_by:
            problem = f"has lost {lost[0]}" if lost else f"was not made by {made_by}"
            raise UserError(f"{output} {problem}: remove it, or choose another folder")
        print(f"{output} is up to date")
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir()
        write(fresh)
        files = sorted(str(path.relative_to(fresh)) for path in fresh.rglob("*.*"))
        write_json(fresh / record.name, {"made_by": made_by, "files": files})
        fresh.replace(output)
    print(f"made {output}")
    return output


def command(name: str, doc: str, build: Callable[..., Path], argv: list[str] | None = None) -> int:
    """The command line of a module of this package, ``doc`` its help; returns the exit status."""
    parser = make_parser(f"python -m demo.{name}", doc)
    parser.add_argument("--output", type=Path, required=True, help="folder, new or made before")
    return run_command(parser, lambda options: build(options.output) and None, argv)
