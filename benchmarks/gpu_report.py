"""The part of `docs/benchmarks.md` about the results of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import plots
from benchmarks.measuring import Json
from benchmarks.tables import compiling, contestants, drift, megabytes, origin, profile, table


def _slope(part: Json, where: str) -> Iterator[str]:
    low, high = part["batches"]
    yield f"What one image more adds to the peak, from batch {low} to {high}, in MB:"
    rows = [[name, megabytes(found["bytes_per_image"])] for name, found in part["models"].items()]
    yield table(["model", "MB"], rows)
    yield f"Ratio: {part['ratio'] or 'not measured, one of the two does not fit'}."


def _depth(part: Json, where: str) -> Iterator[str]:
    lines = {
        name: [
            (blocks, peak / 1e6)
            for blocks, peak in zip(part["depth"], peaks, strict=True)
            if peak is not None
        ]
        for name, peaks in part["peak"].items()
    }
    title = "Peak of the activations (MB)"
    subtitle = f"{part['model']}, batch {part['batch']}, {where}"
    plots.curves(lines, "gpu_depth", title, subtitle, "depth (blocks)")
    yield "![Peak against depth](images/gpu_depth.png)"
    rows = [[name, *map(megabytes, peaks)] for name, peaks in part["peak"].items()]
    yield table(["peak, MB, at blocks", *part["depth"]], rows)


def _mixture(part: Json, where: str) -> Iterator[str]:
    values = part["stored_blocks"]
    fitting = {
        name: {**found, "stored_blocks": int(name)}
        for name, found in values.items()
        if found["peak"] is not None
    }
    if fitting:
        subtitle = f"{part['model']}, batch {part['batch']}, {where}"
        plots.mixture(fitting, subtitle, "gpu_mixture")
        yield "![Throughput of the mixtures](images/gpu_mixture.png)"
    named = {f"{name} of {part['blocks']} stored": found for name, found in values.items()}
    yield contestants({"contestants": named})


def _budgets(part: Json, where: str) -> Iterator[str]:
    tried = part["largest_batch_tried"]
    yield (
        f"The largest batch of `{part['model']}` with {part['depth']} blocks, AdamW's state "
        f"included, and images per second at that batch. Batches over {tried} are not tried."
    )

    def cell(row: Json | str | None) -> str:
        if row is None:
            return ""
        if isinstance(row, str):
            return row
        if not row["largest_batch"]:
            return "does not fit"
        return f"{row['largest_batch']}, {row['images_per_second']:.0f}/s"

    found = part["contestants"]
    budgets = list(dict.fromkeys(budget for rows in found.values() for budget in rows))
    rows = [[name, *(cell(rows.get(budget)) for budget in budgets)] for name, rows in found.items()]
    yield table(["", *budgets], rows)


def _speed(part: Json, where: str) -> Iterator[str]:
    yield f"`{part['model']}` at batch {part['batch']}:"
    yield contestants(part)
    yield compiling(part)


def _batches(part: Json, where: str) -> Iterator[str]:
    for number, (model, found) in enumerate(part.items()):
        lines = {name: curve["images_per_second"] for name, curve in found.items()}
        name = f"gpu_batches_{number}"
        plots.curves(lines, name, "Images per second", f"{model}, {where}", "batch (images)")
        yield f"![Images per second of {model}](images/{name}.png)"
        best = (
            f"{name}: {max(rate for _, rate in curve['images_per_second']):.0f} images/s at most, "
            f"up to batch {curve['images_per_second'][-1][0]} ({curve['ended']})"
            for name, curve in found.items()
            if curve["images_per_second"]
        )
        yield f"{model}. {'; '.join(best)}."


def _drift(part: Json, where: str) -> Iterator[str]:
    plots.drift(part, "gpu_drift")
    yield "![Drift against depth](images/gpu_drift.png)"
    yield drift(part)


def _profile(part: Json, where: str) -> Iterator[str]:
    yield f"A step of `{part['model']}`, {part['depth']} blocks, batch {part['batch']}:"
    yield profile(part)


PARTS = {
    "slope": ("Memory of an image", _slope),
    "depth": ("Peak against depth", _depth),
    "mixture": ("Mixtures", _mixture),
    "speed": ("All contestants at equal batch", _speed),
    "batches": ("Images per second against batch", _batches),
    "budgets": ("Largest batch within a budget", _budgets),
    "drift": ("Drift", _drift),
    "profile": ("Where the time goes", _profile),
}


def section(results: Json | None) -> Iterator[str]:
    """All paragraphs of one file of results; None if there is none yet."""
    if results is not None:
        yield origin(results)
    for name, (title, part) in PARTS.items():
        yield f"### {title}"
        if results is None or name not in results:
            lacks_memory = results is not None and name in results["out_of_memory"]
            yield "This card has not enough memory." if lacks_memory else "Not yet measured."
        else:
            yield from part(results[name], results["device_name"])
