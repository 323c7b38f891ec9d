"""A run file as `certkv eval` writes it, small and with figures that are easy to follow."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from hf_certkv import CertKVConfig


def relative(largest: float | None, count: int) -> dict[str, Any] | None:
    if largest is None:
        return None
    return {"count": count, "mean": largest / 4, "max": largest, "p50": largest / 3, "p90": largest / 2, "p99": largest * 0.9}


def certificate(config: CertKVConfig, rungs: tuple[int, int, int, int, int, int], largest: float) -> dict[str, Any]:
    names = ("fast", "keys", "values", "dense_head", "dense_layer", "uncertified")
    device, dense = 3_000_000, 8_000_000
    return {
        "certified": config.certified,
        "settings": config.to_dict(),
        "overall": {
            "head_steps": sum(rungs),
            "rungs": dict(zip(names, rungs, strict=True)),
            "relative": {"bound": relative(largest, sum(rungs)), "error": relative(largest / 7, 400)},
        },
        "exact_head_steps": 1200,
        "exact_layers": {},
        "memory": {"device_bytes": device, "host_bytes": 9_000_000, "dense_bytes": dense, "device_over_dense": device / dense},
    }


def run_file(task: str = "ppl", **changes: Any) -> dict[str, Any]:
    """A run as `certkv eval` writes it: two contexts, three caches."""
    configs = {"dense": None, "naive": CertKVConfig.naive(), "certified": CertKVConfig(rtol=0.05, value_bits=8)}
    base = {"dense": 3.0, "naive": 3.2, "certified": 3.01} if task == "ppl" else {"dense": 1.0, "naive": 0.5, "certified": 1.0}
    items = []
    for index in range(8):
        context = 512 if index < 4 else 1024
        wrong = {"dense": 0, "naive": index % 2, "certified": 0}
        scores = {
            name: {"score": value + 0.01 * index if task == "ppl" else float(not wrong[name])} for name, value in base.items()
        }
        if task == "ppl":
            for name, score in scores.items():
                score |= {"kl": 0.0 if name == "dense" else 0.00321, "same_top": 0.987}
        items.append({"id": f"{context}/{index}", "context": context, "group": {}, "scores": scores})

    def sums(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        mine, dense = ([row["scores"][key]["score"] for row in rows] for key in (name, "dense"))
        change = fmean(mine) - fmean(dense)
        interval = {"mean": change, "low": change - 0.0123, "high": change + 0.0234}
        out: dict[str, Any] = {"items": len(rows), "score": fmean(mine), "difference": None if name == "dense" else interval}
        out["discordant"] = None
        if name != "dense" and task != "ppl":
            worse = sum(one < other for one, other in zip(mine, dense, strict=True))
            out["discordant"] = {"better": 0, "worse": worse, "p": min(1.0, 2 * 0.5**worse)}
        if task == "ppl":
            out |= {"kl": 0.0 if name == "dense" else 0.00321, "same_top": 0.987, "perplexity": math.exp(fmean(mine))}
            change = math.exp(fmean(mine)) - math.exp(fmean(dense))
            out["perplexity_difference"] = (
                None if name == "dense" else {"mean": change, "low": change - 0.1, "high": change + 0.2}
            )
        return out

    certificates = {
        "naive": certificate(configs["naive"] or CertKVConfig(), (0, 0, 0, 0, 0, 9000), 0.4),
        "certified": certificate(configs["certified"] or CertKVConfig(), (7000, 500, 1400, 60, 40, 0), 0.0498123),
    }
    sources = {"ppl": {"text": "book.txt", "text_sha256": "ab" * 32, "score_last": 256, "chunk": None}, "needle": {"depths": 4}}
    metrics = {
        "ppl": ("nll", "negative log likelihood", "nats a token", False, False),
        "needle": ("accuracy", "facts found", "share", True, True),
    }
    keys = ("name", "label", "unit", "higher_is_better", "right_or_wrong")
    run = {
        "format": "certkv-run",
        "version": 1,
        "kind": "eval",
        "complete": True,
        "config_hash": "0" * 64,
        "task": {
            "name": task,
            "settings": {"contexts": [512, 1024], "items": 4, **sources[task]},
            "metric": dict(zip(keys, metrics[task], strict=True)),
        },
        "audit": 1,
        "seed": 0,
        "model": {"name": "prose", "type": "llama", "parameters": 4951296, "dtype": "float32", "device": "cpu"},
        "environment": {"cpu": "Intel(R) Xeon(R)", "threads": 2, "torch": "2.13.0+cpu", "commit": "c0ffee", "date": "2026-1-2"},
        "caches": [{"name": name, "settings": config and config.to_dict()} for name, config in configs.items()],
        "items": items,
        "summary": {
            name: {
                "overall": sums(name, items),
                "contexts": {str(c): sums(name, [row for row in items if row["context"] == c]) for c in (512, 1024)},
                "tasks": {},
            }
            for name in configs
        },
        "certificates": certificates,
        "memory": {"measured": {name: part["memory"] for name, part in certificates.items()}},
        "speed": {name: {"decode_ms": None, "over_dense": {"median": x, "q1": x - 0.1, "q3": x + 0.1}} for name, x in
                  {"dense": 1.0, "naive": 1.23, "certified": 1.57}.items()} if task == "ppl" else {},
        "processes": 1,
        "seconds": 12.0,
    }  # fmt: skip
    return {**run, **changes}
