"""Failures of every kind, at every point: memory, Ctrl-C, NaN and infinities, threads. A typed error, or a right result.

What is allowed where, and how it is checked: `faults_steps` (memory and Ctrl-C), `faults_values`, `faults_threads`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import faults_steps, faults_threads, faults_values, kernel
from .parts import Clock, Part

Run = Callable[[Clock, torch.device, int], Part]
SHARES: tuple[tuple[float, Run], ...] = (
    (0.3, faults_steps.run_allocations),
    (0.4, faults_steps.run_interrupts),
    (0.2, faults_values.run),
    (0.1, faults_threads.run),
)


def run(clock: Clock, device: torch.device, seed: int) -> Part:
    """All of them, a share of the time each."""
    part = Part(
        "failures", "every failure ends in a typed error or a right result, and the cache is before or after", "failures"
    )
    for share, one in SHARES:
        if one is faults_threads.run and kernel.slow():
            part.figures["threads"] = "not run: Triton's interpreter serves one thread at a time"
            continue
        found = one(Clock(clock.seconds * share, lambda done, text: clock.tell(text)), device, seed)
        part.checked += found.checked
        part.figures[found.name] = {"checked": found.checked, "failed": found.failed, "claim": found.claim, **found.figures}
        for what in found.failures:
            part.fail(f"{found.name}: {what}")
        part.failed += found.failed - len(found.failures)
    part.seconds = clock.spent
    return part
