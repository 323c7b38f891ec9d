"""A decode step of a whole model: caches filled with a trace's keys and values, then `model(one token)` again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .harness import Timer, describe_failure
from .model import tokens
from .rows import Row, evidence, timed_rows
from .systems import DYNAMIC, PEER, System
from .traces import make_trace


def measure(model: Any, context: int, batch: int, systems: list[System], timer: Timer, place: Row, seed: int) -> list[Row]:
    """Rows by system. Caches are filled through `update`, since a prefill of a long context is quadratic."""
    device, config = model.device, model.config
    caches = {system.name: system.make(config) for system in systems}
    failed: dict[str, str] = {}
    for layer in range(config.num_hidden_layers):
        trace = make_trace("diffuse", context, batch, channels=config.head_dim, seed=seed + layer, device=device)
        for system in systems:
            if system.name in failed:
                continue
            try:
                caches[system.name].update(trace.keys, trace.values, layer)
            except Exception as error:
                if system.kind != PEER:
                    raise
                failed[system.name] = describe_failure(error)
        del trace
    ids = tokens(timer.warmup + timer.rounds, batch, seed, device)
    calls = {name: step(model, cache, ids) for name, cache in caches.items() if name not in failed}
    samples = timer.run(calls, tolerated=[system.name for system in systems if system.kind == PEER])
    samples.failed.update(failed)
    rows = timed_rows({**place, "trace": "diffuse"}, samples, DYNAMIC)
    for name, row in rows.items():
        row.update(evidence(caches[name]))
    return list(rows.values())


def step(model: Any, cache: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Each call feeds the next token of `ids [batch, steps]`."""
    columns = iter(ids.split(1, dim=1))

    def call() -> Tensor:
        logits: Tensor = model(input_ids=next(columns), past_key_values=cache, use_cache=True).logits
        return logits

    return call
