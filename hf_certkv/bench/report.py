"""From a run's JSON to tables: `document` as Markdown, `speed_block` for the README. Nothing here is typed in by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..report import human_bytes
from .systems import DYNAMIC

Result = dict[str, Any]
Row = dict[str, Any]
TITLES = {
    "attention": "Attention alone",
    "layer": "One layer's step: update and attention",
    "decode": "Decode step of a model",
    "prefill": "Prefill",
    "memory": "Memory",
    "quality": "The embedded models",
    "long": "A long context",
}
WORDS = {
    "attention": "One query token on a cache of one layer. Ratios are to torch's faster way of dense attention (grouped heads, "
    "or KV heads repeated beforehand) on the same tokens. The certificate is included; cert.: its share of the call, where the "
    "kernel tells.",
    "layer": "What a layer does at a step, for every system: it takes one more token and attends to all. The error is that of "
    "the first step, against float64 attention over the originals.",
    "decode": "A Llama of a few layers in bfloat16, with random weights and the heads of a large model.",
    "prefill": "One forward pass over the whole prompt into an empty cache.",
    "memory": "Each system in a process of its own. Planned: what `certkv plan` says. Resident: what the process grew by; its "
    "peak has the handed-over keys and values of one layer in it.",
    "quality": "Real prompts. Times are of a decode step. Bound, error and shares are from a second pass that compares every "
    "output with float64 attention.",
    "long": "One layer, synthetic keys and values, each system in a process of its own.",
}


@dataclass(frozen=True)
class Part:
    """A table: its first `left` columns are text."""

    key: str
    title: str
    header: list[str]
    rows: list[list[str]]
    left: int


def milliseconds(row: Row) -> str:
    """Median (quartiles)."""
    found = row.get("seconds")
    if not found:
        return "failed" if "failed" in row else "-"
    return f"{1e3 * found['median']:.3g} ({1e3 * found['q1']:.3g} to {1e3 * found['q3']:.3g})"


def ratio(found: dict[str, float] | None) -> str:
    """A ratio of medians (quartiles of the rounds' ratios)."""
    return "-" if not found else f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f})"


def without_spread(cell: str) -> str:
    """The median alone, where a line has to fit a terminal."""
    return cell.split(" (", 1)[0] if cell.endswith(")") and " to " in cell else cell


def share(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def figure(value: Any, key: str = "median") -> str:
    """Three significant digits of a number, or of one figure of a summary."""
    if isinstance(value, dict):
        value = value.get(key)
    return "-" if value is None else f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes, or a dash."""
    return "-" if value is None else human_bytes(value)


def shape(row: Row) -> list[str]:
    """The columns that say what was measured: tokens; rows x channels."""
    return [f"{row['context']:,}", f"{row['batch']}x{row['head_dim']}"]


def _attention(row: Row) -> list[str]:
    cells = [*shape(row), row["trace"], row["system"], milliseconds(row), ratio(row["over_bf16"]), ratio(row["over_fp32"])]
    cells += [share(row.get("fast_share")), share(row.get("certificate_share")), size(row.get("bytes_moved_per_call"))]
    return [*cells, figure(row.get("bound"), "p50"), figure(row["error"])]


def _layer(row: Row) -> list[str]:
    errors = row.get("error")
    return [*shape(row), row["trace"], row["system"], milliseconds(row), ratio(row.get("over_dense")), figure(errors),
            figure(errors, "max")]  # fmt: skip


def _decode(row: Row) -> list[str]:
    return [*shape(row), row["system"], milliseconds(row), ratio(row.get("over_dense")), share(row.get("fast_share")),
            size(row.get("bytes_moved_per_call")), figure(row.get("bound"), "p50")]  # fmt: skip


def _prefill(row: Row) -> list[str]:
    return [*shape(row), row["system"], milliseconds(row), ratio(row.get("over_dense"))]


def _memory(row: Row) -> list[str]:
    counted, plan = row.get("counted") or {}, row.get("predicted") or {}
    device = counted.get("device_bytes")
    cells = [*shape(row), row["system"], size(plan.get("device_bytes")), size(device)]
    cells += ["-" if device is None else f"{device / row['dense_bytes']:.3f}", size(plan.get("host_bytes"))]
    cells += [size(counted.get("host_bytes")), size(row.get("resident_bytes")), size(row.get("peak_above_before_bytes"))]
    return [*cells, figure(row.get("fill_seconds")), "-" if "step_seconds" not in row else f"{1e3 * row['step_seconds']:.3g}"]


def _quality(row: Row) -> list[str]:
    return [row["model"], f"{row['context']:,}", row["system"], milliseconds(row), ratio(row.get("over_dense")),
            share(row.get("fast_share")), share(row.get("dense_share")), size(row.get("bytes_moved_per_call")),
            figure(row.get("bound"), "p50"), figure(row.get("audited_error"), "p50"),
            figure(row.get("bound_over_error"), "p50")]  # fmt: skip


_PLACE = ["tokens", "shape"]
_MEMORY = [*_PLACE, "system", "device: planned", "counted", "of dense", "host: planned", "counted", "resident", "its peak",
           "fill, s", "step, ms"]  # fmt: skip
_TABLES = {
    "attention": (_attention, [*_PLACE, "trace", "system", "ms", "of bf16", "of fp32", "fast path", "cert.",
                               "moved a call", "bound", "true error"], 4),
    "layer": (_layer, [*_PLACE, "trace", "system", "ms", "of DynamicCache", "true error", "largest"], 4),
    "decode": (_decode, [*_PLACE, "system", "ms", "of DynamicCache", "fast path", "moved a layer", "bound"], 3),
    "prefill": (_prefill, [*_PLACE, "system", "ms", "of DynamicCache"], 3),
    "memory": (_memory, _MEMORY, 3),
    "quality": (_quality, ["model", "tokens", "system", "ms", "of DynamicCache", "fast path", "dense", "moved a layer", "bound",
                           "true error", "bound / error"], 3),
    "long": (_memory, _MEMORY, 3),
}  # fmt: skip


def sections(result: Result) -> list[Part]:
    """The tables of all parts that were measured."""
    out = []
    for key, (cells, header, left) in _TABLES.items():
        part = result["parts"].get(key)
        if part and part["rows"]:
            out.append(Part(key, TITLES[key], list(header), [cells(row) for row in part["rows"]], left))
    return out


def unavailable(result: Result) -> list[str]:
    """A line for each system that was not measured, each that failed on the way, and each shape that was left out."""
    lines = [f"not measured: {one['name']}: {one['reason']}" for one in result["systems"] if not one["available"]]
    for key, part in result["parts"].items():
        for row in part["rows"]:
            if "failed" in row:
                lines.append(f"failed in {key} at {row['context']:,} tokens: {row['system']}: {row['failed']}")
    for one in result["skipped"]:
        name = f"{one['system']}, " if "system" in one else ""
        lines.append(
            f"left out of {one['part']}: {name}{one['context']:,} tokens, {one['batch']} x {one['head_dim']}: {one['reason']}"
        )
    return lines


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join("---" for _ in names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def provenance(result: Result) -> str:
    """One line: machine, threads, versions, commit, date."""
    machine, options = result["machine"], result["options"]
    peers = [f"{one['package']} {one['version']}" for one in result["systems"] if one["version"]]
    parts = [
        machine["cpu"], *([machine["gpu"]] if options["device"] == "cuda" and "gpu" in machine else []),
        f"{machine['threads']} thread(s)", f"torch {machine['torch']}", f"transformers {machine['transformers']}", *peers,
        f"kernel {result['kernel']}", f"commit {(machine['commit'] or 'unknown')[:10]}", machine["date"],
    ]  # fmt: skip
    return f"*{', '.join(parts)}.*"


def traces_table(result: Result) -> str:
    """What the synthetic traces are, as measured on what was drawn."""
    rows = [
        [one["name"], *shape(one), figure(one["effective_tokens"]), share(one["top_share"]), figure(one["key_channel_ratio"]),
         figure(one["value_mean_ratio"])]
        for one in result["traces"]
    ]  # fmt: skip
    header = ["trace", *_PLACE, "attended tokens, exp(entropy)", "weight of the 64 heaviest",
              "largest / median key channel", "values: mean / spread"]  # fmt: skip
    return table(header, rows)


def growth_table(result: Result) -> str | None:
    """With which power of the context the times grow."""
    rows = [
        [TITLES[key], one["system"], one["trace"] or "-", f"{one['batch']}x{one['head_dim']}", f"{one['exponent']:.2f}",
         f"{min(one['contexts']):,} to {max(one['contexts']):,}"]
        for key, part in result["parts"].items()
        for one in part.get("growth", [])
    ]  # fmt: skip
    return table(["part", "system", "trace", _PLACE[1], "exponent", "tokens"], rows) if rows else None


def document(result: Result, plots: Iterable[str] = (), folder: str = "") -> str:
    """All tables as a Markdown page. plots: file names, which are shown from `folder`."""
    shown = {name.rsplit(".", 1)[0]: name for name in plots}
    written = (
        "Written by `certkv bench` from its JSON. Shape: rows of the batch x channels of a head. Spread: quartiles. Bounds and "
        "errors are shares of the output's L2 norm, medians over head-steps."
    )
    out = ["# Benchmarks", written]
    out.append("\n".join(f"- {note}" for note in result["notes"]))
    from .plots import QUESTIONS

    for section in sections(result):
        out += [f"## {section.title}", WORDS[section.key]]
        for name, question in QUESTIONS.items():
            if name in shown and question.part == section.key:
                out.append(f"![{question.title}]({folder}{shown[name]})")
        out.append(table(section.header, section.rows))
    if result["traces"]:
        out += ["## The synthetic traces", traces_table(result)]
    grown = growth_table(result)
    if grown:
        out += ["## Growth with the context", "Exponents of a straight line in log-log, medians.", grown]
    missing = unavailable(result)
    if missing:
        out += ["## Not measured", "\n".join(f"- {line}" for line in missing)]
    out += [
        "## Settings",
        table(["system", "settings"], [[one["name"], _settings(one["settings"])] for one in result["systems"]]),
    ]
    return "\n\n".join([*out, provenance(result)]) + "\n"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items() if not name.startswith("paper")) or "defaults"


def speed_block(result: Result, contexts: tuple[int, ...] = (8192, 32768)) -> str:
    """The README's table: decode step and attention over the dense ones, at some contexts of the first shape measured."""
    options = result["options"]
    first = (options["head_dims"][0], options["batches"][0])
    held = [context for context in contexts if context in options["contexts"]] or list(options["contexts"][-1:])
    names = [one["name"] for one in result["systems"] if one["available"]]
    rows = []
    for name in names:
        cells = [name]
        for key, ratio_key in (("decode", "over_dense"), ("attention", "over_bf16")):
            for context in held:
                cells.append(_ratio_at(result, key, ratio_key, name, context, first))
        cells.append(_fast_at(result, name, held[-1], first))
        rows.append(cells)
    header = ["cache", *(f"decode step, {context:,}" for context in held), *(f"attention, {context:,}" for context in held),
              "fast path"]  # fmt: skip
    words = (
        "Medians over those of `DynamicCache` (a decode step of a small Llama with 32 query heads and 8 KV heads) and of dense "
        "bfloat16 attention on the same tokens (certificate included), in one interleaved run; synthetic keys that nearly all "
        "count. All figures, their spread and how they were measured: [docs/benchmarks.md](docs/benchmarks.md)."
    )
    return "\n\n".join([table(header, rows), words, provenance(result)])


def _find(result: Result, key: str, name: str, context: int, first: tuple[int, int]) -> Row | None:
    for row in result["parts"].get(key, {}).get("rows", []):
        wanted = (row["head_dim"], row["batch"]) == first and row["context"] == context and row["system"] == name
        if wanted and row.get("trace", "diffuse") == "diffuse":
            return dict(row)
    return None


def _ratio_at(result: Result, key: str, ratio_key: str, name: str, context: int, first: tuple[int, int]) -> str:
    if (key, name) == ("attention", DYNAMIC):  # what a dense cache's attention is
        return "1.00" if any(row["context"] == context for row in result["parts"].get(key, {}).get("rows", [])) else "-"
    row = _find(result, key, name, context, first)
    return "-" if row is None or not row.get(ratio_key) else f"{row[ratio_key]['median']:.2f}"


def _fast_at(result: Result, name: str, context: int, first: tuple[int, int]) -> str:
    row = _find(result, "decode", name, context, first)
    return share(None if row is None else row.get("fast_share"))
