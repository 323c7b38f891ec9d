"""Records of what was returned, and their summaries over steps at constant memory. Merging keeps every figure exact.

A summary of seven histograms costs as much for one record as for sixty, so records wait until there are some of them. Adding
them together gives the figures of adding them one by one, bit for bit; whoever looks at a summary finds nothing waiting.

Relative figures are shares of the returned head output's L2 norm. Quantiles come from histograms with sixteen bins a
decade and are the upper edge of their bin: at most 15 % above the exact quantile, never below.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Any, Protocol

import numpy as np

from .interrupts import uninterrupted
from .ladder import Rung

WAITING = 64  # records of a layer that are added to its summary together
BINS_PER_DECADE = 16
LOWEST, HIGHEST = -14, 6  # decades
BINS = (HIGHEST - LOWEST) * BINS_PER_DECADE + 2  # below, inside, above (and what is not a number)
METRICS = ("candidate", "bound", "dense_bound", "expected", "error", "tightness")
FIGURES = ("candidate", "bound", "expected", "norm", "error")
DENSE = (Rung.DENSE_HEAD, Rung.DENSE_LAYER)


@dataclass(frozen=True)
class StepRecord:
    """One attention call of one layer. Arrays are float64 or int `[batch, query_heads, positions]`.

    Attributes:
        step: the cache's step; layer: index; rung: `Rung` values.
        candidate: bound of the fast path (NaN where the call went straight to the dense rung); bound: of what was returned.
        expected: E_rms, the error to expect if residuals are uncorrelated (an estimate); norm: ||O||_2.
        error: the true error found by audit, NaN without.
        key_blocks, value_blocks: promoted, int `[batch, kv_heads]`; bytes_moved: from host memory, for the whole call.
        kernel: what read the codes, as in `CertKVConfig.kernel`: "cpu" or "reference"; "none" where all heads went straight to
            the dense rung.
    """

    step: int
    layer: int
    rung: np.ndarray
    candidate: np.ndarray
    bound: np.ndarray
    expected: np.ndarray
    norm: np.ndarray
    error: np.ndarray
    key_blocks: np.ndarray
    value_blocks: np.ndarray
    bytes_moved: int
    kernel: str

    def relative(self) -> dict[str, np.ndarray]:
        """The metrics: bounds and errors over the output's norm, and bound over true error.

        `bound` is that of certified outputs and NaN elsewhere; `dense_bound`, the rounding bound of dense ones, may exceed
        the tolerance: nothing more exact can be had. `tightness` is of certified outputs.
        """
        return _relative(self.rung, *(getattr(self, name) for name in FIGURES))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; NaN becomes None."""
        out: dict[str, Any] = {"step": self.step, "layer": self.layer, "kernel": self.kernel, "bytes_moved": self.bytes_moved}
        for name in ("rung", "key_blocks", "value_blocks"):
            out[name] = getattr(self, name).tolist()
        for name in FIGURES:
            values: np.ndarray = getattr(self, name)
            out[name] = np.where(np.isfinite(values), values.astype(object), np.array(None, dtype=object)).tolist()
        return out


def _relative(
    rung: np.ndarray, candidate: np.ndarray, bound: np.ndarray, expected: np.ndarray, norm: np.ndarray, error: np.ndarray
) -> dict[str, np.ndarray]:
    """`StepRecord.relative`, of any number of records in arrays of any shape."""
    dense = (rung == Rung.DENSE_HEAD) | (rung == Rung.DENSE_LAYER)
    with np.errstate(divide="ignore", invalid="ignore"):
        figures = {"candidate": candidate / norm, "bound": bound / norm, "expected": expected / norm, "error": error / norm}
        figures["dense_bound"] = np.where(dense, figures["bound"], np.nan)
        figures["bound"] = np.where(dense, np.nan, figures["bound"])
        figures["tightness"] = figures["bound"] / figures["error"]
    return figures


def bin_of(values: np.ndarray) -> np.ndarray:
    """Histogram bin of each value; what is not a finite number falls in the last."""
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.floor((np.log10(values) - LOWEST) * BINS_PER_DECADE) + 1
    place = np.where(values <= 0, 0, np.where(np.isfinite(values), place, BINS - 1))
    return np.clip(place, 0, BINS - 1).astype(np.int64)


def bin_edge(place: int) -> float:
    """Upper edge of a bin; infinite for the last."""
    if place >= BINS - 1:
        return float("inf")
    return float(10.0 ** (LOWEST + place / BINS_PER_DECADE))


@dataclass
class Distribution:
    """Count, sum, maximum and histogram of one metric, per head: mergeable."""

    heads: int
    count: np.ndarray = field(init=False)
    total: np.ndarray = field(init=False)
    largest: np.ndarray = field(init=False)
    bins: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.count = np.zeros(self.heads, dtype=np.int64)
        self.total = np.zeros(self.heads)
        self.largest = np.zeros(self.heads)
        self.bins = np.zeros((self.heads, BINS), dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Add `[batch, heads, positions]`; NaN entries are figures that were not measured and are passed over."""
        self._replace(self._with(values[None]))

    def _with(self, values: np.ndarray) -> tuple[np.ndarray, ...] | None:
        """Count, total, maximum and bins with `[records, batch, heads, positions]` added; None where they stay as they are."""
        flat = np.moveaxis(values, 2, 1).reshape(len(values), self.heads, -1)
        known = ~np.isnan(flat)
        if not known.any():
            return None
        measured = np.where(known, flat, 0.0)
        # One record after the other, as if each had been added alone: sums depend on their order.
        total = np.add.accumulate(np.concatenate([self.total[None], measured.sum(axis=2)]))[-1]
        heads = np.broadcast_to(np.arange(self.heads)[:, None], flat.shape)
        bins = np.bincount(heads[known] * BINS + bin_of(flat[known]), minlength=self.bins.size).reshape(self.bins.shape)
        largest = np.maximum(self.largest, measured.max(axis=(0, 2)))
        return self.count + known.sum(axis=(0, 2)), total, largest, self.bins + bins

    def _replace(self, figures: tuple[np.ndarray, ...] | None) -> None:
        if figures is not None:
            self.count, self.total, self.largest, self.bins = figures

    def widen(self, more: int) -> None:
        """Have so many more heads, of which nothing was measured."""
        self.heads += more
        self.count, self.total, self.largest = (np.pad(part, (0, more)) for part in (self.count, self.total, self.largest))
        self.bins = np.pad(self.bins, ((0, more), (0, 0)))

    def merge(self, other: Distribution) -> None:
        """Add another distribution of the same heads."""
        self.count, self.total = self.count + other.count, self.total + other.total
        self.largest, self.bins = np.maximum(self.largest, other.largest), self.bins + other.bins

    def summary(self, head: int | None = None) -> dict[str, float | int] | None:
        """Count, mean, max, and quantiles of one head, or of all; None where nothing was measured."""
        part = slice(None) if head is None else slice(head, head + 1)
        count = int(self.count[part].sum())
        if count == 0:
            return None
        cumulative = np.cumsum(self.bins[part].sum(axis=0))
        largest = float(self.largest[part].max())
        out: dict[str, float | int] = {"count": count, "mean": float(self.total[part].sum()) / count, "max": largest}
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            out[name] = min(bin_edge(int(np.searchsorted(cumulative, share * count))), largest)
        return out


@dataclass
class LayerSummary:
    """What one layer returned, over all steps so far."""

    heads: int
    rungs: np.ndarray = field(init=False)
    metrics: dict[str, Distribution] = field(init=False)
    key_blocks: int = 0
    value_blocks: int = 0
    bytes_moved: int = 0
    kernels: Counter[str] = field(default_factory=Counter)  # calls by kernel

    def __post_init__(self) -> None:
        self.rungs = np.zeros((self.heads, len(Rung)), dtype=np.int64)
        self.metrics = {name: Distribution(self.heads) for name in METRICS}

    @property
    def calls(self) -> int:
        """Calls, by whatever kernel."""
        return self.kernels.total()

    def add(self, record: StepRecord) -> None:
        """Add one call."""
        self.add_all([record])

    def add_all(self, records: list[StepRecord]) -> None:
        """Add calls of one shape, in their order. Atomic."""
        rung = np.stack([record.rung for record in records])
        places = np.arange(self.heads)[:, None] * len(Rung) + rung
        rungs = self.rungs + np.bincount(places.ravel(), minlength=self.rungs.size).reshape(self.rungs.shape)
        figures = _relative(rung, *(np.stack([getattr(record, name) for record in records]) for name in FIGURES))
        metrics = [(self.metrics[name], self.metrics[name]._with(values)) for name, values in figures.items()]
        key_blocks, value_blocks = (
            sum(int(getattr(record, name).sum()) for record in records) for name in ("key_blocks", "value_blocks")
        )
        kernels = self.kernels + Counter(record.kernel for record in records)
        # Nothing from here on can fail.
        self.rungs = rungs
        for distribution, values in metrics:
            distribution._replace(values)
        self.key_blocks += key_blocks
        self.value_blocks += value_blocks
        self.bytes_moved += sum(record.bytes_moved for record in records)
        self.kernels = kernels

    def add_any(self, records: list[StepRecord], heads: int) -> None:
        """Add calls of one shape with so many heads: where layers share keys and values, another number may come."""
        if heads == self.heads:
            self.add_all(records)
            return
        part = LayerSummary(heads)
        part.add_all(records)
        self.merge(part)

    def _widen(self, heads: int) -> None:
        more = heads - self.heads
        self.rungs = np.pad(self.rungs, ((0, more), (0, 0)))
        for distribution in self.metrics.values():
            distribution.widen(more)
        self.heads = heads

    def merge(self, other: LayerSummary) -> None:
        """Add another summary; the wider of the two says how many heads there are."""
        if other.heads > self.heads:
            self._widen(other.heads)
        elif other.heads < self.heads:
            other = copy.deepcopy(other)
            other._widen(self.heads)
        self.rungs = self.rungs + other.rungs
        for name, distribution in self.metrics.items():
            distribution.merge(other.metrics[name])
        self.key_blocks += other.key_blocks
        self.value_blocks += other.value_blocks
        self.bytes_moved += other.bytes_moved
        self.kernels = self.kernels + other.kernels

    def to_dict(self, heads: bool = True) -> dict[str, Any]:
        """Shares and figures of the layer and, unless switched off, of each head."""
        count = int(self.rungs.sum())
        out: dict[str, Any] = {
            "head_steps": count,
            "rungs": {rung.name.lower(): int(self.rungs[:, rung].sum()) for rung in Rung},
            "promoted_key_blocks": self.key_blocks,
            "promoted_value_blocks": self.value_blocks,
            "bytes_moved": self.bytes_moved,
            "calls": self.calls,
            "kernels": dict(self.kernels),
            "relative": {name: part.summary() for name, part in self.metrics.items()},
        }
        if heads:
            out["heads"] = [
                {
                    "rungs": {rung.name.lower(): int(self.rungs[head, rung]) for rung in Rung},
                    "relative": {name: part.summary(head) for name, part in self.metrics.items()},
                }
                for head in range(self.heads)
            ]
        return out


class DeferredRecord(Protocol):
    """A record that a device still computes. Attributes: layer: index."""

    layer: int

    def done(self) -> bool:
        """Whether it can be had without waiting."""

    def require_sound(self) -> None:
        """Raises: CorruptedPageError: the step met a damaged page; what it returned is NaN where that was needed."""

    def fetch(self) -> StepRecord:
        """The record; waits for the device."""


Record = StepRecord | DeferredRecord


def found_of(record: Record) -> StepRecord:
    """The record itself, whoever computed it."""
    return record if isinstance(record, StepRecord) else record.fetch()


def is_there(record: Record) -> bool:
    """Whether a record can be had without waiting."""
    return isinstance(record, StepRecord) or record.done()


class Recorder:
    """Collects records. Those of a step under way are held back, so that a step that fails leaves no trace.

    Attributes: records: all that count, if `full`; materialised: operations served with originals, and how often;
        exact_queries: head-steps computed exactly; repaired: damaged blocks found and repaired, which counts at once, for the
        damage was real whatever becomes of the step; step: the cache's.
    """

    def __init__(self, full: bool) -> None:
        self.full = full
        self._records: list[Record] = []
        self.materialised: dict[str, int] = {}
        self.exact_queries = 0
        self.repaired = 0
        self.step = 0
        self._pending: list[Record] = []
        self._unseen: list[DeferredRecord] = []  # of steps that are over, which may still tell of damage
        self._pending_exact = 0
        self._summaries: dict[int, LayerSummary] = {}
        self._waiting: dict[int, list[Record]] = {}  # these count, and are not in the summaries yet

    @property
    def records(self) -> list[StepRecord]:
        """Every record, in order, where all are kept."""
        self._records = [found_of(record) for record in self._records]
        return self._records  # type: ignore[return-value]

    def add(self, record: Record) -> None:
        """Hold a record until its step is over."""
        self._pending.append(record)

    def add_exact(self, head_steps: int) -> None:
        """Count head-steps computed exactly from the originals: many queries, or not what the certificate covers."""
        self._pending_exact += head_steps

    def commit(self) -> None:
        """The step under way succeeded: its records count.

        Raises: CorruptedPageError: a device found a damaged page in an earlier step, and has told so by now.
        """
        pending, self._pending = self._pending, []
        if self.full:
            self._records += pending
        self._unseen += [record for record in pending if not isinstance(record, StepRecord)]
        self.exact_queries += self._pending_exact
        self._pending_exact = 0
        for record in pending:
            self._waiting.setdefault(record.layer, []).append(record)
        for layer in {record.layer for record in pending}:
            # Layers take turns, so that no step has to wait for the summaries of all.
            if (self.step + layer) % WAITING == 0 or len(self._waiting[layer]) >= 2 * WAITING:
                self._summarise(layer)
        self.look()

    def look(self, wait: bool = False) -> None:
        """See whether steps that a device computed met a damaged page. Args: wait: for those that are not done, too.

        Raises: CorruptedPageError: once for each.
        """
        while self._unseen and (wait or self._unseen[0].done()):
            self._unseen.pop(0).require_sound()

    def discard(self) -> None:
        """The step under way failed: as if it had not been."""
        self._pending, self._pending_exact = [], 0

    def _summarise(self, layer: int, wait: bool = False) -> None:
        """Add what waits to its summary. Args: wait: for a device, too; else up to the first record that it is busy with."""
        waiting = self._waiting[layer]
        with uninterrupted():
            ready = list(waiting) if wait else list(takewhile(is_there, waiting))
            waiting[: len(ready)] = found = [found_of(record) for record in ready]
            for _, alike in groupby(found, key=lambda record: record.rung.shape):
                records = list(alike)
                heads = records[0].rung.shape[1]
                self._summaries.setdefault(layer, LayerSummary(heads)).add_any(records, heads)
                del waiting[: len(records)]

    @property
    def layers(self) -> dict[int, LayerSummary]:
        """What each layer returned, by index; of steps that are over. Waits for a device; raises as `look`."""
        for layer in self._waiting:
            self._summarise(layer, wait=True)
        self.look(wait=True)
        return self._summaries

    def __getstate__(self) -> dict[str, Any]:
        """For copies: nothing waits."""
        return {**self.__dict__, "_summaries": self.layers, "_records": self.records}

    def overall(self) -> LayerSummary:
        """All layers together, heads not told apart."""
        merged = LayerSummary(1)
        for summary in self.layers.values():
            flat = LayerSummary(1)
            flat.rungs = summary.rungs.sum(axis=0, keepdims=True)
            for name, part in summary.metrics.items():
                single = flat.metrics[name]
                single.count, single.total = part.count.sum(keepdims=True), part.total.sum(keepdims=True)
                single.largest, single.bins = part.largest.max(keepdims=True), part.bins.sum(axis=0, keepdims=True)
            flat.key_blocks, flat.value_blocks = summary.key_blocks, summary.value_blocks
            flat.bytes_moved, flat.kernels = summary.bytes_moved, summary.kernels
            merged.merge(flat)
        return merged

    def merge(self, other: Recorder) -> None:
        """Add all steps of another recorder of the same model and settings."""
        for layer, summary in other.layers.items():
            mine = self.layers.get(layer)
            if mine is None:
                self._summaries[layer] = copy.deepcopy(summary)
            else:
                mine.merge(summary)
        for name, count in other.materialised.items():
            self.materialised[name] = self.materialised.get(name, 0) + count
        self.exact_queries += other.exact_queries
        self.repaired += other.repaired
        self.step += other.step + 1
        if self.full:
            self._records += other._records
