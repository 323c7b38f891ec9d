"""How the time of a certified attention call divides among its stages (`hf_certkv.stages`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernels import cpu
from ..stages import CERTIFICATE, RECORD, stage_times


def stage_seconds(call: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """Seconds a call by stage."""
    with stage_times() as seconds:
        for _ in range(calls):
            call()
    return {name: value / calls for name, value in seconds.items()}


def certificate_share(seconds: dict[str, float]) -> float | None:
    """The share of bound and records in a call; None where nothing was timed."""
    total = sum(seconds.values())
    return (seconds[CERTIFICATE] + seconds[RECORD]) / total if total > 0 else None


def kernel_name(device: torch.device) -> str:
    """Which kernel serves certified steps of the harness's models."""
    return "cpu" if device.type == "cpu" and cpu.installed() else "reference"
