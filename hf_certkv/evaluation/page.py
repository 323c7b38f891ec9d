"""The report of one or more runs as one HTML file that needs nothing else: no network, no script to see every figure."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from . import page_charts as charts
from . import page_heat as heat
from . import page_text as text
from .page_data import (
    KINDS,
    RUNGS,
    CacheView,
    Run,
    caches_of,
    depth_grid,
    headline_first,
    histogram_of,
    is_against_itself,
    is_share,
    longest_context,
    planned_of,
    task_name,
    unit_of,
    verdict,
    with_measured,
)
from .page_words import caution, depth_rows, item_rows, named, promise, quality, subtitle

HERE = Path(__file__).parent
GROUPS = {"fast": "fast path", "raised": "raised", "dense": "dense", "uncertified": "UNCERTIFIED"}
BOUNDS = {"candidate": ("fast path alone", "candidate"), "bound": ("bound returned", "bound"),
          "error": ("true error, audited", "error")}  # fmt: skip


def page(runs: Sequence[Run]) -> str:
    """The page of these runs, in order, as HTML. Runs have passed `runs.check_run`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(charts=charts, heat=heat, text=text, GROUPS=GROUPS, RUNGS=RUNGS, KINDS=KINDS)
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    script = f"\n{script}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    views = [view(run, place) for place, run in enumerate(runs)]
    return environment.get_template("page.html").render(
        runs=views, script=Markup(script), style=Markup(f"{style}\n{_ramps()}"), digest=digest, title=_title(runs)
    )


def view(run: Run, place: int) -> dict[str, Any]:
    """Everything that the template shows of one run."""
    caches = caches_of(run)
    bounded = [cache for cache in caches if cache.certificate is not None]
    certified = headline_first(caches)
    # The certified cache comes first wherever one is chosen.
    ordered = [*certified, *(cache for cache in bounded if cache not in certified)]
    measured_at = longest_context(run)
    return {
        "id": f"run-{place + 1}", "number": place + 1, "run": run, "model": run["model"]["name"], "task": task_name(run),
        "subtitle": subtitle(run),
        "complete": run.get("complete", True), "caches": caches, "certified": certified,
        "traced": [cache for cache in ordered if cache.trace],
        "headline": [_headline(run, cache) for cache in certified],
        "share": is_share(run), "unit": unit_of(run), "scale": 100.0 if is_share(run) else 1.0,
        "metric": run.get("task", {}).get("metric"), "compared": [_compared(run, cache) for cache in caches],
        "against_itself": is_against_itself(run), "differs": any(cache.summary.get("difference") for cache in caches),
        "caution": caution(run, caches),
        "ordered": [cache for cache in ordered if cache.head_steps],
        "histograms": [part for cache in ordered if (part := _histograms(cache))],
        "planned": [part for cache in ordered if (part := _planned(run, cache, measured_at))],
        "depths": _depths(run, caches), "breakdowns": _breakdowns(run, caches),
        "items": item_rows(run, caches), "settings": named(run),
    }  # fmt: skip


def _headline(run: Run, cache: CacheView) -> dict[str, Any]:
    found, time = quality(run, cache), cache.time_over_dense or {}
    if found is not None:
        chart = charts.small_interval(cache.summary["difference"], f"difference {found['mean']}, interval {found['interval']}")
        found = {**found, "chart": chart}
    quartiles = (time["q1"], time["q3"]) if time.get("q1") is not None and time.get("q3") is not None else None
    return {
        "cache": cache, "quality": found, "promise": promise(run, cache), "quartiles": quartiles,
        "largest": cache.figure("bound", "max"), "median": cache.figure("bound", "p50"),
    }  # fmt: skip


def _compared(run: Run, cache: CacheView) -> dict[str, Any]:
    """A row of the table of all caches: its cells as text."""
    summary, scale = cache.summary, 100.0 if is_share(run) else 1.0
    mean, ends = text.difference(summary.get("difference"), scale)
    score = summary.get("score")
    pairs, time = summary.get("discordant"), cache.time_over_dense
    return {
        "cache": cache,
        "score": text.NONE if score is None else text.part_of(score, 1.0) if is_share(run) else text.short(score, 4),
        "perplexity": text.short(summary.get("perplexity"), 4), "difference": mean, "interval": ends,
        "verdict": verdict(run, summary["difference"]) if summary.get("difference") else "",
        "discordant": f"+{pairs['better']:,} / {text.MINUS}{pairs['worse']:,}" if pairs else text.NONE,
        "p": text.p_value(pairs.get("p")) if pairs else text.NONE,
        "kl": text.short(summary.get("kl")),
        "equal": text.NONE if summary.get("equal") is None else text.part_of(summary["equal"], 1.0),
        "same_top": text.NONE if summary.get("same_top") is None else text.part_of(summary["same_top"], 1.0),
        "shares": {name: text.part_of(number, cache.head_steps) for name, number in cache.shares.items()},
        "bounds": [text.upward(cache.figure("bound", key)) for key in ("p50", "p99", "max")],
        "memory": text.short(cache.over_dense),
        "device": text.size((cache.memory or {}).get("device_bytes")),
        "time": text.short(time["median"] if time else None),
        "ms": text.short(((cache.speed or {}).get("decode_ms") or {}).get("median")),
    }  # fmt: skip


def _histograms(cache: CacheView) -> dict[str, Any] | None:
    bounds = charts.histograms(cache, BOUNDS, cache.rtol or None, f"tolerance {text.tolerance_text(cache.rtol or 0)}", True)
    tightness = charts.histograms(
        cache,
        {"tightness": ("bound over true error", "tightness")},
        1.0,
        "1: bound and error are equal; left of it would be a broken promise",
        False,
    )
    if not bounds and not tightness:
        return None
    found = histogram_of(cache, "tightness")
    tables = []
    for name, (title, _) in {**BOUNDS, "tightness": ("bound over true error", "")}.items():
        write = text.short if name == "tightness" else text.percent
        figures = [write(cache.figure(name, key)) for key in ("p50", "p90", "p99", "max")]
        tables.append((title, *figures))
    return {"cache": cache, "bounds": bounds, "tightness": tightness, "audited": found.total if found else 0, "table": tables}


def _planned(run: Run, cache: CacheView, measured_at: int | None) -> dict[str, Any] | None:
    points = planned_of(run, cache.name)
    if not points:
        return None
    share = cache.over_dense
    measured = (measured_at, share) if measured_at and share is not None else None
    points = with_measured(points, measured_at, cache.memory)
    parts = list(dict.fromkeys(part for point in points for part in point.parts))
    return {
        "cache": cache, "points": points, "measured": measured, "parts": parts,
        "chart": charts.memory_over_contexts(points, cache.title, measured),
    }  # fmt: skip


def _depths(run: Run, caches: list[CacheView]) -> list[dict[str, Any]]:
    """For each cache its scores by depth and context, where items have depths."""
    if "task" not in run:
        return []
    out = []
    for cache in caches:
        depths, contexts, cells = depth_grid(run, cache.name)
        if depths:
            out.append({"cache": cache, "contexts": contexts, "rows": depth_rows(depths, contexts, cells)})
    return out


def _breakdowns(run: Run, caches: list[CacheView]) -> list[dict[str, Any]]:
    """Scores and differences by task and by context, where there is more than one of them."""
    out = []
    for title, part in (("task", "by_task"), ("context", "by_context")):
        groups = list(dict.fromkeys(name for cache in caches for name in getattr(cache, part)))
        if part == "by_context":
            groups.sort(key=int)
        if len(groups) < 2 and part == "by_context":
            continue
        rows = []
        for group in groups:
            cells = []
            for cache in caches:
                summary = getattr(cache, part).get(group, {})
                score = summary.get("score")
                mean, ends = text.difference(summary.get("difference"), 100.0 if is_share(run) else 1.0)
                shown = text.NONE if score is None else text.part_of(score, 1.0) if is_share(run) else text.short(score, 4)
                cells.append({"score": shown, "difference": mean if ends or mean != text.NONE else "", "interval": ends})
            items = next((getattr(cache, part)[group]["items"] for cache in caches if group in getattr(cache, part)), 0)
            rows.append({"name": text.tokens(int(group)) if part == "by_context" else group, "items": items, "cells": cells})
        if rows:
            out.append({"title": title, "rows": rows})
    return out


def _ramps() -> str:
    """The heat map's colours for the legend, as CSS variables of both themes."""
    lines = []
    for theme, (below, above) in heat.COLOURS.items():
        rule = f":root{{--below:{','.join(below)};--above:{','.join(above)}}}"
        lines.append(rule if theme == "light" else f"@media (prefers-color-scheme: dark){{{rule}}}")
    return "\n".join(lines)


def _title(runs: Sequence[Run]) -> str:
    return f"{runs[0]['model']['name']}: {task_name(runs[0])}" if len(runs) == 1 else f"{len(runs)} runs"
