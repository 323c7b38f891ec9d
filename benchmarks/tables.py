"""`docs/measurements.md` and the README's figures, from the committed results. Nothing here is typed in by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "measurements.md"
README = ROOT / "README.md"
Rows = Iterable[Iterable[str]]


def load(name: str) -> dict[str, Any] | None:
    """One committed result, or None where it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(header: Iterable[str], rows: Rows) -> str:
    """A Markdown table."""
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join("---" for _ in names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def provenance(result: dict[str, Any]) -> str:
    """One line: machine, versions, commit."""
    machine = result["machine"]
    return (
        f"*{machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}, transformers "
        f"{machine['transformers']}, commit {machine['commit'][:10]}, {machine['date']}.*"
    )


def share(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """Three significant digits; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.3g}"


def kib(value: float) -> str:
    """Bytes in KiB."""
    return f"{value / 1024:.0f} KiB"


def rungs(shares: dict[str, float]) -> tuple[str, str, str]:
    """Shares of the fast path, of raised and of dense head-steps."""
    raised, dense = shares["keys"] + shares["values"], shares["dense_head"] + shares["dense_layer"]
    return share(shares["fast"] + shares["uncertified"]), share(raised), share(dense)


def greedy_table(result: dict[str, Any], dtype: str) -> str:
    """Greedy agreement of one dtype."""
    rows = []
    for run in (run for run in result["runs"] if run["dtype"] == dtype):
        cells = [run["name"], share(run["tokens_equal"]), share(run["continuations_equal"])]
        cells.append(f"{run['tokens_until_difference']:.1f}")
        if "rung_share" in run:
            cells += [*rungs(run["rung_share"]), kib(run["host_bytes_per_token"])]
        else:
            cells += ["-"] * 4
        rows.append(cells)
    header = (
        "run",
        "tokens equal",
        "continuations equal",
        "tokens until a difference",
        "fast",
        "raised",
        "dense",
        "host → device a token",
    )
    return table(header, rows)


def memory_table(result: dict[str, Any]) -> str:
    """Device bytes over dense by context and format."""
    rows = [
        [
            run["name"],
            f"{run['tokens']:,}",
            f"{run['device_over_dense']:.3f}",
            f"{run['host_bytes'] / run['dense_bytes']:.2f}",
            number(run.get("prefill_peak_above_cache_over_dense_layer")),
        ]
        for run in result["runs"]
    ]
    return table(
        ("format", "tokens", "device / dense bf16", "host / dense bf16", "prefill peak above the cache / dense layer"), rows
    )


def format_table(result: dict[str, Any]) -> str:
    """Fast-path figures of every shape."""
    rows = [
        [
            f"V{line['value_bits']}, {'one scale a token' if line['value_group'] == 0 else 'g = ' + str(line['value_group'])}",
            str(line["block_size"]),
            " / ".join(number(line[f"bound_{name}"]) for name in ("p50", "p90", "p99")),
            " / ".join(f"{value:.2f}" for value in line["fast_share"].values()),
            number(line["error_p50"]),
            number(line["tightness_p50"]),
            f"{line['device_over_dense_refine_off']:.3f} / {line['device_over_dense_refine_device']:.3f}",
        ]
        for line in result["formats"]
    ]
    header = (
        "values",
        "block",
        "bound: median / 90 % / 99 %",
        "fast path within 2 / 5 / 10 %",
        "true error, median",
        "bound / error, median",
        "device / dense: no planes / planes on it",
    )
    return table(header, rows)


def refinement_table(result: dict[str, Any]) -> str:
    """Traffic and rungs by refinement and tolerance."""
    rows = [
        [
            f"V{line['value_bits']}",
            line["refine"],
            f"{line['rtol']}",
            *rungs(line["rung_share"]),
            share(line["moved_over_originals"]),
            f"{line['device_over_dense']:.3f}",
        ]
        for line in result["refinement"]
    ]
    header = ("values", "refine", "rtol", "fast", "raised", "dense", "host → device a step / originals", "device / dense")
    return table(header, rows)


def audit_table(result: dict[str, Any]) -> str:
    """One line a format and model."""
    rows = []
    for run in result["runs"]:
        settings, relative = run["settings"], run["relative"]
        rows.append(
            [
                f"{run['model']}, {run['tokens']:,}",
                f"V{settings['value_bits']}, block {settings['block_size']}, refine {settings['refine']}",
                f"{run['head_steps']:,}",
                str(run["violations"]),
                *rungs(run["rung_share"]),
                number((relative["candidate"] or {}).get("p50")),
                number((relative["bound"] or {}).get("p50")),
                number((relative["error"] or {}).get("p50")),
                number((relative["tightness"] or {}).get("p50")),
            ]
        )
    header = (
        "model, tokens",
        "format",
        "head-steps",
        "violations",
        "fast",
        "raised",
        "dense",
        "fast-path bound",
        "returned bound",
        "true error",
        "bound / error",
    )
    return table(header, rows)


def shape_of(run: dict[str, Any]) -> str:
    """Model and format of a run of `tightness`."""
    return f"{run['model']}, V{run['value_bits']}, block {run['block_size']}"


def change(before: float | None, after: float | None) -> str:
    """Two figures, before and after."""
    return "-" if before is None or after is None else f"{number(before)} → {number(after)}"


def ratio(run: dict[str, Any], part: str) -> float | None:
    """Median of bound / error of a part of the certified head-steps; None where there are too few for a median."""
    return run["ratio"][part] if run["certified"] >= 40 else None


def paired(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Runs of `tightness` with the same model and settings."""
    names = ("model", "value_bits", "block_size", "policy", "rtol", "refine")
    old = {tuple(run[name] for name in names): run for run in before["runs"]}
    both = ((old.get(tuple(run[name] for name in names)), run) for run in after["runs"])
    return [(first, second) for first, second in both if first is not None]


def tightness_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Bound / error of each part with nothing promoted."""
    rows = [
        [
            shape_of(new),
            *(change(ratio(old, part), ratio(new, part)) for part in ("key", "value", "rounding", "total")),
            change(old["bound"]["total"], new["bound"]["total"]),
        ]
        for old, new in paired(before, after)
        if new["policy"] == "naive"
    ]
    return table(("model, format", "keys", "values", "rounding", "overall", "bound"), rows)


def traffic_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What is promoted at a tolerance, and bound / error of what is served."""
    rows = [
        [
            f"{shape_of(new)}, refine {new['refine']}",
            str(new["rtol"]),
            f"{kib(old['host_bytes_per_token'])} → {kib(new['host_bytes_per_token'])}",
            f"{share(old['rung_share']['fast'])} → {share(new['rung_share']['fast'])}",
            *(change(ratio(old, part), ratio(new, part)) for part in ("key", "value", "total")),
        ]
        for old, new in paired(before, after)
        if new["policy"] == "budget" and new["block_size"] == 64
    ]
    header = ("model, format", "rtol", "host → device a token", "fast", "keys", "values", "overall")
    return table(header, rows)


def tightness_section() -> list[str]:
    """How tight the bound is, before and after the means of steps and distances; nothing where either was not measured."""
    before, after = load("tightness_before"), load("tightness")
    if not before or not after:
        return []
    return [
        f"## How tight the bound is\n\nMedians of bound / true error by part, {after['tokens']:,} tokens, bfloat16, nothing "
        "promoted; the last column is the bound over the output's norm. Before → after: the largest residual and radius of a "
        "block, and means over its tokens instead (certificate, sections 3 and 4), which take no storage.\n\n"
        f"{tightness_table(before, after)}\n\nKeys dominate what is left, above all beside 8-bit values. Their error is a sum "
        "over tokens of score errors of random sign, in directions that differ; the bound must hold for the worst query. Of "
        "the ratio, about √n + √d is the spectral norm of n by d residuals against one typical product; the rest is that "
        "blocks are added up by the triangle inequality. What is served at a tolerance, blocks of 64:\n\n"
        f"{traffic_table(before, after)}\n\n{provenance(after)}"
    ]


def sections() -> list[str]:
    """The document, part by part; what was not measured is left out."""
    parts = [
        "# Measurements\n\nWritten by `python -m benchmarks.measure` from `benchmarks/results/*.json`. Bounds and errors are "
        "shares of the output's L2 norm. Head-steps: query heads times decoded tokens. All runs are on the two embedded "
        "models; nothing is claimed of others, and nothing here is about speed."
    ]
    memory, formats, greedy, audit = (load(name) for name in ("memory", "formats", "greedy", "audit"))
    if memory:
        parts.append(
            f"## Memory\n\nHead size {memory['head_dim']}, {memory['kv_heads']} KV heads, batch 1, bf16, after a prefill; "
            f"every byte that is allocated is counted. The last column counts all that the cache allocates while it is "
            f"filled, but not the keys and values that the model hands over.\n\n{memory_table(memory)}\n\n{provenance(memory)}"
        )
    if formats:
        parts.append(
            "## What the defaults were chosen from\n\nThe prose model at "
            f"{formats['tokens']:,} tokens of a book it was not trained on, every step kept on the fast path.\n\n"
            f"{format_table(formats)}\n\nWhat a tolerance costs, blocks of 64, by where the refinement planes are:\n\n"
            f"{refinement_table(formats)}\n\n{provenance(formats)}\n\n{choice_of_defaults()}"
        )
    if greedy:
        parts.append(
            f"## Greedy tokens\n\n{greedy['prompts']} passages of {greedy['prompt_tokens']:,} tokens of a held-out book, "
            f"continued by {greedy['new_tokens']} tokens by the prose model, compared with `DynamicCache`, in float32:\n\n"
            f"{greedy_table(greedy, 'torch.float32')}\n\nIn bfloat16 the comparison says little of any cache: the control, the "
            "dense cache with the same arithmetic in another order, already differs about as much.\n\n"
            f"{greedy_table(greedy, 'torch.bfloat16')}\n\n{provenance(greedy)}"
        )
    if audit:
        violations = sum(run["violations"] for run in audit["runs"])
        parts.append(
            f"## Audit\n\nEvery returned output against float64 attention over the originals, rtol {audit['rtol']}: "
            f"**{audit['head_steps']:,} head-steps, {violations} violations**. Medians; bound / error over certified outputs "
            f"only.\n\n{audit_table(audit)}\n\n{provenance(audit)}"
        )
    return parts + tightness_section()


def choice_of_defaults() -> str:
    """Why the defaults are what they are, in words; the figures are the tables' above."""
    return (
        "The defaults follow from these tables and the ones below. **rtol 0.02**: more than nine in ten greedy tokens in "
        "float32 equal the dense cache's, with a margin that 0.05 does not leave. **Blocks of 64**: larger "
        "ones leave more of a short "
        "context exact and promote more bytes at a time; at 16 tokens the key scales alone cost 32 bytes a token. "
        "**Value groups of 32**: groups of 16 buy little for their bytes; at 64 the bound is a little wider. "
        "**Refinement planes on the host**: they cut what a promotion moves to a quarter and cost no device memory; on the "
        "device they save the traffic and cost a quarter of the dense cache."
    )


def readme_figures() -> dict[str, str]:
    """The README's generated parts by their marker."""
    memory, audit = (load(name) for name in ("memory", "audit"))
    figures: dict[str, str] = {}
    if audit and memory:
        at = {run["name"]: run for run in memory["runs"] if run["tokens"] == max(r["tokens"] for r in memory["runs"])}
        violations = sum(run["violations"] for run in audit["runs"])
        device = at["K8 V4 (default)"]
        figures["results"] = (
            f"Audited against float64 attention: {audit['head_steps']:,} head-steps over all formats, {violations} violations. "
            f"Device bytes of the default format, everything counted: {device['device_over_dense']:.2f} of a dense bf16 cache "
            f"at {device['tokens']:,} tokens (head size {memory['head_dim']}). How the defaults were chosen: "
            "[docs/measurements.md](docs/measurements.md)."
        )
    return figures


def fill(path: Path, name: str, part: str) -> None:
    """Put a generated part between `<!-- name -->` and `<!-- /name -->` of a document."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    path.write_text(pattern.sub(lambda found: f"{found[1]}{part}\n{found[2]}", text), encoding="utf-8")


def write() -> None:
    """Write the document, and the README's generated parts."""
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text("\n\n".join(sections()) + "\n", encoding="utf-8")
    for name, part in readme_figures().items():
        fill(README, name, part)
