"""How everything is timed: warm-up, then rounds in which each candidate has its turn, in an order drawn anew each round.

Machines slow down and speed up while they are measured. Interleaved, all candidates see the same of it, so that ratios hold
where single times do not.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import CertKVError

Candidate = Callable[[], object]
SAMPLE_SECONDS = 0.01  # a candidate that may be repeated is, until a sample takes about this long
MOST_CALLS = 20


@dataclass
class Samples:
    """Seconds a call by candidate, one a round; and why candidates that failed did (they have no samples)."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Timer:
    """Times candidates against each other.

    Args:
        rounds: samples of each; warmup: calls of each before them, in the order given; seed: of the order within a round;
        clock: seconds; synchronize: called around every sample, so that what was only queued on a device is waited for.
    """

    def __init__(
        self,
        rounds: int,
        warmup: int = 2,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], object] = lambda: None,
    ) -> None:
        self.rounds, self.warmup, self.seed, self.clock, self.synchronize = rounds, warmup, seed, clock, synchronize

    def run(self, candidates: Mapping[str, Candidate], repeatable: bool = False, tolerated: Collection[str] = ()) -> Samples:
        """Warm up, then time.

        Args:
            candidates: by name; repeatable: whether a call leaves everything as it was, so that short ones may be called
            several times a sample; tolerated: candidates that may fail: they are left out from then on, and it is noted.
        """
        samples = Samples({name: [] for name in candidates})
        calls = dict.fromkeys(candidates, 1)

        def attempt(name: str, count: int) -> float | None:
            try:
                return self._sample(candidates[name], count)
            except Exception as error:
                # A peer's failure is a finding; this package's own errors never are.
                if name not in tolerated or isinstance(error, CertKVError):
                    raise
                samples.failed[name] = describe_failure(error)
                del samples.seconds[name]
                return None

        for _ in range(self.warmup):
            for name in list(samples.seconds):
                seconds = attempt(name, 1)
                if repeatable and seconds is not None:
                    wanted = math.ceil(SAMPLE_SECONDS / seconds) if seconds > 0 else MOST_CALLS
                    calls[name] = max(1, min(MOST_CALLS, wanted))
        order = random.Random(self.seed)
        for _ in range(self.rounds):
            names = list(samples.seconds)
            order.shuffle(names)
            for name in names:
                seconds = attempt(name, calls[name])
                if seconds is not None:
                    samples.seconds[name].append(seconds)
        return samples

    def _sample(self, candidate: Candidate, calls: int) -> float:
        """Seconds a call. What the call returned is freed after the clock was read; no garbage is collected meanwhile."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            self.synchronize()
            start = self.clock()
            for _ in range(calls):
                kept = candidate()
            self.synchronize()
            seconds = (self.clock() - start) / calls
            del kept
        finally:
            if collecting:
                gc.enable()
        return seconds


def synchronizer(device: torch.device) -> Callable[[], object]:
    """What waits for everything that is queued on a device."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def describe_failure(error: BaseException) -> str:
    """One short line about someone else's exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
