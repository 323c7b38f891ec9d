"""Run files as `certkv eval` writes them (docs/evaluation.md), made from a seed: head-steps are drawn, all else is counted."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from hf_certkv import CertKVConfig
from hf_certkv.certificate import LayerSummary, StepRecord
from hf_certkv.embedded import embedded_path
from hf_certkv.ladder import Rung
from hf_certkv.plan import plan_memory

LAYERS, HEADS = 6, 4
METRICS: dict[str, dict[str, Any]] = {
    "ppl": {"name": "nll", "label": "negative log likelihood", "unit": "nats a token", "higher_is_better": False,
            "right_or_wrong": False},
    "needle": {"name": "exact_match", "label": "exact match", "unit": "share right", "higher_is_better": True,
               "right_or_wrong": True},
    "ruler": {"name": "score", "label": "RULER score", "unit": "share", "higher_is_better": True, "right_or_wrong": False},
    "divergence": {"name": "until", "label": "tokens until the first difference", "unit": "tokens", "higher_is_better": True,
                   "right_or_wrong": False},
}  # fmt: skip


def example_run(task: str = "ppl", seed: int = 0, items: int = 20, steps: int = 200, audited: int = 2) -> dict[str, Any]:
    """A whole run: dense, naive and certified caches, 6 layers of 4 heads. `audited`: items with true errors."""
    draw = np.random.default_rng(seed)
    specs: dict[str, CertKVConfig | None] = {"dense": None, "naive": CertKVConfig.naive(), "certified": CertKVConfig()}
    contexts = [1024] if task in ("ppl", "divergence") else [1024, 2048]
    found = [_item(draw, task, place, contexts, list(specs)) for place in range(items)]
    config = AutoConfig.from_pretrained(embedded_path("prose"))
    longest = max(contexts)

    def bytes_of(settings: CertKVConfig | None, context: int) -> dict[str, Any]:
        memory = plan_memory(config, context, 1, torch.float32, settings or CertKVConfig(), "cpu")
        if settings is not None:
            return memory.to_dict()
        dense = memory.dense
        return {"device_bytes": dense, "host_bytes": 0, "dense_bytes": dense, "device_over_dense": 1.0, "working_bytes": 0,
                "parts": {"exact": dense}}  # fmt: skip

    certificates = {
        name: {**_certificate(draw, settings, items, steps, audited), "memory": bytes_of(settings, longest)}
        for name, settings in specs.items() if settings is not None
    }  # fmt: skip
    metric = METRICS[task]
    return {
        "format": "certkv-run", "version": 1, "kind": "eval", "complete": True, "config_hash": f"{seed:064x}",
        "task": {"name": task, "settings": {"contexts": contexts, "items": items, "seed": seed, "score_last": steps},
                 "metric": metric},
        "model": {"name": "prose", "type": "llama", "parameters": 4_982_016, "dtype": "float32", "revision": None,
                  "attention": "sdpa"},
        "environment": {"cpu": "Example(R) Processor", "threads": 1, "python": "3.11.9", "torch": "2.13.0+cpu",
                        "transformers": "5.23.0", "hf_certkv": "0.1.0", "commit": "0123456789abcdef", "date": "2026-11-23"},
        "caches": [{"name": name, "settings": settings and settings.to_dict()} for name, settings in specs.items()],
        "items": found,
        "summary": {name: _summary(found, name, metric, task) for name in specs},
        "certificates": certificates,
        "memory": {
            "measured": {name: bytes_of(settings, longest) for name, settings in specs.items()},
            "planned": {name: {str(2**p): bytes_of(settings, 2**p) for p in range(9, 18)} for name, settings in specs.items()},
        },
        "speed": {name: _speed(draw, ratio) for name, ratio in (("dense", 1.0), ("naive", 1.09), ("certified", 1.37))},
        "processes": 2, "seconds": 312.4,
    }  # fmt: skip


_cached = cache(example_run)


def run_of(task: str = "ppl") -> dict[str, Any]:
    return copy.deepcopy(_cached(task, items=6, steps=40))


def set_at(run: dict[str, Any], path: str, value: Any) -> None:
    """Set what lies at `a.b.0.c`; `DELETE` takes it away."""
    *parents, last = path.split(".")
    place: Any = run
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if value is DELETE:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value


DELETE = object()


def generated_run(seed: int = 0) -> dict[str, Any]:
    """What `certkv generate --json` writes."""
    run = example_run("ppl", seed, items=1, steps=40, audited=0)
    kept = ("format", "version", "model", "environment", "memory")
    out = {name: run[name] for name in kept}
    caches = [cache for cache in run["caches"] if cache["name"] == "certified"]
    measured = {"measured": {"certified": run["memory"]["measured"]["certified"]}}
    return {**out, "kind": "generate", "caches": caches, "certificates": {"certified": run["certificates"]["certified"]},
            "memory": measured, "text": "Once upon a time"}  # fmt: skip


def _item(draw: np.random.Generator, task: str, place: int, contexts: list[int], names: list[str]) -> dict[str, Any]:
    base, scores = draw.normal(3.1, 0.25), {}
    hard = draw.uniform()
    for name in names:
        shift = {"dense": 0.0, "naive": draw.normal(0.012, 0.01), "certified": draw.normal(0.0006, 0.0016)}[name]
        if task == "ppl":
            score: dict[str, Any] = {
                "score": base + shift,
                "kl": abs(shift) / 10,
                "kl_max": abs(shift),
                "same_top": 1 - abs(shift),
            }
            score["tokens"] = 256
        elif task == "needle":
            score = {"score": float(hard > {"dense": 0.15, "naive": 0.45, "certified": 0.16}[name]), "text": "word"}
        elif task == "ruler":
            score = {"score": float(np.clip(1.1 - hard - 5 * abs(shift), 0, 1))}
        else:
            score = {"score": 64.0 if name == "dense" else float(draw.integers(8, 65)), "until": 64}
        scores[name] = score
    depth, kind = [0.0, 0.25, 0.5, 0.75, 1.0][place // len(contexts) % 5], ["niah_single_1", "ruler_vt"][place // 2 % 2]
    group = {"needle": {"depth": depth}, "ruler": {"task": kind}}.get(task, {})
    return {"id": f"{task}-{place}", "context": contexts[place % len(contexts)], "group": group, "scores": scores}


def _summary(items: list[dict[str, Any]], name: str, metric: dict[str, Any], task: str) -> dict[str, Any]:
    def one(part: list[dict[str, Any]]) -> dict[str, Any]:
        scores, dense = (np.array([item["scores"][who]["score"] for item in part]) for who in (name, "dense"))
        found: dict[str, Any] = {"items": len(part), "score": float(scores.mean()), "difference": None, "discordant": None,
                                 "kl": None, "same_top": None}  # fmt: skip
        if task == "ppl":
            found["perplexity"], found["perplexity_difference"] = math.exp(found["score"]), None
        if name != "dense":
            found["difference"] = _interval(scores - dense)
            if metric["right_or_wrong"]:
                better, worse = int((scores > dense).sum()), int((scores < dense).sum())
                found["discordant"] = {"better": better, "worse": worse, "p": min(1.0, 2.0 ** (1 - better - worse))}
            if task == "ppl":
                for key in ("kl", "same_top"):
                    found[key] = float(np.mean([item["scores"][name][key] for item in part]))
                ratio = math.exp(float(dense.mean()))
                found["perplexity_difference"] = {
                    key: None if value is None else ratio * (math.exp(value) - 1) for key, value in found["difference"].items()
                }
        return found

    contexts = sorted({item["context"] for item in items})
    tasks = sorted({item["group"]["task"] for item in items if "task" in item["group"]})
    return {
        "overall": one(items),
        "contexts": {str(size): one([item for item in items if item["context"] == size]) for size in contexts},
        "tasks": {kind: one([item for item in items if item["group"]["task"] == kind]) for kind in tasks},
    }


def _interval(differences: np.ndarray) -> dict[str, float | None]:
    mean, half = float(differences.mean()), 1.96 * float(differences.std()) / math.sqrt(len(differences))
    return {
        "mean": mean,
        "low": mean - half if len(differences) > 1 else None,
        "high": mean + half if len(differences) > 1 else None,
    }


def _speed(draw: np.random.Generator, ratio: float) -> dict[str, Any]:
    median = 4.2 * ratio
    spread = float(draw.uniform(0.02, 0.06))
    return {"decode_ms": {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread), "n": 480},
            "over_dense": {"median": ratio, "q1": ratio * 0.96, "q3": ratio * 1.05}}  # fmt: skip


def _certificate(draw: np.random.Generator, settings: CertKVConfig, items: int, steps: int, audited: int) -> dict[str, Any]:
    """Bounds of heads drawn around a level of their own; what is above the tolerance is raised, a few go dense."""
    shape = (LAYERS, HEADS, items, steps)
    level = draw.normal(-4.6, 0.8, (LAYERS, HEADS, 1, 1)) + 0.5 * np.sin(np.arange(steps) / 17)
    candidate = np.exp(level + draw.normal(0, 0.5, shape))
    rung = np.where(candidate <= settings.rtol, Rung.FAST, np.where(draw.uniform(size=shape) < 0.2, Rung.KEYS, Rung.VALUES))
    rung = np.where(
        candidate > 12 * settings.rtol, np.where(draw.uniform(size=shape) < 0.3, Rung.DENSE_LAYER, Rung.DENSE_HEAD), rung
    )
    bound = np.where(rung == Rung.FAST, candidate, settings.rtol * draw.uniform(0.4, 0.998, shape))
    if not settings.certified:
        rung, bound = np.full(shape, int(Rung.UNCERTIFIED)), candidate
    error = bound / np.exp(draw.normal(2.8, 0.5, shape).clip(0.1))
    error[:, :, audited:] = np.nan
    moved = np.where((rung != Rung.FAST) & (rung != Rung.UNCERTIFIED), 4096 * draw.integers(1, 9, shape), 0)
    layers: dict[str, Any] = {}
    for layer in range(LAYERS):
        summary = LayerSummary(HEADS)
        for step in range(steps):
            place = (layer, slice(None), slice(None), step)
            names = ("rung", "candidate", "bound", "expected", "norm", "error")
            parts = (rung, candidate, bound, bound / 9, np.ones(shape), error)
            arrays = {name: part[place].T[:, :, None] for name, part in zip(names, parts, strict=True)}
            blocks = {name: np.ones((items, 2), dtype=np.int64) for name in ("key_blocks", "value_blocks")}
            moving = {"bytes_moved": int(moved[place].sum()), "kernel": "cpu"}
            summary.add(StepRecord(**{"step": step, "layer": layer, **arrays, **blocks, **moving}))
        layers[str(layer)] = summary.to_dict()
    dense = (rung == Rung.DENSE_HEAD) | (rung == Rung.DENSE_LAYER)
    returned = np.where(dense, np.nan, bound)
    counts = {kind.name.lower(): int((rung == kind).sum()) for kind in Rung}
    relative = {name: _quantiles(values) for name, values in (("candidate", candidate), ("bound", returned), ("error", error))}
    relative |= {"dense_bound": _quantiles(np.where(dense, bound, np.nan)), "expected": _quantiles(bound / 9),
                 "tightness": _quantiles(returned / error)}  # fmt: skip
    return {
        "certified": settings.certified, "settings": settings.to_dict(), "steps": steps,
        "overall": {"head_steps": rung.size, "rungs": counts, "promoted_key_blocks": 10, "promoted_value_blocks": 20,
                    "bytes_moved": int(moved.sum()), "calls": LAYERS * steps, "kernels": {"cpu": LAYERS * steps},
                    "relative": relative, "rung_share": {name: value / rung.size for name, value in counts.items()}},
        "layers": layers, "exact_head_steps": 0, "repaired_blocks": 0, "materialised_operations": {}, "exact_layers": {},
        "trace": _trace(rung, candidate, returned, moved, items, steps),
        "histograms": {name: _histogram(values) for name, values in (
            ("bound", returned), ("candidate", candidate), ("error", error), ("tightness", returned / error))},
    }  # fmt: skip


def _quantiles(values: np.ndarray) -> dict[str, Any] | None:
    known = values[~np.isnan(values)]
    if known.size == 0:
        return None
    p50, p90, p99 = (float(np.quantile(known, share)) for share in (0.5, 0.9, 0.99))
    return {"count": known.size, "mean": float(known.mean()), "max": float(known.max()), "p50": p50, "p90": p90, "p99": p99}


def _trace(
    rung: np.ndarray, candidate: np.ndarray, bound: np.ndarray, moved: np.ndarray, items: int, steps: int
) -> dict[str, Any]:
    columns = min(128, steps)
    column = np.arange(steps) * columns // steps

    def folded(values: np.ndarray, how: Any) -> list[list[float | None]]:
        grid = []
        for layer in range(LAYERS):
            for head in range(HEADS):
                cells = [values[layer, head][:, column == c] for c in range(columns)]
                grid.append([None if np.isnan(cell).all() else float(how(cell)) for cell in cells])
        return grid

    return {
        "steps": steps, "columns": columns, "rows": [[layer, head] for layer in range(LAYERS) for head in range(HEADS)],
        "bound_max": folded(bound, np.nanmax), "bound_mean": folded(bound, np.nanmean),
        "candidate_max": folded(candidate, np.nanmax),
        "rungs": {kind.name.lower(): [int((rung[..., column == c] == kind).sum()) for c in range(columns)] for kind in Rung},
        "bytes_moved": [int(moved[..., column == c].sum()) for c in range(columns)], "items": [items] * columns,
    }  # fmt: skip


def _histogram(values: np.ndarray) -> list[list[float | int | None]]:
    known = values[~np.isnan(values)]
    places, counts = np.unique(np.floor(np.log10(known) * 16).astype(int) + 1, return_counts=True)
    return [[float(10 ** (place / 16)), int(number)] for place, number in zip(places, counts, strict=True)]
