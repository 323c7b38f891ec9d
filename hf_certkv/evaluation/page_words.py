"""The sentences of a report, and its lists of items and settings. What is said follows from the figures alone."""

from __future__ import annotations

from typing import Any

from . import page_text as text
from .page_data import CacheView, Cell, Run, is_share, unit_of, verdict

MOST_ITEMS = 1000  # listed on the page; the run file has all


def subtitle(run: Run) -> list[str]:
    """Items and contexts, precision and date."""
    parts = []
    if run["kind"] == "eval":
        contexts = sorted({item["context"] for item in run["items"] if item.get("context")})
        count = len(run["items"])
        parts.append(f"{count:,} item{'' if count == 1 else 's'}")
        if contexts:
            parts.append(f"{', '.join(text.tokens(context) for context in contexts)} tokens")
    model, environment = run["model"], run["environment"]
    parts += [str(model[key]) for key in ("dtype",) if isinstance(model.get(key), str)]
    return parts + [environment[key] for key in ("date",) if isinstance(environment.get(key), str)]


def quality(run: Run, cache: CacheView) -> dict[str, str] | None:
    """The difference from dense for the headline: figure, unit, interval and what it says; None where none was measured."""
    interval = cache.summary.get("difference")
    if not interval:
        return None
    mean, ends = text.difference(interval, 100.0 if is_share(run) else 1.0)
    return {"mean": mean, "unit": unit_of(run), "interval": ends, "verdict": verdict(run, interval)}


def promise(run: Run, cache: CacheView) -> dict[str, str]:
    """What was proved of a certified cache, and what was not."""
    counts = cache.shares
    dense, total = counts["dense"], cache.head_steps
    if not total:
        proved = "Nothing was quantised in this run: every step was computed exactly, so there was nothing to bound."
    else:
        allowed = _allowance(cache)
        proved = (
            f"Of {total:,} head-steps (one attention head at one decode step), {total - dense:,} returned an output proven "
            f"to be within {allowed} of exact attention over this run's keys and values; {dense:,} were "
            "recomputed densely from the originals."
        )
    exact = cache.certificate.get("exact_head_steps", 0) if cache.certificate else 0
    if exact:
        proved += f" {exact:,} more were computed exactly from the originals (prefill, or what the certificate does not cover)."
    open_ = (
        "Anything about the text. The promise is per head and per step, about attention output; errors within the tolerance "
        "travel on through the model."
    )
    if cache.summary.get("difference"):
        count = cache.summary["items"]
        open_ += f" The difference in quality was measured on {count:,} item{'' if count == 1 else 's'}, not proved."
    return {"proved": proved, "open": open_}


def _allowance(cache: CacheView) -> str:
    relative = f"{text.tolerance_text(cache.rtol or 0.0)} of its norm"
    allowed = f"{relative} plus {cache.atol:g}" if cache.atol else relative
    return f"{allowed} (shared by the heads of a layer)" if cache.shared else allowed


def caution(run: Run, caches: list[CacheView]) -> list[str]:
    """What a reader must know before the figures."""
    out = []
    uncertified = [cache.name for cache in caches if cache.uncertified]
    if uncertified:
        names = ", ".join(uncertified)
        out.append(
            f"{names}: UNCERTIFIED. Its bounds are logged, not enforced; whatever is above the tolerance was returned all the "
            "same."
        )
    if not any(cache.certified for cache in caches):
        out.append("There is no certified cache in this run: nothing here was proved.")
    loose = [cache.name for cache in caches if cache.certified and (cache.atol or cache.shared)]
    if loose:
        out.append(
            f"{', '.join(loose)}: the tolerance has an absolute part or is shared by the heads of a layer, so a single head's "
            "relative bound may lie above the relative tolerance that is drawn."
        )
    for cache in caches:
        repaired = (cache.certificate or {}).get("repaired_blocks", 0)
        if repaired:
            out.append(f"{cache.name}: {repaired:,} damaged block(s) were found by their checksum and repaired.")
    return out


def depth_rows(depths: list[Any], contexts: list[int], cells: dict[tuple[Any, int], Cell]) -> list[dict[str, Any]]:
    """Rows of a table of mean scores: label, and for each context the mean and how many items, or None."""
    out = []
    for depth in depths:
        row: list[dict[str, Any] | None] = []
        for context in contexts:
            cell = cells.get((depth, context))
            row.append(None if cell is None else {"mean": cell.total / cell.items, "items": cell.items})
        label = text.part_of(depth, 1.0) if isinstance(depth, (int, float)) and 0 <= depth <= 1 else text.plain(depth)
        out.append({"label": label.replace(".0 %", " %"), "cells": row})
    return out


def item_rows(run: Run, caches: list[CacheView]) -> dict[str, Any] | None:
    """Every item with its scores, those that differ most from dense first; None where there are none."""
    items = run.get("items", [])
    if not items:
        return None

    def apart(item: dict[str, Any]) -> float:
        scores = [score["score"] for score in item["scores"].values() if score["score"] is not None]
        return max(scores) - min(scores) if scores else 0.0

    rows = []
    for item in sorted(items, key=apart, reverse=True)[:MOST_ITEMS]:
        scores = []
        for cache in caches:
            score = item["scores"].get(cache.name, {}).get("score")
            right = {1: "right", 0: "wrong"}.get(score) if is_share(run) and score is not None else None
            scores.append(right or (text.NONE if score is None else text.short(score, 5)))
        group = ", ".join(f"{key} {text.plain(value)}" for key, value in (item.get("group") or {}).items())
        context = text.tokens(item["context"]) if item.get("context") else text.NONE
        rows.append({"id": text.plain(item["id"]), "context": context, "group": group, "scores": scores})
    return {"rows": rows, "all": len(items), "grouped": any(row["group"] for row in rows)}


def named(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """How it was measured: title, and names with values."""
    parts = [("Task", {"name": run["task"]["name"], **(run["task"].get("settings") or {})})] if "task" in run else []
    parts += [("Model", run["model"]), ("Environment", run["environment"])]
    more = {key: run[key] for key in ("config_hash", "processes") if run.get(key) is not None}
    shown = [(title, [(key, text.plain(value)) for key, value in part.items()]) for title, part in parts]
    rest = [(key.replace("_", " "), text.plain(value)) for key, value in more.items()]
    if run.get("seconds") is not None:
        rest.append(("took", text.seconds(run["seconds"])))
    return [*shown, ("Run", [("format", f"{run['format']} {run['version']}"), ("kind", run["kind"]), *rest])]
