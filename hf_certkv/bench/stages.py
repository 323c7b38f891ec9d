"""How the time of a certified attention call divides among its stages, where the decode module offers to tell.

This is the only place that knows how: `hf_certkv.decode.stage_times`, a context manager that gives a dictionary of seconds by
stage, filled while it is open. Stages other than `PASS` (the attention itself) are the certificate's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import decode, kernels

PASS = "pass"


def stage_seconds(call: Callable[[], object], calls: int = 3) -> dict[str, float] | None:
    """Seconds a call by stage; None where stages are not told apart."""
    offered: Any = getattr(decode, "stage_times", None)
    if offered is None:
        return None
    with offered() as seconds:
        for _ in range(calls):
            call()
    return {name: value / calls for name, value in seconds.items()}


def certificate_share(seconds: dict[str, float] | None) -> float | None:
    """The certificate's share of a call, from its stages; None where it cannot be told."""
    total = sum(seconds.values()) if seconds else 0.0
    if not seconds or PASS not in seconds or total <= 0:
        return None
    return 1.0 - seconds[PASS] / total


def kernel_name() -> str:
    """Which kernel serves certified steps."""
    chosen: Any = getattr(kernels, "chosen", None)
    return str(chosen()) if callable(chosen) else "reference"
