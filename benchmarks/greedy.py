"""How many greedy tokens equal the dense cache's, by tolerance: 64-token continuations of passages of a book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import greedy, make_cache, passages, save, timed
from hf_certkv import CertKVConfig
from hf_certkv.embedded import load_embedded

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, BATCH = 50, 1024, 64, 10

CONFIGS: dict[str, CertKVConfig] = {
    "naive (uncertified)": CertKVConfig.naive(),
    "naive K8 V8 (uncertified)": CertKVConfig.naive(value_bits=8),
    "rtol 0.1": CertKVConfig(rtol=0.1),
    "rtol 0.05": CertKVConfig(rtol=0.05),
    "rtol 0.02 (default)": CertKVConfig(),
    "rtol 0.01": CertKVConfig(rtol=0.01),
    "rtol 0.02, scope layer": CertKVConfig(scope="layer"),
    "rtol 0.02, refine off": CertKVConfig(refine="off"),
    "rtol 0.05, V8": CertKVConfig(rtol=0.05, value_bits=8),
    "paper's policy, rtol 0.02": CertKVConfig.paper(),
}


def continuations(model: Any, prompts: torch.Tensor, make: Any) -> tuple[torch.Tensor, list[Any]]:
    """Greedy continuations `[prompts, NEW_TOKENS]` and the caches they came from."""
    parts, caches = [], []
    for batch in prompts.split(BATCH):
        cache = make()
        out = greedy(model, batch, cache, NEW_TOKENS)
        parts.append(out[:, batch.shape[1] :])
        caches.append(cache)
    return torch.cat(parts), caches


def compare(tokens: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Shares of equal tokens and of wholly equal continuations, and mean tokens before the first difference."""
    equal = tokens == reference
    until = equal.long().cumprod(dim=1).sum(dim=1).float()
    return {
        "tokens_equal": float(equal.float().mean()),
        "continuations_equal": float(equal.all(dim=1).float().mean()),
        "tokens_until_difference": float(until.mean()),
    }


def measure(text: Path) -> None:
    """All configurations in float32, where arithmetic noise is small; a few in bfloat16 beside a control."""
    result: dict[str, Any] = {"prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "runs": []}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_embedded("prose", dtype=dtype)
        prompts = passages(tokenizer, text, PROMPTS, PROMPT_TOKENS)
        reference, _ = continuations(model, prompts, lambda m=model: DynamicCache(config=m.config))
        names = list(CONFIGS) if dtype == torch.float32 else ["naive (uncertified)", "rtol 0.05", "rtol 0.02 (default)"]
        for name in names:
            settings = CONFIGS[name]
            run: dict[str, Any] = {"name": name, "dtype": str(dtype)}
            with timed(run):
                tokens, caches = continuations(model, prompts, lambda m=model, s=settings: make_cache(m.config, s))
            reports = [cache.report().to_dict()["overall"] for cache in caches]
            steps = sum(report["head_steps"] for report in reports)
            run.update(compare(tokens, reference))
            run["rung_share"] = {rung: sum(report["rungs"][rung] for report in reports) / steps for rung in reports[0]["rungs"]}
            moved = sum(report["bytes_moved"] for report in reports)
            run["host_bytes_per_token"] = moved / (PROMPTS * NEW_TOKENS)
            run["device_over_dense"] = caches[0].memory().ratio
            result["runs"].append(run)
            save("greedy", result)
        # The control: the dense cache again, with nothing but another order of the same arithmetic.
        model, _ = load_embedded("prose", dtype=dtype, attn_implementation="eager")
        control: dict[str, Any] = {"name": "control: dense cache, eager attention", "dtype": str(dtype)}
        with timed(control):
            tokens, _ = continuations(model, prompts, lambda m=model: DynamicCache(config=m.config))
        control.update(compare(tokens, reference))
        result["runs"].append(control)
        save("greedy", result)
