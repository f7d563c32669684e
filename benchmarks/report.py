"""Write `docs/benchmarks.md` and its pictures from the results in `benchmarks/results`.

    python -m benchmarks.report

Every number on that page comes from a JSON file, and stands beside the command that made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import gpu_report, plots
from benchmarks.measuring import ROOT, Json, parser_of
from benchmarks.tables import compiling, contestants, drift, load, origin, profile, table

PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """\
# Benchmarks

<!-- Written by `python -m benchmarks.report` from benchmarks/results: change those, not this. -->

What each way of saving memory costs, and what it saves. Contestants run the same blocks with the
same attention kernel and the same parameters. Where a table has quartiles, they ran in turn, A B C
A B C; the throughput is the median over the rounds of that relative to stored activations in the
same round. `make bench` measures all of this page that needs no GPU again, and
`python -m benchmarks.gpu` the rest, in one call on one GPU.
"""


def _memory(results: Json) -> Iterator[str]:
    plots.memory_depth(results)
    plots.memory_batch(results)
    part = results["depths"]
    yield "![Memory against depth](images/memory_depth.png)"
    yield (
        "What is alive between the forward and the backward pass for a batch of "
        f"{part['batch']}, in MB, counted on shape-only tensors. A checkpointed block keeps two "
        "streams here; of a plain transformer it would keep one."
    )
    rows = [
        [name, *(f"{value / 1e6:.1f}" for value in held)] for name, held in part["held"].items()
    ]
    yield table(["blocks", *part["depth"]], rows)
    yield origin(results)
    yield "![Memory against batch](images/memory_batch.png)"


def _speed(results: Json) -> Iterator[str]:
    found = results["eager"]
    subtitle = f"{found['depth']} blocks of {results['model']}, {results['device_name']}"
    plots.mixture(found["contestants"], subtitle)
    for part, what in (("eager", "Eager mode"), ("compiled", "Compiled, block by block")):
        found = results[part]
        yield (
            f"{what}: {found['depth']} blocks of `{results['model']}`, {results['img_size']} px, "
            f"{results['precision']}, batch {found['batch']}."
        )
        yield contestants(found)
        if "compile_seconds" in found:
            yield compiling(found)
    yield (
        "By operation count, reversing costs a second forward pass, a third of the arithmetic of a "
        "step with stored activations: the bound is 0.75 where a backward pass takes twice as long "
        "as a forward pass. Checkpointing has to run all but the last matrix product of a block "
        "again; a reversed block needs that one too, to rebuild its input."
    )
    yield "![Throughput of the mixtures](images/mixture.png)"
    beside = results["overhead"]["microseconds_per_block"]
    costs = ", ".join(f"{name} {value} µs" for name, value in beside.items())
    yield (
        "What a block costs in a training step where tensors are so small that arithmetic hardly "
        f"counts, one thread: {costs}."
    )
    yield origin(results)


def _keep(results: Json) -> Iterator[str]:
    yield (
        f"{results['depth']} blocks of `{results['model']}`, {results['img_size']} px, "
        f"{results['precision']}, batch {results['batch']}, on one thread, in time of the "
        "processor; held is what is alive between the forward and the backward pass. torch's "
        "checkpointing runs on the same blocks and keeps the input of each as well."
    )
    yield contestants(results)
    yield origin(results)


def _rewire(results: Json) -> Iterator[str]:
    plots.rewire(results)
    nets = results["held"]
    yield "![Accuracy of plain, rewired and new reversible nets](images/rewire.png)"
    before = ", ".join(f"{found['first'][-1][1]}" for found in results["seeds"])
    yield (
        f"A plain net of 12 blocks has learnt for {results['first']} steps to tell crops of "
        f"{results['photographs']} photographs apart: {before} % of the test crops, of two seeds. "
        f"Then {results['steps']} more steps of it; of the reversible net of its branches "
        "(`load_weights`); and of that net from random weights. Held between the passes for a "
        "batch of 64:"
    )
    rows = []
    for name in nets:
        ends = [f"{found[name][0][1]} → {found[name][-1][1]}" for found in results["seeds"]]
        rows.append([name, *ends, f"{nets[name] / 1e6:.1f}"])
    seeds = [f"seed {number}, %" for number in range(len(results["seeds"]))]
    yield table(["net", *seeds, "held, MB"], rows)
    yield (
        f"What the choice is between, {results['depth']} blocks of ViT-B width, two images of 224 "
        "pixels, one thread, in time of the processor:"
    )
    yield contestants(results)
    yield origin(results)


def _profile(results: Json) -> Iterator[str]:
    yield profile(results)
    yield "By kind under the profiler, which itself takes most of what is between the operators."
    yield origin(results)


def _drift(results: Json) -> Iterator[str]:
    plots.drift(results)
    yield "![Drift against depth](images/drift.png)"
    yield f"Largest relative error over the blocks of a fresh `{results['model']}`:"
    yield drift(results)
    yield origin(results)


def _recipes(results: Json) -> Iterator[str]:
    plots.recipes(results)
    yield "![Training memory of each recipe](images/recipes.png)"
    first = next(iter(results["recipes"].values()))["policies"]["store"]
    cards = ", ".join(first["largest_batch"])
    yield (
        "GB that one image or clip more takes; in brackets the peak of a batch of one in all; and "
        f"the largest batch on a card of {cards} GiB, of which 0.6 GB are "
        "CUDA's own and a tenth of the rest is left for fragmentation:"
    )
    policies = ("store", "checkpoint", "reversible")
    rows = []
    for name, recipe in results["recipes"].items():
        cells = []
        for policy in policies:
            found = recipe["policies"].get(policy)
            if found is None:
                cells += ["none", ""]
                continue
            cells.append(f"{found['per_image'] / 1e9:.2f} ({found['peak_of_one'] / 1e9:.1f})")
            cells.append(" / ".join(str(n or "-") for n in found["largest_batch"].values()))
        rows.append([f"`{name}`", " x ".join(map(str, recipe["shape"][1:])), *cells])
    heads = [head for policy in policies for head in (policy, "batch")]
    yield table(["recipe", "size", *heads], rows)
    yield origin(results)


def _detection_trunks(results: Json) -> Iterator[str]:
    rows = [
        [
            row["trunk"],
            row["policy"],
            f"{row['parameters'] / 1e6:.1f} M",
            *(f"{row[key] / 2**30:.3f}" for key in ("held", "peak")),
        ]
        for row in results["trunks"]
    ]
    yield (
        f"One image of {results['img_size']} pixels, {results['precision']}, in GiB; position "
        "embeddings of that size:"
    )
    yield table(["trunk", "", "parameters", "held", "peak"], rows)
    yield origin(results)


def _decode(results: Json) -> Iterator[str]:
    found = results["decoding"]
    (low, high), times = (
        found["lowest_and_highest_ratio"],
        found["revvideo_relative_to_pytorchvideo"],
    )
    yield (
        f"Clips of {results['clip']} from {results['videos']} videos ({results['video']}), a "
        f"second and core; revvideo gives {times:.1f} times as many "
        f"as PyTorchVideo (median of {results['rounds']} rounds, {low} … {high})."
    )
    rows = [[name, f"{rate:.1f}"] for name, rate in found["clips_per_second_per_core"].items()]
    yield table(["dataset", "clips"], rows)
    yield (
        f"Written again by `python -m revvideo.transcode`, the files decode "
        f"{found['transcoded_relative_to_not']:.1f} times as fast, at "
        f"{found['transcoded_bytes']} times the bytes and {found['transcoded_psnr']} dB."
    )
    yield f"{results['videos_by_codec']} videos of other codecs; –: cannot read them:"
    names = [*dict.fromkeys(name for rates in results["codecs"].values() for name in rates)]
    rows = [
        [codec, *(f"{rates[name]:.1f}" if name in rates else "–" for name in names)]
        for codec, rates in results["codecs"].items()
    ]
    yield table(["codec", *names], rows)
    yield origin(results)


SECTIONS = (
    ("Memory against depth and batch", "memory", _memory),
    ("Speed on a CPU", "speed_*", _speed),
    ("Outputs kept inside the blocks", "keep_*", _keep),
    ("From a plain net to a reversible one", "rewire_*", _rewire),
    ("Where the time goes", "profile_*", _profile),
    ("Numerical drift", "drift_*", _drift),
    ("Training memory of every recipe", "recipes", _recipes),
    ("Trunks of detectors beside Detectron2's", "detection_memory", _detection_trunks),
    ("Decoding of video beside PyTorchVideo", "decode_*", _decode),
    ("On a GPU", "gpu_*", gpu_report.section),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and its pictures."""
    parser = parser_of("report", __doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="Markdown file")
    args = parser.parse_args(argv)
    paragraphs = [HEAD.strip()]
    for title, pattern, section in SECTIONS:
        results = load(pattern)
        paragraphs.append(f"## {title}")
        if results is None and section is not gpu_report.section:
            paragraphs.append("Not yet measured.")
        else:
            paragraphs += section(results)
    args.output.write_text("\n\n".join(paragraphs) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
