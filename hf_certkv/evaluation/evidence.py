"""What the certificates of one cache said over all items of a run: it adds up, and survives an interruption in a file."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from ..cache import CertifiedQuantizedCache
from ..certificate import BINS, Distribution, LayerSummary, Recorder, bin_edge
from ..config import CertKVConfig
from ..report import CertificateReport, MemoryReport
from .trace import Trace

HISTOGRAMS = ("bound", "candidate", "error", "tightness")


class Evidence:
    """Records of a cache's runs, added up. Args: steps: decode steps of the longest item."""

    def __init__(self, steps: int) -> None:
        self.recorder = Recorder(full=False)
        self.recorder.step = -1  # a report has one more
        self.trace = Trace(steps)
        self.memory: MemoryReport | None = None
        self.exact_layers: dict[int, str] = {}

    def add(self, cache: CertifiedQuantizedCache, taken: int | None = None) -> None:
        """Add one run of a cache that keeps every record. Args: taken: its decode steps, as in `Trace.add`."""
        report, recorder = cache.report(), cache.recorder
        steps = sorted({record.step for record in recorder.records})
        if taken is not None and len(steps) > taken:  # few tokens of a prompt, read in a call of their own, are certified, too
            decoded = Recorder(full=True)
            for record in recorder.records:
                if record.step in steps[len(steps) - taken :]:
                    decoded.add(record)
            decoded.commit()
            decoded.materialised, decoded.exact_queries = recorder.materialised, recorder.exact_queries
            decoded.repaired, decoded.step = recorder.repaired, recorder.step
            recorder = decoded
        self.trace.add(recorder.records, taken)
        self.recorder.merge(recorder)
        self._widest(report.memory)
        self.exact_layers = report.exact_layers

    def merge(self, other: Evidence) -> None:
        """Add what another process, or an earlier session, has seen."""
        self.recorder.merge(other.recorder)
        self.trace.merge(other.trace)
        if other.memory is not None:
            self._widest(other.memory)
        self.exact_layers = self.exact_layers or other.exact_layers

    def _widest(self, memory: MemoryReport) -> None:
        """Memory is that of the longest item: sums over items would say nothing."""
        if self.memory is None or memory.dense > self.memory.dense:
            self.memory = memory

    def to_dict(self, settings: CertKVConfig) -> dict[str, Any]:
        """As `CertificateReport.to_dict`, with the trace and histograms."""
        memory = self.memory or MemoryReport({}, 0)
        report = CertificateReport(settings, self.recorder, memory, self.exact_layers).to_dict()
        overall = self.recorder.overall()
        histograms = {name: _histogram(overall.metrics[name]) for name in HISTOGRAMS}
        return {**report, "trace": self.trace.to_dict(), "histograms": histograms}

    def state(self) -> dict[str, Any]:
        """All of it, as plain JSON types."""
        recorder = self.recorder
        return {
            "layers": {str(index): _state(summary) for index, summary in recorder.layers.items()},
            "materialised": recorder.materialised,
            "counts": [recorder.exact_queries, recorder.repaired, recorder.step],
            "trace": self.trace.state(),
            "memory": None if self.memory is None else asdict(self.memory),
            "exact_layers": {str(index): name for index, name in self.exact_layers.items()},
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Evidence:
        """What `state` came from."""
        evidence = cls(1)
        evidence.trace = Trace.of(state["trace"])
        recorder = evidence.recorder
        recorder.exact_queries, recorder.repaired, recorder.step = state["counts"]
        recorder.materialised = dict(state["materialised"])
        for index, summary in state["layers"].items():
            recorder.layers[int(index)] = _summary(summary)
        if state["memory"] is not None:
            evidence.memory = MemoryReport(**state["memory"])
        evidence.exact_layers = {int(index): name for index, name in state["exact_layers"].items()}
        return evidence


def _histogram(distribution: Distribution) -> list[list[float | int | None]]:
    """`[upper edge, count]` of each bin that is not empty; an infinite edge is None."""
    bins = distribution.bins.sum(axis=0)
    return [[bin_edge(int(i)) if i < BINS - 1 else None, int(bins[i])] for i in np.flatnonzero(bins)]


def _state(summary: LayerSummary) -> dict[str, Any]:
    metrics = {}
    for name, part in summary.metrics.items():
        heads, places = np.nonzero(part.bins)
        metrics[name] = {
            "count": part.count.tolist(), "total": part.total.tolist(), "largest": part.largest.tolist(),
            "bins": [heads.tolist(), places.tolist(), part.bins[heads, places].tolist()],
        }  # fmt: skip
    return {
        "heads": summary.heads,
        "rungs": summary.rungs.tolist(),
        "metrics": metrics,
        "counts": [summary.key_blocks, summary.value_blocks, summary.bytes_moved],
        "kernels": dict(summary.kernels),
    }


def _summary(state: dict[str, Any]) -> LayerSummary:
    summary = LayerSummary(state["heads"])
    summary.rungs = np.array(state["rungs"], dtype=np.int64)
    for name, part in state["metrics"].items():
        metric = summary.metrics[name]
        metric.count, metric.total = np.array(part["count"], dtype=np.int64), np.array(part["total"])
        metric.largest = np.array(part["largest"])
        heads, places, counts = part["bins"]
        metric.bins[heads, places] = counts
    summary.key_blocks, summary.value_blocks, summary.bytes_moved = state["counts"]
    summary.kernels = Counter(state["kernels"])
    return summary
