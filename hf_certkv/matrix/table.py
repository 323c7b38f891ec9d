"""The matrix as a page: docs/models.md."""

from __future__ import annotations

from typing import Any

SIGNS = {
    "certified": "\u2713",
    "partly certified": "part",
    "exact": "exact",
    "refused": "refused",
    "not offered": "-",
    "WRONG": "**WRONG**",
    "CRASHED": "**CRASHED**",
}
LAYERS = {
    "CertifiedLayer": "full",
    "CertifiedSlidingLayer": "sliding, certified",
    "DynamicSlidingWindowLayer": "sliding",
    "DynamicLayer": "latent",
    "DynamicIndexedLayer": "indexed",
    "LinearAttentionLayer": "linear",
    "LinearAttentionAndFullAttentionLayer": "linear + full",
    "LinearAttentionAndSlidingWindowAttentionLayer": "linear + sliding",
    "DummyLayer": "shared",
}
HEAD = """# Models

What `certkv matrix` found: a tiny random model of every architecture that transformers {version} has for causal language
modelling, found by introspection, in every mode of `generate`, with its default attention implementation.

- **\u2713**: certified. Every call of few queries on every full-attention layer was certified, and not all of them densely; no
  error was above its bound in audit; at `rtol=0` tokens and logits are those of `DynamicCache`, bit for bit; and computed
  densely by what the certificate takes the model's attention to be, logits are those of `DynamicCache` up to rounding.
- **part**, **exact**: some or none of those calls were certified, the others were computed on the exact originals. At `rtol=0`
  bit for bit as above. The reason is in the last column.
- **refused**: a typed error says why. **-**: transformers does not offer it: with its own `DynamicCache` the model fails as
  well, or leaves the cache alone.

Layers: *full* attention is certified; *sliding* and chunked attention, *linear* attention, convolutions, *latent* (multi-head
latent attention) and *indexed* attention keep transformers' own exact layers; *shared* layers hold nothing and read another
layer's.

{sums}

Run it yourself: `certkv matrix --workers 2 --markdown models.md` ({took} on the machine of this page); the figures are in
[benchmarks/results/matrix.json](../benchmarks/results/matrix.json).
"""


def page(result: dict[str, Any]) -> str:
    """The whole page, from what `run` returns."""
    sums, modes = result["summary"], result["modes"]
    words = (
        f"Of {sums['architectures']} architectures {sums['built']} were built, and {sums['with_full_attention']} of them have "
        f"full-attention layers and take a cache: **{sums['certified']} ({sums['certified_share']:.1%}) are certified in every "
        f"mode that transformers offers for them**, {sums['partly_certified']} in some or in part. "
        f"{len(sums['failures'])} modes were wrong or crashed. {sums['head_steps']:,} certified head-steps, the largest error "
        f"{sums['worst_error_over_bound']:.2f} of its bound."
    )
    took = f"{result['seconds'] / 60:.0f} minutes in {result['workers']} process(es)"
    parts = [HEAD.format(version=result["transformers"], sums=words, took=took)]
    columns = ["architecture", "attention", "layers", *modes, "why not"]
    parts.append(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    parts += [_row(found, modes) for found in result["architectures"] if not found["failed"]]
    failed = [found for found in result["architectures"] if found["failed"]]
    if failed:
        parts.append("\n## Not built\n\n| architecture | why |\n|---|---|")
        parts += [f"| {found['model_type']} | {_cell(found['failed'])} |" for found in failed]
    return "\n".join(parts) + "\n"


def _row(found: dict[str, Any], modes: list[str]) -> str:
    layers = ", ".join(f"{count} {LAYERS.get(name, name)}" for name, count in found["layers"].items())
    cells = [SIGNS[found["modes"][mode]["status"]] for mode in modes]
    return f"| {found['model_type']} | {found['attention']} | {layers} | {' | '.join(cells)} | {_cell(reasons(found))} |"


def reasons(found: dict[str, Any]) -> str:
    """Each reason once, with the modes that it is for unless it is for all."""
    by_reason: dict[str, list[str]] = {}
    for name, mode in found["modes"].items():
        if mode["reason"]:
            by_reason.setdefault(mode["reason"], []).append(name)
    whole = len(found["modes"])
    return "; ".join(reason if len(names) == whole else f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
