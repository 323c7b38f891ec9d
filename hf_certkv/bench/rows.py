"""What the parts' rows have in common: where, which system, the times, and what the certificate said meanwhile."""

from __future__ import annotations

from typing import Any

from ..cache import CertifiedQuantizedCache
from . import statistics
from .harness import Samples

Row = dict[str, Any]


def timed_rows(place: Row, samples: Samples, reference: str, key: str = "over_dense") -> dict[str, Row]:
    """A row by candidate: `place`, the name, seconds, and the ratio to the reference; those that failed say why."""
    rows: dict[str, Row] = {}
    base = samples.seconds.get(reference)
    for name, seconds in samples.seconds.items():
        if not seconds:
            continue
        rows[name] = {**place, "system": name, "seconds": statistics.summary(seconds)}
        rows[name][key] = statistics.ratio(seconds, base) if base else None
    for name, reason in samples.failed.items():
        rows[name] = {**place, "system": name, "failed": reason}
    return rows


def evidence(cache: Any) -> Row:
    """What a cache of this package recorded so far; empty for the others.

    Shares are of head-steps; bytes moved are of one call of one layer; bounds and errors are shares of the output's norm.
    """
    if not isinstance(cache, CertifiedQuantizedCache):
        return {}
    overall = cache.report().to_dict()["overall"]
    if not overall["head_steps"]:
        return {"head_steps": 0}
    shares, relative = overall["rung_share"], overall["relative"]
    return {
        "head_steps": overall["head_steps"],
        "fast_share": shares["fast"] + shares["uncertified"],
        "raised_share": shares["keys"] + shares["values"],
        "dense_share": shares["dense_head"] + shares["dense_layer"],
        "certified": cache.settings.certified,
        "bytes_moved_per_call": overall["bytes_moved"] / max(1, overall["calls"]),
        "bound": relative["bound"],
        "fast_path_bound": relative["candidate"],
        "audited_error": relative["error"],
        "bound_over_error": relative["tightness"],
    }


def growth(rows: list[Row], axis: str = "context") -> list[Row]:
    """The exponent with which each system's time grows, per head size, batch and trace, where there are two contexts."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "seconds" in row:
            groups.setdefault((row["system"], row["head_dim"], row["batch"], row.get("trace")), []).append(row)
    out = []
    for (system, head_dim, batch, trace), members in groups.items():
        sizes = [row[axis] for row in members]
        slope = statistics.exponent(sizes, [row["seconds"]["median"] for row in members])
        if slope is not None:
            out.append(
                {"system": system, "head_dim": head_dim, "batch": batch, "trace": trace, "exponent": slope, "contexts": sizes}
            )
    return out
