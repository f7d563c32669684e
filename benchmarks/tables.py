"""Results as tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.measuring import RESULTS, Json


def load(pattern: str) -> Json | None:
    """The newest of the results whose file name fits, or None."""
    files = RESULTS.glob(f"{pattern}.json")
    found = [json.loads(path.read_text()) for path in sorted(files)]
    return max(found, key=lambda results: results["date"], default=None)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def origin(results: Json) -> str:
    """Where the numbers come from."""
    where = results["device_name"]
    if "threads" in results and where != "shape-only tensors":
        where += f", {results['threads']} thread{'s' * (results['threads'] > 1)}"
    return f"`{results['command']}`: {where}, torch {results['torch']}, {results['date']}."


def megabytes(size: float | None) -> str:
    """Bytes in MB; None, which stands for what did not fit, in words."""
    return "out of memory" if size is None else f"{size / 1e6:.0f}"


def contestants(part: Json) -> str:
    """Throughput, spread and time of a step; bytes, where all have them."""
    header = ["contestant", "throughput", "quartiles", "seconds a step"]
    rows = []
    bytes_of = [
        key for key in ("peak", "held") if all(key in row for row in part["contestants"].values())
    ]
    for name, values in part["contestants"].items():
        low, high = values["quartiles"]
        row = [name, f"{values['throughput']:.3f}", f"{low:.3f} … {high:.3f}"]
        row.append(f"{values['seconds']:.3g}")
        rows.append(row + [megabytes(values[key]) for key in bytes_of])
    return table(header + [f"{key}, MB" for key in bytes_of], rows)


def profile(part: Json) -> str:
    """Milliseconds of a step by kind of operator."""
    found = part["profile"]
    rows = [
        [kind, *(f"{found[policy]['by_kind'][kind]:.1f}" for policy in found)]
        for kind in found["store"]["by_kind"]
    ]
    whole = (f"{values['milliseconds']:.1f}" for values in found.values())
    return table(["ms", *found], [*rows, ["a step without the profiler", *whole]])


def drift(part: Json) -> str:
    """Errors by depth."""
    rows = [
        [f"{precision}, {what}", *(f"{value:.0e}" for value in values)]
        for precision, errors in part["drift"].items()
        for what, values in errors.items()
    ]
    return table(["blocks", *part["depths"]], rows)


def compiling(part: Json) -> str:
    """What compiling takes."""
    return (
        "Compiling attention and MLP, each for the forward pass and for the second run within the "
        f"backward pass, takes {part['compile_seconds']} s where nothing is cached, whatever the "
        "depth."
    )
