"""The attention operation alone: one query token, all heads, a cache of `context` tokens of one layer.

`attention`: on what `update` returned last, again and again: certified attention on handles, certificate included, beside
dense attention on plain tensors of the same tokens. Dense attention has two ways to serve grouped heads, `enable_gqa` and KV
heads repeated beforehand (the copy is not timed); the faster one is what others are compared with.

`layer`: `update` with one more token and attention on what it returns, for every system: what a cache costs a layer at a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cache import CertifiedQuantizedCache
from . import statistics
from .harness import Samples, Timer, describe_failure
from .model import KV_HEADS, QUERY_HEADS, model_config
from .rows import Row, evidence, timed_rows
from .stages import certificate_share, stage_seconds
from .systems import DYNAMIC, OURS, PEER, System
from .traces import Trace, errors, exact_attention

BF16, FP32 = "dense bf16", "dense fp32"  # torch's scaled_dot_product_attention
REPEATED_UP_TO = 32768  # tokens times batch rows: repeated float32 heads of more are larger than all caches together
attend = torch.nn.functional.scaled_dot_product_attention


def dense_copies(context: int, batch: int) -> float:
    """What the dense candidates and the trace take, in copies of the dense bfloat16 keys and values."""
    repeated = 3 * QUERY_HEADS / KV_HEADS if context * batch <= REPEATED_UP_TO else 0
    return 4.0 + repeated


def measure(trace: Trace, systems: list[System], timer: Timer, place: Row) -> tuple[list[Row], list[Row]]:
    """Rows of `attention` and of `layer`, for one trace."""
    config = model_config(trace.keys.shape[-1], layers=1)
    caches = {system.name: system.make(config) for system in systems}
    place = {**place, "trace": trace.name}
    attention = _attention(trace, {s.name: caches[s.name] for s in systems if s.kind == OURS}, timer, place)
    layer = _layer(trace, systems, caches, timer, place)
    return attention, layer


def _attention(trace: Trace, caches: dict[str, Any], timer: Timer, place: Row) -> list[Row]:
    calls: dict[str, Callable[[], Tensor]] = _dense_calls(trace)
    for name, cache in caches.items():
        cache.update(trace.keys[..., :-1, :], trace.values[..., :-1, :], 0)
        held = cache.update(trace.keys[..., -1:, :], trace.values[..., -1:, :], 0)
        calls[name] = lambda held=held: attend(trace.query, *held, enable_gqa=True)  # type: ignore[misc]
    samples = timer.run(calls, repeatable=True)
    exact = exact_attention(trace)
    fastest = {kind: _fastest(samples, kind) for kind in (BF16, FP32)}
    rows = timed_rows(place, samples, fastest[BF16], "over_bf16")
    for name, row in rows.items():
        row["over_fp32"] = statistics.ratio(samples.seconds[name], samples.seconds[fastest[FP32]])
        row["fastest_dense"] = name in fastest.values()
        if name in caches:
            output, over_bound = judge(caches[name], calls[name], exact)
            row.update(evidence(caches[name]))
            row["error_over_bound_max"] = over_bound
            row["stage_seconds"] = stage_seconds(calls[name])
            row["certificate_share"] = certificate_share(row["stage_seconds"])
        else:
            output = calls[name]()
        row["error"] = errors(output, exact)
    return list(rows.values())


def judge(cache: CertifiedQuantizedCache, call: Callable[[], Tensor], exact: Tensor) -> tuple[Tensor, float]:
    """One more, untimed call: its output, and the largest true error over the bound that came with it.

    Above 1 it would be a broken certificate: what rounding the output to the query's dtype adds is in the bound, too.
    """
    recorder = cache.recorder
    cache.report()  # what came before is counted and not kept
    kept, recorder.full = recorder.full, True
    try:
        output = call()
        cache.report()
        record = recorder.records[-1]
    finally:
        recorder.full = kept
        recorder.records.clear()
    distance = torch.linalg.vector_norm(output.double() - exact, dim=-1).cpu()
    return output, float((distance / torch.from_numpy(record.bound)).max())


def _dense_calls(trace: Trace) -> dict[str, Callable[[], Tensor]]:
    calls: dict[str, Callable[[], Tensor]] = {}
    repeats = QUERY_HEADS // trace.keys.shape[1]
    for kind, dtype in ((BF16, torch.bfloat16), (FP32, torch.float32)):
        query, keys, values = (part.to(dtype) for part in (trace.query, trace.keys, trace.values))
        calls[f"{kind}, grouped"] = lambda q=query, k=keys, v=values: attend(q, k, v, enable_gqa=True)  # type: ignore[misc]
        if keys.shape[0] * keys.shape[2] <= REPEATED_UP_TO:
            keys, values = (part.repeat_interleave(repeats, dim=1) for part in (keys, values))
            calls[f"{kind}, repeated"] = lambda q=query, k=keys, v=values: attend(q, k, v)  # type: ignore[misc]
    return calls


def _fastest(samples: Samples, kind: str) -> str:
    medians = {name: statistics.summary(part)["median"] for name, part in samples.seconds.items() if name.startswith(kind)}
    return min(medians, key=lambda name: medians[name])


def _layer(trace: Trace, systems: list[System], caches: dict[str, Any], timer: Timer, place: Row) -> list[Row]:
    generator = torch.Generator().manual_seed(trace.seed)
    steps = timer.warmup + timer.rounds + 1
    shape = (steps, 2, *trace.keys.shape[:2], 1, trace.keys.shape[-1])
    news = torch.randn(shape, generator=generator).to(trace.keys)
    exact = exact_attention(trace, torch.cat([trace.keys, news[0, 0]], dim=-2), torch.cat([trace.values, news[0, 1]], dim=-2))
    calls: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, dict[str, float] | None] = {}
    failed: dict[str, str] = {}
    for system in systems:
        cache = caches[system.name]
        try:
            if system.kind != OURS:
                cache.update(trace.keys, trace.values, 0)
            call = _step(cache, trace.query, news)
            found[system.name] = _finite(errors(call(), exact))  # the first step, on the same tokens for all
        except Exception as error:
            if system.kind != PEER:
                raise
            failed[system.name] = describe_failure(error)
            continue
        calls[system.name] = call
    samples = timer.run(calls, tolerated=[system.name for system in systems if system.kind == PEER])
    samples.failed.update(failed)
    rows = timed_rows(place, samples, DYNAMIC)
    for name, row in rows.items():
        if name in found:
            row["error"] = found[name]
    return list(rows.values())


def _step(cache: Any, query: Tensor, news: Tensor) -> Callable[[], Tensor]:
    """Each call takes the next new token; all systems get the same ones in the same order."""
    tokens = iter(news)

    def call() -> Tensor:
        key, value = next(tokens)
        keys, values = cache.update(key, value, 0)
        return attend(query, keys, values, enable_gqa=True)

    return call


def _finite(figures: dict[str, float]) -> dict[str, float] | None:
    return figures if all(math.isfinite(value) for value in figures.values()) else None
