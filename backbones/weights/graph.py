"""Models as graphs that run without this package: torch.export's (``.pt2``) and ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from backbones.common.errors import UserError, first_line, optional_import
from backbones.common.files import replacing
from backbones.models.attention import Attention

FORMATS = (".pt2", ".onnx")
TOLERANCE = 1e-5  # of the largest value


@dataclass(frozen=True)
class Graph:
    """A model that was written.

    ``error`` is the largest difference from the model itself, relative to its largest value, over
    inputs of other batches and, unless they are fixed, other sizes than it was traced with.
    """

    path: Path
    inputs: str  # the shape of the input, in words
    error: float

    def __str__(self) -> str:
        return f"{self.path}: input {self.inputs}; at most {self.error:.1e} from the model"


class Outputs(nn.Module):
    """A model that gives ``outputs(model, x)``, in a tuple."""

    def __init__(self, model: nn.Module, outputs: Callable[[Any, Tensor], Iterable[Tensor]]):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(self.model, x))


def export_graph(
    model: nn.Module, sample: Sequence[int], path: Path, multiple: int | None = None
) -> Graph:
    """Write a model as a graph for any batch, and compare the file with the model.

    Args:
        model: in eval mode, on the CPU; from a batch of images or clips to a tensor or several.
        sample: the shape of one, (C, H, W) or (C, T, H, W).
        path: ending in one of ``FORMATS``.
        multiple: sides may be any that are multiples of this, positions are resized in the graph;
            None: those of ``sample`` alone.

    Raises:
        MissingExtra: what ONNX needs is not installed.
        UserError: the model cannot be written, or the file gives other numbers.
    """
    onnx = path.suffix == ".onnx"
    for library in ("onnx", "onnxscript", "onnxruntime") if onnx else ():
        optional_import(library, "export", "ONNX")
    dims: dict[int, Any] = {0: Dim("batch", min=1)}
    names, other = ["batch", *map(str, sample)], [*sample]
    if multiple:
        # A side of one window, or of one token, is another graph.
        windows = [m.window_size for m in model.modules() if isinstance(m, Attention)]
        least = 1 + max(windows, default=1)
        if min(sample[-2:]) < least * multiple:
            raise UserError(
                f"{sample[-2]} x {sample[-1]} pixels are one window of this model or less: give "
                f"sides of at least {least * multiple}, or a fixed size"
            )
        for place, name in ((-2, "height"), (-1, "width")):
            dims[len(sample) + 1 + place] = multiple * Dim(name, min=max(2, least))
            names[place] = f"{multiple} x {name}"
        other[-2:] = other[-2] + multiple, max(max(2, least) * multiple, other[-1] - multiple)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((2, *sample), (3, *other))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [_outputs(model(x)) for x in inputs]
        try:
            program = torch.export.export(model, (inputs[0],), dynamic_shapes=(dims,))
            with replacing(path) as partial:
                if onnx:
                    torch.onnx.export(program, (), str(partial), verbose=False, external_data=False)
                else:
                    with partial.open("wb") as file:
                        torch.export.save(program, file)
                made = [_run(partial, x, onnx) for x in inputs]
                error = max(map(_distance, made, expected))
                if not error <= TOLERANCE:
                    raise UserError(
                        f"the graph gives other numbers than the model (by {error:.1e} of the "
                        "largest): try the other format, or a fixed size"
                    )
        except UserError:
            raise
        except Exception as reason:  # of the exporters, of many kinds
            raise UserError(f"this model cannot be exported so: {first_line(reason)}") from reason
    return Graph(path, f"({', '.join(names)})", error)


def _outputs(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [*made]


def _run(path: Path, x: Tensor, onnx: bool) -> list[Tensor]:
    if not onnx:
        with path.open("rb") as file:
            return _outputs(torch.export.load(file).module()(x))
    runtime = optional_import("onnxruntime", "export", "ONNX")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    made = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(each) for each in made]


def _distance(made: list[Tensor], own: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, own, strict=True))
