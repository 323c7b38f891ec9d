"""How long the stages of certified calls take, for who asks: `with stage_times() as seconds: ...`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
PASS, CERTIFICATE, RECORD, AROUND = "pass", "certificate", "record", "around"
_asked: list[dict[str, float]] = []


@contextmanager
def stage_times() -> Iterator[dict[str, float]]:
    """Seconds by stage, of every certified call of the process while this is open.

    `pass`: scores, weights, values and their sums; `certificate`: the bound of the first pass; `record`: what the report is
    made from; `around`: everything else. The fused CPU kernel has pass and certificate in one: it certifies once more, and
    that time, less that of merging the segments' outputs, which attention needs anyway, is taken for the certificate's. So a
    call takes longer than usual here, and the stages add up to what it takes otherwise.
    """
    seconds = {PASS: 0.0, CERTIFICATE: 0.0, RECORD: 0.0, AROUND: 0.0}
    _asked.append(seconds)
    try:
        yield seconds
    finally:
        _asked.remove(seconds)


def asked() -> bool:
    """Whether somebody wants to know."""
    return bool(_asked)


def add(stage: str, seconds: float) -> None:
    """So much more of a stage."""
    for found in _asked:
        found[stage] += seconds


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call takes, and its result."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result
