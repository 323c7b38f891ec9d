"""Unfinished runs: what is done lies beside the file that a run will write, one part for each process, and is gone on with."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_whole
from .evidence import Evidence
from .task import Outcome, Row


@dataclass
class Progress:
    """What was measured so far. pieces: those done; timings: cache -> piece -> median decode step in ms."""

    pieces: set[str] = field(default_factory=set)
    rows: list[Row] = field(default_factory=list)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, piece: str, outcome: Outcome, steps: int, timed: bool) -> None:
        """Add a finished piece of work; all of it or nothing."""
        for name, runs in outcome.runs.items():
            for run in runs:
                if hasattr(run.cache, "recorder"):
                    self.evidence.setdefault(name, Evidence(steps)).add(run.cache, run.taken)
        if timed:
            for name, spent in (outcome.decode_ms or {}).items():
                self.timings.setdefault(name, {})[piece] = spent
        self.rows += outcome.rows
        self.pieces.add(piece)

    def merge(self, other: Progress) -> None:
        """Add what another process, or an earlier session, has done."""
        self.pieces |= other.pieces
        self.rows += other.rows
        for name, evidence in other.evidence.items():
            if name in self.evidence:
                self.evidence[name].merge(evidence)
            else:
                self.evidence[name] = evidence
        for name, spent in other.timings.items():
            self.timings.setdefault(name, {}).update(spent)
        self.seconds += other.seconds

    def state(self) -> dict[str, Any]:
        """All of it, as plain JSON types."""
        return {
            "pieces": sorted(self.pieces),
            "rows": [row.to_dict() for row in self.rows],
            "evidence": {name: evidence.state() for name, evidence in self.evidence.items()},
            "timings": self.timings,
            "seconds": self.seconds,
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        """What `state` came from."""
        evidence = {name: Evidence.of(part) for name, part in state["evidence"].items()}
        return cls(set(state["pieces"]), [Row(**row) for row in state["rows"]], evidence, state["timings"], state["seconds"])


def piece_of(row: str, pieces: Container[str]) -> str:
    """The piece of work that a row came from: its name, or what stands before the last slash of it."""
    return row if row in pieces else row.rpartition("/")[0]


class Checkpoint:
    """The parts of one unfinished run. Args: out: the file that the run will write; config_hash: of the run."""

    def __init__(self, out: Path, config_hash: str) -> None:
        self.out, self.config_hash = out, config_hash

    def path(self, process: int) -> Path:
        """Where a process keeps what it has done; runs with other settings have other names."""
        return self.out.with_name(f"{self.out.name}.{self.config_hash[:12]}.part-{process}")

    def _parts(self) -> list[Path]:
        before = self.path(0).name.removesuffix("0")
        return sorted(path for path in self.out.parent.iterdir() if path.name.startswith(before))

    def load(self) -> Progress:
        """What all parts of this very run hold; parts of another run, or that cannot be read, do not count."""
        found = Progress()
        parts = [part for part in map(self._read, self._parts()) if part is not None]
        # A part that was taken up into a larger one, by a process that was then stopped, must not count twice.
        for part in sorted(parts, key=lambda part: -len(part.pieces)):
            if not part.pieces & found.pieces:
                found.merge(part)
        return found

    def _read(self, path: Path) -> Progress | None:
        """What a part holds; None if that is not what was written there, or not all of it."""
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            progress = Progress.of(state["progress"])
            whole = (
                state["config_hash"] == self.config_hash
                and {piece_of(row.id, progress.pieces) for row in progress.rows} == progress.pieces
            )
            return progress if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None

    def save(self, process: int, progress: Progress) -> None:
        """Write one process's part whole or not at all."""
        write_whole(self.path(process), json.dumps({"config_hash": self.config_hash, "progress": progress.state()}))

    def consolidate(self, progress: Progress) -> None:
        """Put what earlier sessions did into the first part, and take the others away."""
        self.save(0, progress)
        for path in self._parts():
            if path != self.path(0):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Take all parts away: the run is written."""
        for path in self._parts():
            path.unlink(missing_ok=True)
