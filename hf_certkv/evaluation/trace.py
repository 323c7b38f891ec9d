"""Decode steps of many items laid over each other and folded into few columns: bounds by layer and head, rungs, bytes moved."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..certificate import StepRecord
from ..ladder import Rung

COLUMNS = 128
GRIDS = ("bound_max", "bound_sum", "bound_count", "candidate_max")  # by row and column


class Trace:
    """What decode steps returned, by layer and head.

    Args: steps: decode steps of the longest item, at least 1; they are folded into at most 128 columns.
    """

    def __init__(self, steps: int) -> None:
        self.steps = max(1, steps)
        self.columns = min(COLUMNS, self.steps)
        self.rows: dict[tuple[int, int], int] = {}  # layer and head -> index
        self.grids = {name: np.zeros((0, self.columns)) for name in GRIDS}
        self.rungs = np.zeros((len(Rung), self.columns), dtype=np.int64)
        self.bytes_moved = np.zeros(self.columns, dtype=np.int64)
        self.items = np.zeros(self.columns, dtype=np.int64)

    def add(self, records: list[StepRecord], taken: int | None = None) -> None:
        """Lay one item's records over the others.

        Args: taken: decode steps, the last of which left the last record: the first may have left none, where the cache was
            too short to be quantised, and steps before them are passed over. None: as many as left records.
        """
        steps = sorted({record.step for record in records})
        taken = len(steps) if taken is None else taken
        places = {step: index for index, step in enumerate(steps, start=taken - len(steps))}
        self.items[np.unique(self._column(np.arange(taken)))] += 1
        for record in records:
            if places[record.step] < 0:
                continue
            column = int(self._column(np.array(places[record.step])))
            figures = record.relative()
            rows = [self._row(record.layer, head) for head in range(record.rung.shape[1])]
            for metric, largest in (("bound", "bound_max"), ("candidate", "candidate_max")):
                values = np.moveaxis(figures[metric], 1, 0).reshape(len(rows), -1)
                known = ~np.isnan(values)
                values = np.where(known, values, 0.0)
                grid = self.grids[largest]
                grid[rows, column] = np.maximum(grid[rows, column], values.max(axis=1, initial=0.0))
                if metric == "bound":
                    self.grids["bound_sum"][rows, column] += values.sum(axis=1)
                    self.grids["bound_count"][rows, column] += known.sum(axis=1)
            self.rungs[:, column] += np.bincount(record.rung.ravel(), minlength=len(Rung))
            self.bytes_moved[column] += record.bytes_moved

    def _column(self, step: np.ndarray) -> np.ndarray:
        column: np.ndarray = np.clip(step, 0, self.steps - 1) * self.columns // self.steps
        return column

    def _row(self, layer: int, head: int) -> int:
        if (layer, head) not in self.rows:
            self.rows[layer, head] = len(self.rows)
            self.grids = {name: np.pad(grid, ((0, 1), (0, 0))) for name, grid in self.grids.items()}
        return self.rows[layer, head]

    def merge(self, other: Trace) -> None:
        """Lay another trace of as many steps over this one."""
        for name in GRIDS:
            for row, index in other.rows.items():
                place = self._row(*row)
                ours, theirs = self.grids[name][place], other.grids[name][index]
                self.grids[name][place] = np.maximum(ours, theirs) if name.endswith("_max") else ours + theirs
        self.rungs = self.rungs + other.rungs
        self.bytes_moved = self.bytes_moved + other.bytes_moved
        self.items = self.items + other.items

    def to_dict(self) -> dict[str, Any]:
        """What a run file holds (docs/evaluation.md), rows in the order of layers and heads."""
        rows = sorted(self.rows)
        order = [self.rows[row] for row in rows]
        count = self.grids["bound_count"]
        mean = np.divide(self.grids["bound_sum"], count, out=np.zeros_like(count), where=count > 0)
        reached = self.items > 0

        def table(values: np.ndarray, known: np.ndarray) -> list[list[float | None]]:
            return [[_outward(float(v)) if k else None for v, k in zip(values[i], known[i], strict=True)] for i in order]

        candidates = np.broadcast_to(reached, count.shape) & (self.grids["candidate_max"] > 0)
        return {
            "steps": self.steps,
            "columns": self.columns,
            "rows": [list(row) for row in rows],
            "bound_max": table(self.grids["bound_max"], count > 0),
            "bound_mean": table(mean, count > 0),
            "candidate_max": table(self.grids["candidate_max"], candidates),
            "rungs": {rung.name.lower(): self.rungs[rung].tolist() for rung in Rung},
            "bytes_moved": self.bytes_moved.tolist(),
            "items": self.items.tolist(),
        }

    def state(self) -> dict[str, Any]:
        """All of it, as plain JSON types."""
        return {
            "steps": self.steps,
            "rows": [list(row) for row in self.rows],
            "grids": {name: grid.tolist() for name, grid in self.grids.items()},
            "rungs": self.rungs.tolist(),
            "bytes_moved": self.bytes_moved.tolist(),
            "items": self.items.tolist(),
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Trace:
        """What `state` came from."""
        trace = cls(state["steps"])
        trace.rows = {(layer, head): index for index, (layer, head) in enumerate(state["rows"])}
        trace.grids = {name: np.array(grid).reshape(len(trace.rows), trace.columns) for name, grid in state["grids"].items()}
        for name in ("rungs", "bytes_moved", "items"):
            setattr(trace, name, np.array(state[name], dtype=np.int64))
        return trace


def _outward(value: float) -> float:
    """Six significant digits, not below the value."""
    rounded = float(f"{value:.5e}")
    return rounded if rounded >= value else float(f"{value * (1 + 1e-5):.5e}")
