"""One certified call on a GPU: a fixed sequence of Triton kernels, whose record is fetched when somebody asks for it.

The host decides nothing and waits for nothing. So damage that a kernel finds in a page of originals cannot end in an error at
once: the heads that needed the page come out as NaN, and the typed error is raised when a later step, or a report, looks at the
record.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .attention import AttentionCall
from .audit import audit_step
from .certificate import StepRecord
from .errors import CorruptedPageError
from .inputs import StepInputs
from .ladder import Rung
from .layers import CertifiedLayer
from .precision import full_precision

if TYPE_CHECKING:
    from .kernels.triton_step import DeviceStep

POLICIES = ("budget", "naive")
FORCED = False  # whether calls on the CPU are computed by Triton's interpreter: for tests of caches that do not ask for it
MOST_ROWS = 64  # query rows of a KV head
LEAST_CAPABILITY = (8, 0)  # Ampere; before, Triton has no products of bytes


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether triton can be imported."""
    return find_spec("triton") is not None


def supports(layer: CertifiedLayer, call: AttentionCall) -> bool:
    """Whether the Triton kernels are asked for, can run where the layer lies, and have code for its format and the call."""
    config = layer.config
    asked = config.kernel == "triton" or (config.kernel == "auto" and (layer.device.type == "cuda" or FORCED))
    if not asked or config.scope != "head" or config.policy not in POLICIES or call.softcap == 0 or not installed():
        return False
    if not runs_on(layer.device):
        return False
    rows = call.query.shape[1] // layer.heads * call.query.shape[2]
    shadow = layer.shadow
    if rows > MOST_ROWS or shadow is None or not shadow.signs:
        return False
    from .kernels.triton_step import stored

    return layer.memo("triton", lambda: stored(layer)) is not None


@lru_cache(maxsize=8)
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU whose tensor cores multiply bytes, or a CPU where triton interprets."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    from .kernels.triton_common import interpreted

    return interpreted()


def decode(layer: CertifiedLayer, call: AttentionCall) -> Tensor:
    """Attention of a few queries over a quantised layer: certified, or dense on the originals; head by head.

    Returns: `[batch, query_heads, positions, value channels]`, in the query's dtype.
    Raises: CertificateViolation, BlocksRepairedError, CorruptedPageError: with audit, which waits.
    """
    assert layer.shadow is not None
    layer.shadow.ready()
    layer.hot.ready()
    # Kernels need no guard; what torch computes of a mask, or of an audit, does.
    guard = full_precision(layer.device.type) if call.mask is not None or layer.config.audit else nullcontext()
    with guard, torch.cuda.device(layer.device) if layer.device.type == "cuda" else nullcontext():
        step = DeviceDecode(layer, call)
        step.device.run()
        error = audit_step(step) if layer.config.audit else None
    if layer.hot.slots and layer.refills and layer.config.certified:
        layer.promoted = step.promoted()
    if not capturing(layer.device):
        layer.cache.recorder.add(DeviceRecord(step, error))
    return step.output.reshape(step.shape[0], call.query.shape[1], -1, step.shape[3])


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured in a CUDA graph: its replays keep no records."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DeviceDecode(StepInputs):
    """A call that the device computes. What is looked at here besides `output` makes the host wait: for audit."""

    whole_layer = False

    @cached_property
    def device(self) -> DeviceStep:
        """The kernels' side of it."""
        from .kernels.triton_step import DeviceStep

        return DeviceStep(self)

    @property
    def output(self) -> Tensor:
        """What is returned, `[B, H, R, W]` in the layer's type."""
        return self.device.result

    @cached_property
    def dense(self) -> Tensor:
        """Which KV heads were left to the dense rung: bool `[B, H]`."""
        return self.device.dense.view(self.shape[:2]) > 0

    @cached_property
    def bound(self) -> Tensor:
        """The bounds of what is returned: float64 `[B, H, R]`."""
        from .kernels.triton_certify import BOUND

        made = self.device
        return torch.where(self.dense.unsqueeze(-1), made.dense_bound.view(self.shape[:3]), made.row_figure(BOUND))

    @property
    def key_level(self) -> Tensor:
        """Levels of the blocks' keys: int32 `[B, H, N]`."""
        return self.device.levels[0].view(*self.shape[:2], self.blocks)

    @property
    def value_level(self) -> Tensor:
        """Levels of the blocks' values."""
        return self.device.levels[1].view(*self.shape[:2], self.blocks)

    def promoted(self) -> Tensor:
        """The mass of blocks at the originals, 0 of the others, for the next refill of the hot slots: float32 `[B, H, N]`."""
        mass = self.device.block_figure(0).amax(2).float().clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where((self.key_level == 2) | (self.value_level == 2), mass, 0.0)


class DeviceRecord:
    """`certificate.DeferredRecord` of a call: its figures are on their way to the host."""

    def __init__(self, step: DeviceDecode, error: Tensor | None) -> None:
        layer, told = step.layer, step.device.told
        self.layer, self.step, self.config = layer.layer_idx, layer.cache.recorder.step, layer.config
        self.shape, self.positions = step.shape[:3], 1 if step.packed else step.call.query.shape[2]
        self.pages, self.planes = step.device.page_bytes, step.device.plane_bytes
        self.error = None if error is None else error.cpu().numpy()
        self.unit_bytes = step.blocks * sum(self.pages)
        pinned = told.device.type == "cuda"
        self.told = torch.empty(told.shape, dtype=told.dtype, pin_memory=pinned)
        self.told.copy_(told, non_blocking=pinned)
        self.event = torch.cuda.Event() if pinned else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(told.device))
        self._found: StepRecord | None = None

    def done(self) -> bool:
        """Whether the figures have arrived."""
        return self.event is None or self.event.query()

    def _parts(self) -> list[np.ndarray]:
        """Facts of the rows, counts of the units, norms and bounds of dense rows, trouble."""
        from .kernels.triton_certify import FACTS
        from .kernels.triton_climb import COUNTS

        if self.event is not None:
            self.event.synchronize()
        batch, heads, rows = self.shape
        units = batch * heads
        sizes = (units * rows * FACTS.value, units * COUNTS.value, units * rows, units * rows)
        flat = np.split(self.told.numpy(), np.cumsum(sizes))
        shapes: list[Any] = [(*self.shape, FACTS.value), (batch, heads, COUNTS.value), self.shape, self.shape]
        return [part.reshape(shape) for part, shape in zip(flat, shapes, strict=False)] + [flat[4].view(np.int32)]

    def require_sound(self) -> None:
        """Raises: CorruptedPageError: a page did not have its checksum."""
        code, unit, block = (int(x) for x in self._parts()[4][:3])
        if code:
            kind = ("keys", "values")[code >> 1 & 1]
            raise CorruptedPageError(
                f"Layer {self.layer}, step {self.step}: the originals of block {block} ({kind}, batch row "
                f"{unit // self.shape[1]}, KV head {unit % self.shape[1]}) no longer match their checksum. Host memory was "
                "overwritten or is faulty; what needed this page came out as NaN. Rebuild the cache from the prompt."
            )

    def fetch(self) -> StepRecord:
        """The record; waits for the device."""
        if self._found is None:
            self._found = self._record()
        return self._found

    def _record(self) -> StepRecord:
        from .kernels import triton_certify as at

        facts, counts, norm, bound, _ = self._parts()
        dense = np.broadcast_to(counts[..., 7:8] > 0, self.shape)
        by_head = (self.shape[0], self.shape[1] * self.shape[2] // self.positions, self.positions)
        figures = {name: facts[..., getattr(at, name).value] for name in ("CANDIDATE", "BOUND", "EXPECTED", "NORM", "MET")}
        rung = np.full(self.shape, int(Rung.FAST), dtype=np.int64)
        for which, raised in ((0, Rung.KEYS), (1, Rung.VALUES)):
            rung[np.broadcast_to(counts[..., which : which + 1] > 0, self.shape)] = int(raised)
        # A head that met its tolerance at once counts as fast, although it uses what was raised for others of its group.
        rung[figures["MET"] > 0] = int(Rung.FAST)
        rung[dense] = int(Rung.DENSE_HEAD)
        if not self.config.certified:
            rung.fill(int(Rung.UNCERTIFIED))
        moved = counts[..., 2].sum() * self.pages[0] + counts[..., 3].sum() * self.pages[1]
        if self.config.refine == "host":
            moved += counts[..., 4].sum() * self.planes[0] + counts[..., 5].sum() * self.planes[1]
        moved += float((counts[..., 7] > 0).sum()) * self.unit_bytes
        error = np.full(self.shape, np.nan) if self.error is None else self.error
        return StepRecord(
            self.step,
            self.layer,
            rung.reshape(by_head),
            figures["CANDIDATE"].reshape(by_head).copy(),
            np.where(dense, bound, figures["BOUND"]).reshape(by_head),
            np.where(dense, 0.0, figures["EXPECTED"]).reshape(by_head),
            np.where(dense, norm, figures["NORM"]).reshape(by_head),
            error.reshape(by_head),
            counts[..., 0].astype(np.int64),
            counts[..., 1].astype(np.int64),
            int(moved),
            "triton",
        )
