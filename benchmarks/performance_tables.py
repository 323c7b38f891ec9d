"""The figures of `docs/performance.md`, from the committed results and from `benchmarks/costs.py`. None is typed in by hand.

Blocks whose result does not exist yet are left as they are, named, and make the exit status 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import costs
from benchmarks.tables import ROOT, fill, load, number, provenance, table
from hf_certkv.bench import report
from hf_certkv.report import human_bytes

DOCUMENT = ROOT / "docs" / "performance.md"
SHIPPED, PASS, CERTIFICATE = "shipped: certified call", "shipped: numba call alone", "shipped: certificate alone"
FAST = "fast path K8 V4"
Result = dict[str, Any]


def _from(found: Result) -> str:
    """Where it was measured, with all numbers of threads."""
    threads = sorted({row["threads"] for row in found["rows"]})
    return provenance({"machine": {**found["machine"], "threads": " and ".join(str(one) for one in threads)}})


def bytes_table() -> str:
    """Bytes for a token and KV head."""
    eight, scratch = costs.coded_bytes(8), costs.scratch_bytes()
    rows = [[name, f"{size:.1f}", f"{eight[name]:.1f}"] for name, size in costs.coded_bytes().items()]
    rows.append(["**read from the cache**", *(f"**{sum(costs.coded_bytes(bits).values()):.1f}**" for bits in (4, 8))])
    rows += [[f"scratch: {name}", f"{size:.1f}", f"{size:.1f}"] for name, size in scratch.items()]
    rows.append(["dense bf16 / float32", *[f"{costs.dense_bytes(2):.0f} / {costs.dense_bytes(4):.0f}"] * 2])
    return table(("bytes for a token and KV head", "K8 V4", "K8 V8"), rows)


def operations_table() -> str:
    """Vector operations for a token and KV head."""
    ways = costs.coded_operations(), costs.integer_operations()
    rows = []
    for name in dict.fromkeys([*ways[0], *ways[1]]):
        rows.append([name, *(f"{way[name]:.1f}" if name in way else "" for way in ways)])
    rows.append(["**K8 V4, all**", *(f"**{sum(way.values()):.0f}**" for way in ways)])
    for name, width in (("dense bf16, at least", 2), ("dense float32, at least", 4)):
        rows.append([name, f"{sum(costs.dense_operations(width).values()):.0f}", ""])
    return table(("operations on 64-byte vectors, for a token and KV head", "codes as floats", "codes as integers"), rows)


def bandwidth_table(found: Result) -> str:
    """Read bandwidth by size and threads."""
    rows = [
        [human_bytes(row["bytes"]), str(row["threads"]), row["way"], *(_rate(row, key) for key in ("median", "max"))]
        for row in found["rows"]
    ]
    caches = ", ".join(f"{name} {size}" for name, size in found["caches"].items()) or "not told by the system"
    words = f"Caches: {caches}. Load average before: {found['load'][0]:.1f}." if found["load"] else f"Caches: {caches}."
    header = ("array", "threads", "way", "GB/s read, median", "best")
    return "\n\n".join([table(header, rows), words, _from(found)])


def _rate(row: Result, key: str) -> str:
    return f"{row['bytes_per_second'][key] / 1e9:.1f}"


def bandwidth_for(found: Result, size: float, threads: int) -> float:
    """The best rate seen over arrays of at least so many bytes (or the largest), in bytes a second."""
    sizes = sorted({row["bytes"] for row in found["rows"] if row["threads"] == threads})
    fitting = next((one for one in sizes if one >= size), sizes[-1])
    return float(
        max(row["bytes_per_second"]["max"] for row in found["rows"] if (row["bytes"], row["threads"]) == (fitting, threads))
    )


def candidates_table(found: Result) -> str:
    """Every candidate at every place: milliseconds, and the ratios to dense attention."""
    places = _places(found)
    rows = []
    for name in dict.fromkeys(row["candidate"] for row in found["rows"]):
        mine = {(row["tokens"], row["threads"]): row for row in found["rows"] if row["candidate"] == name}
        first = next(iter(mine.values()))
        cells = [f"{_ms(mine[place])} ({_of(mine[place])})" if place in mine else "-" for place in places]
        rows.append([name, first["work"], *cells])
    header = ["candidate", "does", *(f"{tokens:,}, {threads} thr." for tokens, threads in places)]
    loads = ", ".join(f"{one['tokens']:,} x {one['threads']}: {one['load']:.1f}" for one in found.get("loads", []))
    words = (
        "Milliseconds, medians (over the fastest dense bf16 / over the fastest dense float32, medians of the same run). "
        f"{found['query_heads']} query heads, {found['kv_heads']} KV heads of {found['channels']} channels. "
        + (f"Load averages before: {loads}." if loads else "")
    )
    return "\n\n".join([table(header, rows), words.strip(), _from(found)])


def _places(found: Result) -> list[tuple[int, int]]:
    return sorted({(row["tokens"], row["threads"]) for row in found["rows"]}, key=lambda place: (place[1], place[0]))


def _ms(row: Result) -> str:
    return f"{1e3 * row['seconds']['median']:.3g}"


def _of(row: Result) -> str:
    return f"{row['over_bf16']['median']:.2f} / {row['over_fp32']['median']:.2f}"


def products_table(found: Result) -> str:
    """What products of low precision would add to the error."""
    rows = []
    for row in found["rows"]:
        if "added" in row and row["threads"] == 1:
            added = row["added"]
            if isinstance(added, dict):
                cells = [f"{number(row['error']['max'])} of the output", f"{number(added['max'])} of the output"]
            else:
                cells = [f"{number(row['score_error'])} in a score", f"{number(added)} in a score"]
            rows.append([row["candidate"], f"{row['tokens']:,}", *cells])
    return table(("product", "tokens", "largest error", "of it by the product alone"), rows)


def floor_table(found: Result, memory: Result) -> str:
    """How far each way is from reading its bytes once."""
    rows = []
    coded, dense = sum(costs.coded_bytes().values()), {2: costs.dense_bytes(2), 4: costs.dense_bytes(4)}
    kinds = {PASS: coded, SHIPPED: coded, "dense bf16, packed": dense[2], "dense fp32, packed": dense[4]}
    kinds |= {row["candidate"]: coded for row in found["rows"] if row["candidate"].startswith("C loops")}
    for tokens, threads in _places(found):
        for row in found["rows"]:
            if (row["tokens"], row["threads"]) != (tokens, threads) or row["candidate"] not in kinds:
                continue
            size = kinds[row["candidate"]] * tokens * found["kv_heads"]
            floor = size / bandwidth_for(memory, size, threads)
            best = row["seconds"]["min"]
            cells = [human_bytes(size), f"{1e3 * floor:.3g}", f"{1e3 * best:.3g}", f"{best / floor:.1f}"]
            rows.append([f"{tokens:,}", str(threads), row["candidate"], *cells, f"{size / best / 1e9:.1f}"])
    header = ("tokens", "threads", "way", "reads", "floor, ms", "best, ms", "times the floor", "GB/s")
    return table(header, rows)


def certificate_line(found: Result) -> str:
    """The certificate's share of the numba call."""
    rows = []
    for tokens, threads in _places(found):
        times = {
            row["candidate"]: row["seconds"] for row in found["rows"] if (row["tokens"], row["threads"]) == (tokens, threads)
        }
        share = [f"{100 * times[CERTIFICATE][key] / times[PASS][key]:.1f} %" for key in ("min", "median")]
        around = times[SHIPPED]["min"] - times[PASS]["min"]
        rows.append([f"{tokens:,}", str(threads), f"{1e3 * times[CERTIFICATE]['min']:.3g}", *share, f"{1e3 * around:.2f}"])
    header = ("tokens", "threads", "certificate, ms", "of the numba call, minima", "medians", "Python around it, ms")
    return table(header, rows)


def growth_table(bench: Result) -> str:
    """Exponents of the context, of the shape and trace that stand for all; docs/benchmarks.md has the others."""
    lines = (report.growth_table(bench) or "").splitlines()
    usual = [line for line in lines[2:] if "| 1x128 |" in line and ("| diffuse |" in line or "| - |" in line)]
    found = "\n".join([*lines[:2], *usual])
    return f"{found}\n\n{report.provenance(bench)}" if found else "One context only: no exponent."


def _usual(row: Result) -> bool:
    """Whether a row is of one batch row and 128 channels."""
    return row.get("head_dim", 128) == 128 and row.get("batch", 1) == 1


def tolerance_table(bench: Result) -> str:
    """What tolerances cost beside the fast path, on the same trace."""
    part = bench["parts"]["attention"]["rows"]
    rows = []
    for row in part:
        name = row["system"]
        if "seconds" not in row or not row.get("certified") or "fast_share" not in row or not _usual(row):
            continue
        place = ("context", "head_dim", "batch", "trace")
        base = next((one for one in part if one["system"] == FAST and all(one[key] == row[key] for key in place)), None)
        over = row["seconds"]["median"] / base["seconds"]["median"] if base and "seconds" in base else None
        cells = [*report.shape(row), row["trace"], name, f"{1e3 * row['seconds']['median']:.3g}", number(over)]
        cells += [report.share(row[key]) for key in ("fast_share", "raised_share", "dense_share")]
        rows.append([*cells, report.size(row["bytes_moved_per_call"])])
    header = ("tokens", "shape", "trace", "settings", "ms", f"of {FAST}", "fast", "raised", "dense", "moved a call")
    return f"{table(header, rows)}\n\n{report.provenance(bench)}"


def prefill_table(bench: Result) -> str:
    """Prefill times, of a run with more rounds than docs/benchmarks.md has: what disturbs is more than what a cache costs."""
    part = next(one for one in report.sections(bench) if one.key == "prefill")
    return f"{table(part.header, part.rows)}\n\n{report.provenance(bench)}"


def compiling_table(found: Result) -> str:
    """Seconds until kernels are there."""
    rows = []
    for row in found["rows"]:
        seconds, processor = row["seconds"], row["processor"]
        span = f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f})"
        rows.append([row["kernels"], row["part"], span, f"{processor['median']:.2f}"])
    header = ("kernels", "part", "seconds, median (and range)", "of the processor")
    return f"{table(header, rows)}\n\n{provenance(found)}"


# What a block is called in the document, what makes it, and from which results.
BLOCKS: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "bytes": (bytes_table, ()),
    "operations": (operations_table, ()),
    "bandwidth": (bandwidth_table, ("bandwidth",)),
    "candidates": (candidates_table, ("candidates",)),
    "products": (products_table, ("candidates",)),
    "floor": (floor_table, ("candidates", "bandwidth")),
    "certificate": (certificate_line, ("candidates",)),
    "compiling": (compiling_table, ("compiling",)),
    "growth": (growth_table, ("bench",)),
    "tolerance": (tolerance_table, ("bench",)),
    "prefill": (prefill_table, ("bench_prefill",)),
}


def write(page: Path = DOCUMENT, read: Callable[[str], Result | None] = load) -> list[str]:
    """Fill all blocks whose results are there. Returns what is missing."""
    missing = []
    for name, (make, needed) in BLOCKS.items():
        results = [read(one) for one in needed]
        if any(one is None for one in results):
            missing += [f"block {name}: no {one}.json" for one, found in zip(needed, results, strict=True) if found is None]
            continue
        fill(page, name, make(*results))
    return missing


def main(page: Annotated[Path, typer.Option(help="the document")] = DOCUMENT) -> None:
    """Fill the document."""
    missing = write(page)
    for line in missing:
        print(line)
    raise typer.Exit(1 if missing else 0)


if __name__ == "__main__":
    typer.run(main)
