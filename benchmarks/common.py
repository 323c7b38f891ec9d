"""What every measurement shares: the text, the machine's description, and how a result is saved."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_certkv import CertifiedQuantizedCache, CertKVConfig
from hf_certkv.environment import describe

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write one result, with the machine it was measured on, under `benchmarks/results`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **result}, indent=1) + "\n", encoding="utf-8")
    return path


@contextmanager
def timed(result: dict[str, Any]) -> Iterator[None]:
    """Note the seconds that a part took (for planning the next run; no claim is made of them)."""
    start = time.perf_counter()
    yield
    result["seconds"] = round(time.perf_counter() - start, 1)


def passages(tokenizer: Any, text: Path, count: int, tokens: int) -> torch.Tensor:
    """`count` passages of a book, evenly spread over it: int64 `[count, tokens]`.

    Raises: ValueError: the text is too short.
    """
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(ids) < tokens + count:
        raise ValueError(f"{text} has {len(ids)} tokens; {count} passages of {tokens} need at least {tokens + count}.")
    starts = torch.linspace(0, len(ids) - tokens, count).long()
    return torch.stack([ids[start : start + tokens] for start in starts])


def greedy(model: Any, prompts: torch.Tensor, cache: Any, new_tokens: int, **options: Any) -> Any:
    """What `generate` gives for exactly `new_tokens` greedy tokens after unpadded prompts `[batch, tokens]`."""
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        **options,
    )


def make_cache(config: Any, settings: CertKVConfig) -> CertifiedQuantizedCache:
    """A cache with these settings, for one run."""
    return CertifiedQuantizedCache(config, settings=settings)
