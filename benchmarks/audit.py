"""Soundness on real traces: every returned output against float64 attention over the originals, over all formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.common import make_cache, passages, save, timed
from hf_certkv import CertificateViolation, CertKVConfig
from hf_certkv.embedded import load_embedded, make_haystack
from hf_certkv.report import rung_shares

TOKENS, LONG_TOKENS = 2048, 32768
# Batch rows and steps: 18 formats * 2 rows * 60 steps * 24 heads = 51,840 head-steps on prose, as many on retriever (8 heads).
PROSE_ROWS, PROSE_STEPS = 2, 60
RETRIEVER_ROWS, RETRIEVER_STEPS = 4, 90
LONG_STEPS = 40

FORMATS: list[dict[str, Any]] = [
    {"value_bits": bits, "block_size": block, "refine": refine}
    for bits in (4, 8)
    for block in (16, 32, 64)
    for refine in ("device", "host", "off")
]
LONG_FORMATS: list[dict[str, Any]] = [{}, {"refine": "off"}, {"value_bits": 8}, {"block_size": 16, "refine": "device"}]


@torch.inference_mode()
def decode(model: Any, cache: Any, prompts: torch.Tensor, continuation: torch.Tensor) -> None:
    """Prefill `prompts`, then feed `continuation` token by token."""
    for part in prompts.split(4096, dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for token in continuation.split(1, dim=1):
        model(input_ids=token, past_key_values=cache, use_cache=True)


def run(model: Any, prompts: torch.Tensor, continuation: torch.Tensor, settings: CertKVConfig) -> dict[str, Any]:
    """One format over one batch: shares, and medians of the bound, the true error and their ratio."""
    out: dict[str, Any] = {"settings": settings.to_dict(), "tokens": prompts.shape[1]}
    cache = make_cache(model.config, settings)
    out["violations"] = 0
    with timed(out):
        try:
            decode(model, cache, prompts, continuation)
        except CertificateViolation as violation:  # ends this format's run; the others go on
            out["violations"], out["violation"] = 1, str(violation)
    cache.recorder.commit()
    overall = cache.recorder.overall()
    figures = overall.to_dict(heads=False)
    out["head_steps"] = figures["head_steps"]
    out["rung_share"] = rung_shares(overall)
    out["relative"] = figures["relative"]
    out["host_bytes_per_token"] = figures["bytes_moved"] / continuation.numel()
    return out


def measure(text: Path) -> None:
    """All formats on both embedded models at 2K tokens, and some on the retriever at 32K."""
    result: dict[str, Any] = {"rtol": 0.05, "runs": []}

    def add(name: str, model: Any, prompts: torch.Tensor, following: torch.Tensor, formats: list[dict[str, Any]]) -> None:
        for changes in formats:
            settings = CertKVConfig(rtol=0.05, audit=True).replace(**changes)
            result["runs"].append({"model": name, **run(model, prompts, following, settings)})
            result["head_steps"] = sum(part["head_steps"] for part in result["runs"])
            save("audit", result)

    prose, tokenizer = load_embedded("prose")
    rows = passages(tokenizer, text, PROSE_ROWS, TOKENS + PROSE_STEPS)
    add("prose", prose, rows[:, :TOKENS], rows[:, TOKENS:], FORMATS)
    retriever, _ = load_embedded("retriever")
    for tokens, count, steps, formats in (
        (TOKENS, RETRIEVER_ROWS, RETRIEVER_STEPS, FORMATS),
        (LONG_TOKENS, 1, LONG_STEPS, LONG_FORMATS),
    ):
        hay = [make_haystack(None, tokens, steps, seed) for seed in range(count)]
        prompts = torch.cat([one.input_ids for one in hay])
        keys = torch.tensor([[needle.key_id for needle in one.needles] for one in hay])
        add("retriever", retriever, prompts, keys, formats)
