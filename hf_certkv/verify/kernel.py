"""Which kernel computes what the laboratory looks at, and cases of sizes that the compiled kernels take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device_decode, shadow
from ..attention import AttentionCall
from ..codecs import ValueCodec
from ..config import CertKVConfig, Kernel
from ..errors import InputError, MissingDependencyError
from ..kernels import cpu
from ..layers import CertifiedLayer

if TYPE_CHECKING:
    from ..certificate import StepRecord
    from ..certified_pass import CertifiedPass
    from .cases import Case

NAMES: tuple[str, ...] = get_args(Kernel)
_chosen = "auto"


def chosen() -> str:
    """`"auto"`, what a user gets; `"reference"`; `"cpu"` or `"triton"`, where sizes are drawn so that it takes them."""
    return _chosen


@contextmanager
def using(kernel: str) -> Iterator[None]:
    """Certified calls are computed by this kernel, in every thread, whatever a cache's own setting is.

    Raises: InputError: no such kernel, or Triton without a GPU and not interpreted; MissingDependencyError: `"cpu"` without
        numba, `"triton"` without triton.
    """
    global _chosen
    _require(kernel)
    before, supports, on_device = _chosen, cpu.supports, device_decode.supports
    forced, signs = device_decode.FORCED, shadow.DEVICE_SUMS

    def refused(step: CertifiedPass) -> bool:
        return False

    def refused_too(layer: CertifiedLayer, call: AttentionCall) -> bool:
        return False

    def whatever_is_set(layer: CertifiedLayer, call: AttentionCall) -> bool:
        return on_device(_Asked(layer), call)  # type: ignore[arg-type]

    try:
        _chosen = kernel
        if kernel == "reference":
            cpu.supports = refused
        if kernel in ("reference", "cpu"):
            device_decode.supports = refused_too
        if kernel == "triton":
            device_decode.supports = whatever_is_set
            device_decode.FORCED = shadow.DEVICE_SUMS = True
        yield
    finally:
        _chosen, cpu.supports, device_decode.supports = before, supports, on_device
        device_decode.FORCED, shadow.DEVICE_SUMS = forced, signs


def _require(kernel: str) -> None:
    if kernel not in NAMES:
        raise InputError(f"kernel={kernel!r}: expected one of {', '.join(NAMES)}.")
    if kernel == "cpu" and not cpu.installed():
        raise MissingDependencyError("kernel='cpu' needs numba. Install it with `pip install 'hf_certkv[cpu]'`.")
    if kernel == "triton":
        if not device_decode.installed():
            raise MissingDependencyError("kernel='triton' needs triton. Install it with `pip install 'hf_certkv[gpu]'`.")
        if not torch.cuda.is_available():
            require_interpreter(torch.device("cpu"))


def require_interpreter(device: torch.device) -> None:
    """Raises: InputError: the Triton kernels are to run on the CPU, and are not interpreted."""
    if device.type == "cpu" and not interpreted():
        raise InputError(
            "kernel='triton' on the CPU needs Triton's interpreter: set TRITON_INTERPRET=1 in the environment before "
            "the start, or give a CUDA device."
        )


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted, which takes about a second a call, and one thread."""
    from ..kernels.triton_common import interpreted as found

    return found()


def slow() -> bool:
    """Whether a call takes about a second: then parts look at the clock after every few calls."""
    return _chosen == "triton" and interpreted()


def missed(record: StepRecord, config: CertKVConfig) -> str:
    """Words about a call that the Triton kernels were to compute and did not; those with a tolerance of 0 are for none."""
    exactly = config.certified and config.rtol == config.atol == 0
    return f"computed by {record.kernel}" if _chosen == "triton" and record.kernel != "triton" and not exactly else ""


def start(kernel: str) -> None:
    """The same for the rest of a process: what a worker begins with."""
    using(kernel).__enter__()


class _Asked:
    """A layer whose setting asks for the Triton kernels."""

    def __init__(self, layer: CertifiedLayer) -> None:
        self._layer = layer
        self.config = layer.config.replace(kernel="triton")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def both(narrow: Sequence[Any], wide: Sequence[Any]) -> tuple[Any, ...]:
    """What sizes to draw from: `wide` ones fill vectors and powers of two, `narrow` ones need not."""
    return {"auto": (*narrow, *wide), "cpu": tuple(wide), "triton": tuple(wide)}.get(_chosen, tuple(narrow))


def shaped(case: Case) -> Case:
    """The case in sizes of the kernel that is looked at."""
    return {"cpu": widened, "triton": evened}.get(_chosen, lambda case: case)(case)


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


def evened(case: Case) -> Case:
    """The case with sizes and settings that the Triton kernels take: an even number of value channels, groups that fit.

    Heads have budgets of their own, and promotions follow the bounds.
    """
    from ..kernels.triton_step import format_of

    settings, values = dict(case.settings), case.values
    bits, block = settings.get("value_bits", 4), settings.get("block_size", 16)
    settings["scope"] = "head"
    if settings.get("policy") == "paper":
        settings["policy"] = "budget"
    if bits == 4 and values.shape[-1] % 2:
        values = values.repeat(1, 1, 1, 2)
    group = settings.get("value_group")
    by_default = 32 if bits == 4 else 0
    if format_of(ValueCodec(bits, by_default if group is None else group, False), values.shape[-1], block) is None:
        settings["value_group"] = 0
    return replace(case, values=values, settings=settings)
