"""All parts of the laboratory in one run: a budget of minutes, and a scorecard."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import device_decode
from ..environment import describe
from ..errors import InputError
from . import bit_flips, failures, fuzz, kernel, planted_bugs, relations, rounding, search
from .parts import Clock, Part

Run = Callable[[Clock, torch.device, int], Part]


@dataclass(frozen=True)
class Entry:
    """A part of the laboratory: its name, its share of the minutes, and what runs it."""

    name: str
    weight: float
    run: Run


ENTRIES = (
    Entry("fuzz", 0.40, fuzz.run),
    Entry("search", 0.20, search.run),
    Entry("rounding", 0.12, rounding.run),
    Entry("relations", 0.05, relations.run),
    Entry("bit flips", 0.08, bit_flips.run),
    Entry("failures", 0.10, failures.run),
    Entry("planted bugs", 0.05, planted_bugs.run),
)
NAMES = tuple(entry.name for entry in ENTRIES)


@dataclass(frozen=True)
class Scorecard:
    """What a run found.

    Attributes: parts; minutes: the budget that was given; device; seed; seconds: what it took; kernel: what was asked for.
    """

    parts: tuple[Part, ...]
    minutes: float
    device: str
    seed: int
    seconds: float
    kernel: str = "auto"

    @property
    def passed(self) -> bool:
        """Every part checked something, and nothing failed. A part that could not be run has checked nothing and says why."""
        return all(part.passed for part in self.parts if not part.skipped) and any(part.passed for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, with the machine and the versions."""
        parts = {part.name: {**asdict(part), "passed": part.passed} for part in self.parts}
        return {
            "machine": describe(),
            "minutes": self.minutes,
            "device": self.device,
            "seed": self.seed,
            "kernel": self.kernel,
            "seconds": round(self.seconds, 1),
            "passed": self.passed,
            "parts": parts,
        }


def verify(
    minutes: float = 5.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
    only: tuple[str, ...] = (),
    workers: int = 1,
    head_steps: int | None = None,
    save_to: Path | None = None,
    kernel_name: str = "auto",
    tell: Callable[[str, float, str], None] | None = None,
) -> Scorecard:
    """Attack the certificate on this machine.

    Args:
        minutes: the budget, divided among the parts; every part does a little even if it is 0.
        device: where the cache runs; the oracle runs on the CPU.
        seed: everything random follows from it and from how far the run gets; only: names of parts, all if empty.
        workers: processes for the random part; head_steps: where that part stops at the latest, however many minutes are left.
        save_to: a folder for witness files; kernel_name: what computes the calls (kernel.py).
        tell: called with a part's name, its progress from 0 to 1, and a short text.

    Raises: InputError: an unknown part, kernel or device, a number out of range, or Triton on a CPU and not interpreted;
        MissingDependencyError: no numba for "cpu", or no triton.
    """
    entries = _chosen(only)
    where = usable_device(device)
    if kernel_name == "triton" and device_decode.installed():
        kernel.require_interpreter(where)
    if not (minutes >= 0 and workers >= 1 and (head_steps is None or head_steps >= 1)):
        given = f"minutes={minutes}, workers={workers}, head_steps={head_steps}"
        raise InputError(f"{given}: expected minutes of 0 or more, and at least 1 of the others.")
    start = time.monotonic()
    extra: dict[str, dict[str, Any]] = {
        "fuzz": {"workers": workers, "head_steps": head_steps},
        "search": {"save_to": save_to},
    }
    total = sum(entry.weight for entry in entries)
    parts = []
    with kernel.using(kernel_name):
        for entry in entries:
            clock = Clock(60 * minutes * entry.weight / total, None if tell is None else partial(tell, entry.name))
            parts.append(_guarded(entry, clock, where, seed, extra.get(entry.name, {})))
    return Scorecard(tuple(parts), minutes, str(where), seed, time.monotonic() - start, kernel_name)


def _guarded(entry: Entry, clock: Clock, device: torch.device, seed: int, extra: dict[str, Any]) -> Part:
    """A part that breaks down is a failure of its own, and the others still run."""
    try:
        part = entry.run(clock, device, seed, **extra)
    except Exception as error:  # whatever it is, it is what the scorecard must show
        part = Part(entry.name, "this part could not be finished", "errors", checked=1)
        part.fail("".join(traceback.format_exception(error)))
    part.seconds = round(clock.spent, 1)
    return part


def _chosen(only: tuple[str, ...]) -> tuple[Entry, ...]:
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise InputError(f"Unknown parts {unknown}: expected some of {', '.join(NAMES)}.")
    return tuple(entry for entry in ENTRIES if not only or entry.name in only)


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if tensors can be put on it. Raises: InputError: they cannot."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device={str(device)!r} cannot be used here: {reason} Expected 'cpu' or 'cuda'.") from error
    return found
