"""The GPU figures of `docs/performance.md`, from `benchmarks/results/gpu.json`, a file that `benchmarks/gpu.sh` wrote.

Where there is no such file, or it is that of a dry run, the blocks say so and state no figure. None is typed in by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS
from benchmarks.performance_tables import DOCUMENT
from benchmarks.tables import fill, load, number, share, table
from hf_certkv.report import human_bytes

NONE = "No GPU was available when this page was written: no figure is stated."
MISSING = "This was not measured: no figure is stated."
Result = dict[str, Any]


def provenance(found: Result) -> str:
    """One line: device, versions, commit, date."""
    machine = found["machine"]
    commit = (machine.get("commit") or "unknown")[:10]
    return (
        f"*{machine.get('gpu', 'no GPU')}, CUDA {machine.get('cuda')}, torch {machine['torch']}, triton {machine['triton']}, "
        f"transformers {machine['transformers']}, commit {commit}, {machine['date']}.*"
    )


def micro(summary: Result | None) -> str:
    """Median and quartiles in microseconds."""
    return "-" if summary is None else f"{1e6 * summary['median']:.1f} ({1e6 * summary['q1']:.1f} to {1e6 * summary['q3']:.1f})"


def milli(summary: Result | float | None) -> str:
    """Median, or one figure, in milliseconds."""
    seconds = summary["median"] if isinstance(summary, dict) else summary
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def ratio(found: Result | None) -> str:
    """A ratio of medians."""
    return "-" if found is None else f"{found['median']:.2f}"


def kernels(row: Result) -> str:
    """By which kernels calls were served."""
    return ", ".join(sorted(row.get("kernels", {}))) or "-"


def machine_block(found: Result) -> str:
    """What it was measured on, and what went wrong."""
    machine, lines = found["machine"], []
    lines.append(
        f"{machine['gpu']}: {human_bytes(machine['gpu_bytes'])}, {machine['multiprocessors']} multiprocessors, "
        f"{human_bytes(machine['l2_bytes'])} of second-level cache."
    )
    problems = [f"{name}: {words}" for name, part in found["parts"].items() for words in part.get("problems", [])]
    lines += ["Checks that failed in this run:", *(f"- {words}" for words in problems)] if problems else ["All checks passed."]
    return "\n\n".join([lines[0], "\n".join(lines[1:]), provenance(found)])


def attention_block(part: Result) -> str:
    """The fast path beside the fastest dense attention, by context."""
    rows = []
    for row in part["rows"]:
        if "failed" in row or not (row["fastest_dense"] or "fast_share" in row):
            continue
        cells = [f"{row['context']:,}", row["system"], micro(row["seconds"]), ratio(row["over_dense"])]
        cells += [f"{row['bytes_per_second']['median'] / 1e9:,.0f}", share(row["share_of_copy"])]
        cells += [f"{1e6 * row['warm_seconds']['median']:.1f}", f"{1e6 * row['eager_seconds']['median']:.1f}"]
        cells += [share(row["fast_share"]) if "fast_share" in row else "-", kernels(row), row["way"].split(":")[0]]
        rows.append(cells)
    header = (
        "tokens", "system", "µs a call, median (quartiles)", "of the fastest dense", "GB/s of cache bytes", "of a copy's",
        "µs, warm", "µs, eager", "fast path", "kernel", "how",
    )  # fmt: skip
    first = next(row for row in part["rows"] if "layers" in row)
    copies = sorted({round(row["copy_bytes_per_second"]["median"] / 1e9) for row in part["rows"]})
    words = (
        "32 query heads, 8 KV heads of 128 channels, one request, bfloat16. Several layers in rotation, together at least "
        f"{part['caches_over_l2']} times the second-level cache ({first['layers']} layers at {first['context']:,} tokens); "
        "warm: one layer again and again; eager: as Python makes the calls. A copy from device memory to device memory reads "
        f"and writes {' to '.join(f'{one:,}' for one in dict.fromkeys((copies[0], copies[-1])))} GB/s in all."
    )
    return f"{table(header, rows)}\n\n{words}"


def dense_block(part: Result) -> str:
    """All ways of dense attention that were tried."""
    contexts = sorted({row["context"] for row in part["rows"]})
    names = dict.fromkeys(row["system"] for row in part["rows"] if row["system"].startswith("dense"))
    rows = []
    for name in names:
        mine = {row["context"]: row for row in part["rows"] if row["system"] == name}
        cells = []
        for context in contexts:
            row = mine.get(context, {})
            cells.append(f"{1e6 * row['seconds']['median']:.1f}" if "seconds" in row else "does not take it")
        rows.append([name, *cells])
    return table(["dense attention, µs a call, median", *(f"{context:,}" for context in contexts)], rows)


def costs_block(part: Result) -> str:
    """What leaving the fast path costs."""
    rows = []
    for found in part["contexts"]:
        for key, words, unit in (
            ("pinned", "a promoted page, from pinned host memory", "all_pages"),
            ("hot", "a promoted page that is hot", "all_pages"),
            ("dense_heads", "a KV head served densely", "heads"),
        ):
            if key not in found:
                continue
            line, points = found[key]["line"], found[key]["points"]
            cells = [f"{found['context']:,}", words, number(_scaled(line["each_seconds"]))]
            cells += [number(_scaled(line["fixed_seconds"])), number(_scaled(line["worst_residual"])), str(line["points"])]
            cells += [f"{1e6 * points[0]['seconds']['median']:.1f}", f"{1e6 * points[0]['dense_seconds']['median']:.1f}"]
            even = found[key]["break_even_share"]
            rows.append([*cells, "none" if even is None else f"{share(even)} of {found[key][unit]:,}"])
    header = (
        "tokens", "what", "µs each", "µs once", "worst residual, µs", "points", "fast path, µs", "dense, µs", "break even at",
    )  # fmt: skip
    words = "A block has two pages, its keys and its values. The line is fitted to the points that left the fast path."
    return f"{table(header, rows)}\n\n{words}"


def _scaled(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds


def decode_block(part: Result) -> str:
    """A decode step of a whole model, and what the caches take."""
    rows = []
    for row in part["rows"]:
        cells = [f"{row['context']:,}", row["system"], milli(row["seconds"]), ratio(row["over_DynamicCache"])]
        cells += [ratio(row["over_dense, in place"]), milli(row["device_seconds"]), milli(row.get("block_step_seconds"))]
        cells += [human_bytes(row["allocated_bytes"] or row["device_bytes"]), human_bytes(row["host_bytes"])]
        rows.append([*cells, share(row["fast_share"]) if "fast_share" in row else "-", kernels(row)])
    header = (
        "tokens", "cache", "ms a step, median", "of DynamicCache", "of dense in place", "of it kernels, ms",
        "a step that finishes a block, ms", "device", "host", "fast path", "kernel",
    )  # fmt: skip
    model = part["model"]
    words = (
        f"A Llama of {model.get('num_hidden_layers', 32)} layers, hidden width "
        f"{model.get('hidden_size')}, random weights, bfloat16, one request; called from Python, no graph. DynamicCache copies "
        "all keys and values at each step; `dense, in place` does not. Device: bytes allocated while the cache was filled."
    )
    return f"{table(header, rows)}\n\n{words}"


def long_block(part: Result) -> str:
    """The longest request."""
    rows = []
    for row in part["rows"]:
        wide = row["extrapolated"]
        cells = [row["system"], str(row["layers"]), milli(row["seconds"]), human_bytes(row["allocated_bytes"] or 0)]
        cells += [milli(wide["seconds"]), human_bytes(wide["allocated_bytes"] or 0)]
        rows.append([*cells, "-" if wide["host_bytes"] is None else human_bytes(wide["host_bytes"])])
    if not rows:
        return MISSING
    layers = part["rows"][0]["extrapolated"]["layers"]
    header = (
        "cache", "layers", "ms a step", "device", f"extrapolated to {layers} layers: ms a step", "extrapolated: device",
        "extrapolated: host",
    )  # fmt: skip
    words = f"{part['tokens']:,} tokens, one request. Layers were added until: {part['stopped_by']}."
    return f"{table(header, rows)}\n\n{words}" + (f" {part['dense']}." if "dense" in part else "")


def exp_block(part: Result) -> str:
    """The elementary functions."""
    single, wide = part["exp32"], part["float64"]
    rows = [["exp, float32", f"all {single['patterns']:,} of {single['of']:,}", f"{single['over_unit']:.3f} u (allowed: 4 u)"]]
    for name, words in (("exp64", "exp, float64"), ("expm1_64", "expm1, float64")):
        rows.append(
            [words, f"{wide['points']:,} at random", f"{number(wide[name]['largest_relative_error'])} (allowed: 2^-46)"]
        )
    return table(("function of the kernels, on the device", "numbers", "largest relative error"), rows)


# What a block is called in the document, what makes it, and the part it is made from; None: from everything.
BLOCKS: dict[str, tuple[Callable[[Result], str], str | None]] = {
    "gpu-machine": (machine_block, None),
    "gpu-attention": (attention_block, "attention"),
    "gpu-dense": (dense_block, "attention"),
    "gpu-costs": (costs_block, "costs"),
    "gpu-decode": (decode_block, "decode"),
    "gpu-long": (long_block, "long"),
    "gpu-exp": (exp_block, "exp"),
}


def blocks(found: Result | None) -> dict[str, str]:
    """The text of every block."""
    if found is None or found["machine"].get("device") != "cuda":
        return dict.fromkeys(BLOCKS, NONE)
    out = {}
    for name, (make, needed) in BLOCKS.items():
        part = found if needed is None else found["parts"].get(needed)
        try:
            out[name] = MISSING if part is None else make(part)
        except (KeyError, StopIteration):  # the part ended before it had measured that
            out[name] = MISSING
    return out


def write(page: Path = DOCUMENT, found: Result | None = None) -> None:
    """Fill all blocks that the document has."""
    for name, text in blocks(found).items():
        fill(page, name, text)


def together(files: list[Path]) -> Result:
    """Results of several calls of `gpu.sh` as one: of each part the last, of one commit and one kind of device.

    Raises: ValueError: the files are of different commits or devices.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    kinds = {tuple(one["machine"].get(name) for name in ("commit", "device", "gpu", "torch", "triton")) for one in found}
    if len(kinds) != 1:
        raise ValueError(
            f"{', '.join(str(path) for path in files)}: expected one commit, device, torch and triton, got {kinds}."
        )
    return {"parts": {name: part for one in found for name, part in one["parts"].items()}, "machine": found[-1]["machine"]}


def main(
    page: Annotated[Path, typer.Option(help="the document")] = DOCUMENT,
    take: Annotated[
        list[Path] | None, typer.Option(help="gpu.json files to make benchmarks/results/gpu.json of before")
    ] = None,
) -> None:
    """Fill the document."""
    if take:
        (RESULTS / "gpu.json").write_text(json.dumps(together(take), indent=1) + "\n", encoding="utf-8")
    write(page, load("gpu"))


if __name__ == "__main__":
    typer.run(main)
