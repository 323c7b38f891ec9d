"""The figures of a report as PNG for print: one column wide, one file a figure. No pyplot: no state shared with a caller."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .page_charts import nice_ticks
from .page_data import (
    KINDS,
    PARTS,
    RUNGS,
    CacheView,
    Run,
    caches_of,
    depth_grid,
    histogram_of,
    is_share,
    layers_of,
    longest_context,
    per_step,
    planned_of,
    scale_of,
    steps_of,
    unit_of,
    with_measured,
)
from .page_heat import ABOVE, BELOW, palette
from .page_text import percent, short, tokens, tolerance_text

WIDTH, DPI = 3.5, 300  # inches: one column of a paper
# Okabe and Ito's colours, which the colour-blind tell apart; rungs from cheap to dear.
RUNG_COLOURS = dict(zip(RUNGS, ("#009E73", "#56B4E9", "#E69F00", "#D55E00", "#7B2D5B", "#8A929C"), strict=True))
PART_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#6B7280", "#E69F00", "#D55E00", "#7B2D5B")
BLUE, GREY, CRIMSON = "#0072B2", "#8A929C", "#C2185B"
STYLE = {
    "font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5,
    "ytick.major.size": 2.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    # A dollar in a name is a dollar and no formula.
    "text.parse_math": False,
}  # fmt: skip


def draw_all(runs: Sequence[Run], folder: Path) -> list[str]:
    """Draw what the runs have data for into an existing folder. Returns the file names, `run-1-` before each of several runs'.

    Each file is written whole or not at all.
    """
    import matplotlib

    written: list[str] = []
    with matplotlib.rc_context(STYLE):
        for place, run in enumerate(runs):
            prefix = f"run-{place + 1}-" if len(runs) > 1 else ""
            caches = caches_of(run)
            figures: dict[str, Any] = {"differences": _differences(run, caches)}
            for name, slug in zip([cache.name for cache in caches], _slugs(caches), strict=True):
                cache = next(cache for cache in caches if cache.name == name)
                figures |= {f"{kind}-{slug}": figure for kind, figure in _of_cache(run, cache).items()}
            for name, figure in figures.items():
                if figure is not None:
                    written.append(_save(figure, folder / f"{prefix}{name}.png"))
    return written


def _slugs(caches: list[CacheView]) -> list[str]:
    """Names that any file system takes, one for each cache."""
    out: list[str] = []
    for cache in caches:
        slug = re.sub(r"[^a-z0-9.]+", "-", cache.name.lower()).strip("-.")[:40] or "cache"
        out.append(slug if slug not in out else f"{slug}-{cache.index + 1}")
    return out


def _of_cache(run: Run, cache: CacheView) -> dict[str, Any]:
    out: dict[str, Any] = {"depths": _depths(run, cache), "memory": _memory(run, cache) if cache.certificate else None}
    if cache.trace is not None:
        out |= {f"bounds-{kind.replace('_', '-')}": _heat(cache, cache.trace, kind) for kind in KINDS}
        out["rungs"] = _rungs(cache, cache.trace)
        out["bytes"] = _bytes(cache, cache.trace) if any(cache.trace["bytes_moved"]) else None
    out["histograms"] = _histograms(cache, ("candidate", "bound", "error"), cache.rtol or None)
    out["tightness"] = _histograms(cache, ("tightness",), 1.0)
    return out


def _new(height: float, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0]


def _save(figure: Any, path: Path) -> str:
    unfinished = path.with_name(f".{path.name}")
    try:
        figure.savefig(unfinished, format="png", metadata={"Software": None})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path.name


def _differences(run: Run, caches: list[CacheView]) -> Any:
    rows = [cache for cache in caches if cache.summary.get("difference")]
    if not rows:
        return None
    scale = 100.0 if is_share(run) else 1.0
    figure, (axis,) = _new(0.85 + 0.28 * len(rows))
    for place, cache in enumerate(rows):
        interval, colour = cache.summary["difference"], GREY if cache.uncertified else BLUE
        if interval.get("low") is not None and interval.get("high") is not None:
            axis.plot(
                [scale * interval["low"], scale * interval["high"]], [place, place], color=colour, marker="|", linewidth=1.2
            )
        axis.plot(scale * interval["mean"], place, "o", color=colour, markersize=4)
    axis.axvline(0, color="black", linewidth=0.6, linestyle=(0, (3, 3)))
    axis.set_yticks(range(len(rows)), [_title(cache) for cache in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"difference from dense, {unit_of(run)}\n(with 95 % intervals)")
    return figure


def _title(cache: CacheView) -> str:
    name = cache.name if len(cache.name) <= 40 else f"{cache.name[:39]}…"
    return f"{name} (UNCERTIFIED)" if cache.uncertified else name


def _heat(cache: CacheView, trace: dict[str, Any], kind: str) -> Any:
    from matplotlib.colors import ListedColormap

    scale, rows, columns = scale_of(cache), len(trace["rows"]), trace["columns"]
    assert scale is not None
    cells = np.full((rows, columns), np.nan)
    for row, values in enumerate(trace[kind]):
        for column, value in enumerate(values):
            if value is not None:
                above, place = scale.place(value)
                cells[row, column] = (BELOW + place * (ABOVE - 1)) if above else place * (BELOW - 1)
    figure, (axis,) = _new(max(1.7, min(6.0, 0.9 + 0.055 * rows)))
    colours = ListedColormap(palette("light")[1:] / 255).with_extremes(bad="#e4e4e4")
    extent = (0.5, columns + 0.5, rows - 0.5, -0.5)
    image = axis.imshow(
        cells, cmap=colours, vmin=-0.5, vmax=BELOW + ABOVE - 0.5, aspect="auto", interpolation="none", extent=extent
    )
    layers = layers_of(trace)
    thin = math.ceil(len(layers) / 12)
    axis.set_yticks(
        [first + (count - 1) / 2 for _, first, count in layers[::thin]], [f"layer {layer}" for layer, _, _ in layers[::thin]]
    )
    for _, first, _ in layers[1:]:
        axis.axhline(first - 0.5, color="white", linewidth=0.8)
    axis.tick_params(length=0)
    _steps_axis(axis, trace)
    axis.set_title(
        _title(cache) + {"bound_max": ": largest bound", "bound_mean": ": mean bound"}.get(kind, ": fast path alone"),
        loc="left",
    )
    bar = figure.colorbar(image, ax=axis, location="bottom", aspect=40, pad=0.02)
    ends = {0.0: scale.low, BELOW - 0.5: scale.middle}
    if scale.top > scale.middle:
        ends[BELOW + ABOVE - 1.0] = scale.top
    else:
        bar.ax.set_xlim(-0.5, BELOW - 0.5)
    bar.set_ticks(list(ends), labels=[f"{100 * value:.3g} %" for value in ends.values()])
    if cache.rtol:
        bar.ax.axvline(BELOW - 0.5, color=CRIMSON, linewidth=1.5)
        bar.set_label(f"red: the tolerance, {tolerance_text(cache.rtol)}")
    bar.outline.set_visible(False)
    return figure


def _steps_axis(axis: Any, trace: dict[str, Any]) -> None:
    steps, columns = trace["steps"], trace["columns"]
    numbers = sorted({min(steps, max(1, round(tick))) for tick in nice_ticks(0, steps)})
    axis.set_xticks([(number - 1) * columns // steps + 1 for number in numbers], [f"{number:,}" for number in numbers])
    axis.set_xlim(0.5, columns + 0.5)
    axis.set_xlabel("decode step" if steps_of(trace, 0)[1] == 1 else "decode step (a few in each column)")


def _rungs(cache: CacheView, trace: dict[str, Any]) -> Any:
    figure, (axis,) = _new(1.9)
    x = np.arange(1, trace["columns"] + 1)
    whole = np.maximum(1, np.sum([trace["rungs"][kind] for kind in RUNGS], axis=0))
    bottom = np.zeros(len(x))
    for kind, label in RUNGS.items():
        share = 100 * np.array(trace["rungs"][kind]) / whole
        if share.any():
            axis.bar(x, share, 1.0, bottom=bottom, color=RUNG_COLOURS[kind], label=label, linewidth=0, antialiased=False)
            bottom = bottom + share
    axis.set_ylim(0, 100)
    axis.set_ylabel("% of head-steps")
    _steps_axis(axis, trace)
    axis.set_title(f"{_title(cache)}: what served each head-step", loc="left")
    _legend_below(figure, axis)
    return figure


def _legend_below(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=1.0, columnspacing=1.2)


def _bytes(cache: CacheView, trace: dict[str, Any]) -> Any:
    figure, (axis,) = _new(1.6)
    values = [0.0 if value is None else value / 1024 for value in per_step(trace)]
    axis.bar(range(1, len(values) + 1), values, 0.85, color=RUNG_COLOURS["values"])
    axis.set_ylabel("KiB a step")
    _steps_axis(axis, trace)
    axis.set_title(f"{_title(cache)}: moved from host memory, all layers", loc="left")
    return figure


def _histograms(cache: CacheView, names: Sequence[str], mark: float | None) -> Any:
    found = {name: histogram for name in names if (histogram := histogram_of(cache, name)) is not None and histogram.places}
    if not found:
        return None
    from matplotlib.ticker import LogLocator

    titles = {
        "candidate": "fast path alone",
        "bound": "bound returned",
        "error": "true error (audited)",
        "tightness": "bound over true error",
    }
    colours = {"candidate": GREY, "bound": BLUE, "error": "black", "tightness": RUNG_COLOURS["fast"]}
    figure, axes = _new(0.6 + 0.62 * len(found), len(found))
    for axis, (name, histogram) in zip(axes, found.items(), strict=True):
        upper = 10 ** (np.array(histogram.places) / 16)
        lower = 10 ** ((np.array(histogram.places) - 1) / 16)
        axis.bar(lower, 100 * np.array(histogram.counts) / histogram.total, upper - lower, align="edge", color=colours[name])
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=6))
        axis.xaxis.set_major_formatter(lambda value, _: short(value, 1) if "tightness" in found else percent(value, 1))
        axis.set_ylabel("%")
        axis.set_title(titles[name], loc="left", pad=2)
        if mark:
            axis.axvline(mark, color=CRIMSON, linewidth=1.2)
    said = "the bound is the error" if "tightness" in found else f"tolerance {tolerance_text(mark or 0)}"
    unit = "times" if "tightness" in found else "over the output's norm"
    axes[-1].set_xlabel(f"{unit}; red: {said}" if mark else unit)
    figure.suptitle(_title(cache), fontsize=7.5, x=0.02, ha="left")
    return figure


def _memory(run: Run, cache: CacheView) -> Any:
    measured = longest_context(run)
    points = with_measured(planned_of(run, cache.name), measured, cache.memory)
    if not points:
        return None
    figure, (axis,) = _new(2.2)
    x = np.log2([point.context for point in points])
    width = 0.72 * (min(np.diff(x)) if len(x) > 1 else 1.0)
    bottom = np.zeros(len(points))
    names = list(dict.fromkeys(part for point in points for part in point.parts))
    known = [*PARTS, *sorted(set(names) - set(PARTS))]
    for place, part in enumerate(known):
        shares = np.array([point.parts.get(part, 0.0) for point in points])
        if shares.any():
            axis.bar(
                x, shares, width, bottom=bottom, color=PART_COLOURS[place % len(PART_COLOURS)], label=PARTS.get(part, part)
            )
            bottom = bottom + shares
    axis.axhline(1.0, color="black", linewidth=1.0, label="dense cache")
    if measured and cache.over_dense is not None:
        axis.plot(
            math.log2(measured), cache.over_dense, "o", markersize=4.5, markerfacecolor="white", color="black", label="measured"
        )
    axis.set_ylim(0, 1.1 * max(1.0, bottom.max()))
    axis.set_xticks(x, [tokens(point.context) for point in points])
    axis.set_xlabel("tokens in the cache")
    axis.set_ylabel("device bytes over dense")
    axis.set_title(_title(cache), loc="left")
    _legend_below(figure, axis)
    return figure


def _depths(run: Run, cache: CacheView) -> Any:
    depths, contexts, cells = depth_grid(run, cache.name)
    if not depths:
        return None
    from matplotlib.colors import LinearSegmentedColormap

    grid = np.full((len(depths), len(contexts)), np.nan)
    for (depth, context), cell in cells.items():
        grid[depths.index(depth), contexts.index(context)] = cell.total / cell.items
    figure, (axis,) = _new(0.8 + 0.24 * len(depths))
    colours = LinearSegmentedColormap.from_list("share", ["#f4f6f8", "#8dbfe8"])
    axis.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
        axis.text(column, row, f"{100 * grid[row, column]:.0f} %", ha="center", va="center", fontsize=6.5)
    axis.set_xticks(range(len(contexts)), [tokens(context) for context in contexts])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" if isinstance(depth, float) else str(depth) for depth in depths])
    axis.tick_params(length=0)
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("depth")
    axis.set_title(f"{_title(cache)}: answered right", loc="left")
    return figure
