"""The prefill of a whole prompt in one forward pass, into a new cache each time."""

from __future__ import annotations

from functools import partial
from typing import Any

from .harness import Timer
from .model import tokens
from .rows import Row, timed_rows
from .systems import DYNAMIC, PEER, System


def measure(model: Any, context: int, batch: int, systems: list[System], timer: Timer, place: Row, seed: int) -> list[Row]:
    """Rows by system."""
    ids = tokens(context, batch, seed, model.device)

    def call(system: System) -> Any:
        cache = system.make(model.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    calls = {system.name: partial(call, system) for system in systems}
    samples = timer.run(calls, tolerated=[system.name for system in systems if system.kind == PEER])
    return list(timed_rows(place, samples, DYNAMIC).values())
