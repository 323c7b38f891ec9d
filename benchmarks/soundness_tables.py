"""The figures of docs/soundness.md, from the committed long runs. Nothing there is typed in by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import README, ROOT, fill, load, number, provenance, share, table

DOCUMENT = ROOT / "docs" / "soundness.md"


def figures() -> str:
    """The generated part, as far as there are results."""
    parts = [random_cases(), search(), real_traces(), arithmetic(), others()]
    return "\n\n".join(part for part in parts if part)


def random_cases() -> str:
    """Random decodes against the exact oracle, by format."""
    result = load("soundness_random")
    if result is None:
        return ""
    part = result["parts"]["fuzz"]
    found = part["figures"]
    rows = [
        [name, f"{found['head_steps_by']['format'][name]:,}", f"{largest['share']:.5f}"]
        for name, largest in found["largest_share_by_format"].items()
    ]
    dense = max((one["share"] for one in found["largest_share_of_dense_by_dtype"].values()), default=0.0)
    millions = part["checked"] // 10**6 * 10**6
    return (
        f"**Random decodes, exact oracle: {part['checked']:,} head-steps, {part['failed']} violations.** "
        f"{share(found['certified_share'])} were certified ({share(found['certified_and_tight_share'])} with an error above "
        f"a thousandth of their bound), {share(found['dense_share'])} dense, the rest the uncertified baseline, whose logged "
        "bounds must hold too. The largest error / bound of certified outputs is "
        f"{found['largest_error_over_bound']:.6f}; that of the bounds recorded for dense outputs {dense:.3f}.\n\n"
        + table(("values, block", "head-steps", "largest error / bound"), rows)
        + f"\n\n`certkv verify --only fuzz --head-steps {millions} --minutes 60`, seed {found['seed']}. {provenance(result)}"
    )


def search() -> str:
    """The adversary's closest approaches."""
    result = load("soundness_attacks")
    if result is None:
        return ""
    found = result["parts"]["search"]["figures"]
    rows = [[name, one["case"], f"{one['share']:.6f}"] for name, one in found["by_family"].items()]
    return (
        f"**Adversarial search: closest approach {found['largest_error_over_bound']:.8f} of the bound** "
        f"(`benchmarks/witnesses/closest.safetensors`), {found['evaluations']:,} calls judged, 0 violations. By the "
        "part of the bound that dominates:\n\n" + table(("family", "closest case", "error / bound"), rows)
    )


def real_traces() -> str:
    """How far the bound is from the error on real traces."""
    result = load("tightness")
    if result is None:
        return ""
    runs = [run for run in result["runs"] if run["policy"] == "naive"]
    names = ("key", "value", "rounding", "total")
    rows = [
        [f"{run['model']}, V{run['value_bits']}, block {run['block_size']}", *(number(run["ratio"][name]) for name in names)]
        for run in runs
    ]
    return (
        "**Real traces of the embedded models: bound / true error, medians by part**, every step kept on the fast path. "
        "Before and after, and what dominates: [measurements.md](measurements.md#how-tight-the-bound-is).\n\n"
        + table(("model, format", "keys", "values", "rounding", "together"), rows)
    )


def arithmetic() -> str:
    """The exhaustive check of `exp` and `tanh`."""
    result = load("rounding")
    if result is None:
        return ""
    found = result["figures"]
    chains = {name: max(kinds.values()) for name, kinds in found["chains_error_over_gamma"].items()}
    rows = [
        [
            "`exp`, relative, over all 2³² float32 inputs",
            f"{found['exp_error_u']:.4f} · 2⁻²⁴ ({found['exp_ulps']:.3f} ulp)",
            "4 · 2⁻²⁴",
        ],
        ["`tanh`, absolute, over all 2³² float32 inputs", f"{found['tanh_error_u']:.4f} · 2⁻²⁴", "8 · 2⁻²⁴"],
        *([f"sums and products: {name}", f"{worst:.4f} γₙ", "γₙ"] for name, worst in chains.items()),
    ]
    return (
        f"**Arithmetic of this machine: {result['checked']:,} comparisons, {result['failed']} failures.**\n\n"
        + table(("what", "largest error found", "assumed in the bound"), rows)
        + f"\n\n{provenance(result)}"
    )


def others() -> str:
    """Faults, relations, planted bugs."""
    attacks, every = load("soundness_attacks"), load("soundness_every_point")
    rows: list[list[str]] = []
    if attacks is not None:
        for name in ("bit flips", "failures", "relations", "planted bugs"):
            rows.append(_row(attacks["parts"][name]))
    if every is not None:
        for part in every["parts"].values():
            rows.append(_row(part, "one decode step, every point: "))
    if attacks is None or not rows:
        return ""
    planted = attacks["parts"]["planted bugs"]["figures"]
    return (
        f"**Faults, relations, planted bugs.** {planted['caught']} of {planted['planted']} planted bugs are caught. Branch "
        "coverage of `bounds.py`, `codecs.py`, `ladder.py` and `certificate.py` is 100 % (`make coverage` fails below).\n\n"
        + table(("part", "what holds", "checked", "failed"), rows)
        + f"\n\n{provenance(attacks)}"
    )


def _row(part: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        prefix + part["name"].replace("_", " "),
        part["claim"],
        f"{part['checked']:,} {part['unit']}",
        f"{part['failed']:,}",
    ]


def summary() -> str:
    """The README's paragraph."""
    random, attacks = load("soundness_random"), load("soundness_attacks")
    if random is None or attacks is None:
        return ""
    fuzz, parts = random["parts"]["fuzz"], attacks["parts"]
    planted = parts["planted bugs"]["figures"]
    return (
        f"In the longest run so far: {fuzz['checked']:,} head-steps against the exact oracle, {fuzz['failed']} violations, the "
        f"largest error {parts['search']['figures']['largest_error_over_bound']:.5f} of its bound; {planted['caught']} of "
        f"{planted['planted']} planted bugs caught; {parts['bit flips']['checked']:,} single flipped bits, all noticed; "
        f"{parts['failures']['checked']:,} failures (memory refused, Ctrl-C, NaN, threads), each ending in a typed error or a "
        "right result."
    )


def write() -> None:
    """Write the generated parts of docs/soundness.md and of the README."""
    fill(DOCUMENT, "soundness", figures())
    fill(README, "soundness", summary())


if __name__ == "__main__":
    write()
