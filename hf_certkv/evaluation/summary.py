"""What a run's items say together: means, paired differences, discordant pairs, by cache, context and task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .caches import DENSE
from .statistics import discordant, mean_difference, perplexity_difference

Item = dict[str, Any]  # as in a run file


def summary(name: str, items: Sequence[Item], task: str, right_or_wrong: bool, seed: int) -> dict[str, Any]:
    """Everything that a run file says of one cache: `{"overall": ..., "contexts": {...}, "tasks": {...}}`."""

    def of(part: Sequence[Item]) -> dict[str, Any]:
        return sums(name, part, task, right_or_wrong, seed)

    contexts = sorted({item["context"] for item in items})
    tasks = list(dict.fromkeys(item["group"]["task"] for item in items if "task" in item["group"]))
    return {
        "overall": of(items),
        "contexts": {str(context): of([item for item in items if item["context"] == context]) for context in contexts},
        "tasks": {task: of([item for item in items if item["group"].get("task") == task]) for task in tasks},
    }


def sums(name: str, items: Sequence[Item], task: str, right_or_wrong: bool, seed: int) -> dict[str, Any]:
    """Of some items. Where items score many tokens, each token counts the same, and resampling takes whole items."""
    scores, dense = ([item["scores"][key]["score"] for item in items] for key in (name, DENSE))
    weights = [item["scores"][name].get("tokens", 1) for item in items]
    out: dict[str, Any] = {"items": len(items), "score": float(np.average(scores, weights=weights)) if items else None}
    compared = bool(items) and name != DENSE
    out["difference"] = mean_difference(scores, dense, seed, weights) if compared else None
    out["discordant"] = None
    if compared and right_or_wrong:
        out["discordant"] = discordant([score == 1 for score in scores], [score == 1 for score in dense])
    for figure in ("kl", "same_top", "equal"):
        known = [(part[figure], part.get("tokens", 1)) for part in (item["scores"][name] for item in items) if figure in part]
        out[figure] = sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None
    if task == "ppl" and items:
        out["perplexity"] = math.exp(out["score"])
        out["perplexity_difference"] = perplexity_difference(scores, dense, seed, weights) if compared else None
    return out
