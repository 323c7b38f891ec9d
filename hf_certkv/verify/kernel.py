"""Which kernel computes what the laboratory looks at, and cases of sizes that the CPU kernel takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch.nn.functional as F
from torch import Tensor

from ..config import Kernel
from ..errors import InputError, MissingDependencyError
from ..kernels import cpu

if TYPE_CHECKING:
    from ..certified_pass import CertifiedPass
    from .cases import Case

NAMES: tuple[str, ...] = get_args(Kernel)
_chosen = "auto"


def chosen() -> str:
    """`"auto"`, what a user gets; `"reference"`; or `"cpu"`, where sizes are drawn so that the CPU kernel takes them."""
    return _chosen


@contextmanager
def using(kernel: str) -> Iterator[None]:
    """Certified calls are computed by this kernel, in every thread, whatever a cache's own setting is.

    Raises: InputError: no such kernel; MissingDependencyError: `"cpu"` without numba.
    """
    global _chosen
    if kernel not in NAMES:
        raise InputError(f"kernel={kernel!r}: expected one of {', '.join(NAMES)}.")
    if kernel == "cpu" and not cpu.installed():
        raise MissingDependencyError("kernel='cpu' needs numba. Install it with `pip install 'hf_certkv[cpu]'`.")
    before, supports = _chosen, cpu.supports

    def refused(step: CertifiedPass) -> bool:
        return False

    try:
        _chosen = kernel
        if kernel == "reference":
            cpu.supports = refused
        yield
    finally:
        _chosen, cpu.supports = before, supports


def start(kernel: str) -> None:
    """The same for the rest of a process: what a worker begins with."""
    using(kernel).__enter__()


def both(narrow: Sequence[Any], wide: Sequence[Any]) -> tuple[Any, ...]:
    """What sizes to draw from: `wide` ones fill vectors, `narrow` ones need not."""
    return {"auto": (*narrow, *wide), "cpu": tuple(wide)}.get(_chosen, tuple(narrow))


def widened(case: Case) -> Case:
    """The case with sizes that the CPU kernel takes: keys and queries with zeros behind them, value channels repeated.

    Scores are the same, weights too; norms of values and outputs are larger by a common factor.
    """
    bits, group = case.settings.get("value_bits", 4), case.settings.get("value_group")
    lanes, width = cpu.LANES if bits == 8 else 2 * cpu.LANES, case.values.shape[-1]
    times = lanes // math.gcd(lanes, width)
    channels = case.keys.shape[-1]
    scale = channels**-0.5 if case.scale is None else case.scale

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, -channels % cpu.LANES))

    return replace(
        case,
        query=filled(case.query),
        keys=filled(case.keys),
        values=case.values.repeat(1, 1, 1, times),
        scale=scale,
        settings={**case.settings, "value_group": group if group is None or group % cpu.LANES == 0 else None},
    )
