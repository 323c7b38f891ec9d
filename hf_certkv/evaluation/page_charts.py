"""Charts as HTML and SVG without a fixed width: x in percent, y in pixels, all labels HTML. They fit a phone and a screen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from .page_data import (
    PARTS,
    RUNGS,
    CacheView,
    Histogram,
    Planned,
    histogram_of,
    per_step,
    steps_of,
)
from .page_text import DASH, difference, minus, part_of, percent, short, size, tokens, tolerance_text, upward

Tick = tuple[float, str]  # place from 0 to 1, label
GAP = 0.06  # of a stacked column's width
DOTS = {"fast": "fast", "keys": "keys", "values": "values", "dense_head": "dense-head", "dense_layer": "dense-layer",
        "uncertified": "uncertified"}  # fmt: skip  # rung -> CSS class


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _rect(left: float, top: float, width: float, height: float, kind: str, tip: str = "") -> Markup:
    hint = Markup(' data-tip="{}"').format(tip) if tip else Markup("")
    return Markup('<rect x="{}" y="{:.2f}" width="{}" height="{:.2f}" class="{}"{}/>').format(
        _percent(left), top, _percent(width), max(0.0, height), kind, hint
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{}" y1="{:.2f}" x2="{}" y2="{:.2f}" class="{}"/>').format(_percent(x1), y1, _percent(x2), y2, kind)


def frame(body: Markup, height: int, label: str, x: Sequence[Tick], y: Sequence[Tick], x_title: str, y_title: str) -> Markup:
    """A plot of `height` pixels with ticks; `y` places count from the bottom."""
    grid = _joined(_line(0, height * (1 - place), 1, height * (1 - place), "grid") for place, _ in y)
    ys = _joined(Markup('<span style="top:{:.1f}px">{}</span>').format(height * (1 - place), text) for place, text in y)
    return Markup(
        '<div class="chart"><p class="ytitle">{}</p><div class="yaxis" style="height:{}px" aria-hidden="true">{}</div>'
        '<div class="plot"><svg role="img" aria-label="{}" width="100%" height="{}">{}{}</svg></div>'
        '<div class="xaxis" aria-hidden="true">{}</div><p class="xtitle">{}</p></div>'
    ).format(y_title, height, ys, label, height, grid, body, x_ticks(x), x_title)


def x_ticks(ticks: Sequence[Tick]) -> Markup:
    """Labels below a plot; those at its ends stay inside. Of many, a narrow screen shows every second or third."""
    out = []
    thin = max(1, math.ceil(len(ticks) / 5))
    for index, (place, text) in enumerate(ticks):
        side = "start" if place < 0.03 else "end" if place > 0.97 else ""
        side += " wide" if (len(ticks) - 1 - index) % thin else ""
        out.append(Markup('<span class="{}" style="left:{}">{}</span>').format(side, _percent(place), text))
    return _joined(out)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """What colours mean: class and text."""
    items = _joined(Markup('<li><i class="dot {}"></i>{}</li>').format(kind, text) for kind, text in entries)
    return Markup('<ul class="legend">{}</ul>').format(items)


def shares_bar(counts: dict[str, int], names: dict[str, str], label: str) -> Markup:
    """One bar of shares; `names`: the text of each class."""
    whole = sum(counts.values())
    parts = [
        Markup('<i class="{}" style="width:{}" data-tip="{}"></i>').format(
            DOTS.get(kind, kind), _percent(number / whole), f"{names[kind]}: {part_of(number, whole)} ({number:,})"
        )
        for kind, number in counts.items()
        if number
    ]
    said = "; ".join(f"{names[kind]} {part_of(number, whole)}" for kind, number in counts.items() if number)
    return Markup('<div class="bar" role="img" aria-label="{}">{}</div>').format(f"{label}: {said or 'none'}", _joined(parts))


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def forest(caches: list[CacheView], scale: float, unit: str, good: str) -> Markup:
    """Differences from dense with their intervals, one row a cache. `scale`: of the scores; `good`: what is better."""
    rows = [cache for cache in caches if cache.summary.get("difference")]
    ends = [0.0]
    for cache in rows:
        ends += [
            scale * value
            for key, value in cache.summary["difference"].items()
            if value is not None and key in ("mean", "low", "high")
        ]
    low, high = min(ends), max(ends)
    room = 0.08 * (high - low) or 1.0
    low, high = low - room, high + room

    def at(value: float) -> float:
        return (value - low) / (high - low)

    ticks = nice_ticks(low, high, 4)
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]))) if len(ticks) > 1 else 2
    decimals += any(abs(round(tick, decimals) - tick) > 1e-9 * (high - low) for tick in ticks)
    out = []
    for cache in rows:
        interval = cache.summary["difference"]
        mean, text = difference(interval, scale)
        body = [_line(at(0), 0, at(0), 36, "zero")]
        if interval.get("low") is not None and interval.get("high") is not None:
            left, right = at(scale * interval["low"]), at(scale * interval["high"])
            body.append(_line(left, 18, right, 18, "interval"))
            body += [_line(end, 12, end, 24, "interval") for end in (left, right)]
        body.append(Markup('<circle cx="{}" cy="18" r="5.5" class="mean"/>').format(_percent(at(scale * interval["mean"]))))
        said = f"{cache.title}: {mean} {unit}" + (f", 95 % interval {text}" if text else "")
        out.append(
            Markup(
                '<div class="forest-row {}"><b>{}</b>'
                '<svg role="img" aria-label="{}" width="100%" height="36" data-tip="{}">{}</svg>'
                '<span class="value"><b>{}</b> <small>{}</small></span></div>'
            ).format(
                "uncertified" if cache.uncertified else "certified",
                cache.title,
                said,
                said,
                _joined(body),
                mean,
                text or "no interval",
            )
        )
    axis = x_ticks([(at(tick), minus(f"{tick:+.{decimals}f}") if abs(tick) > 1e-12 else "0") for tick in ticks])
    return Markup(
        '<div class="forest">{}<div class="forest-row axis"><span></span><div class="xaxis" aria-hidden="true">{}</div>'
        "<span></span></div>"
        '<p class="xtitle">score minus dense, {}; {}</p></div>'
    ).format(_joined(out), axis, unit, good)


def step_ticks(trace: dict[str, Any]) -> list[Tick]:
    """Round decode steps below their columns, at the middle."""
    steps, columns = trace["steps"], trace["columns"]
    numbers = sorted({min(steps, max(1, round(tick))) for tick in nice_ticks(0, steps)})
    return [((((number - 1) * columns // steps) + 0.5) / columns, f"{number:,}") for number in numbers]


def _steps_text(trace: dict[str, Any], column: int) -> str:
    first, last = steps_of(trace, column)
    return f"step {first:,}" if first == last else f"steps {first:,}{DASH}{last:,}"


def rungs_over_steps(trace: dict[str, Any], name: str) -> Markup:
    """Which rung served what share of the head-steps, by decode step."""
    height, columns = 190, trace["columns"]
    width = 1 / columns
    body = []
    for column in range(columns):
        counts = {kind: trace["rungs"][kind][column] for kind in RUNGS}
        whole, bottom = sum(counts.values()), float(height)
        if not whole:
            continue
        for kind, number in counts.items():
            if number:
                part = height * number / whole
                bottom -= part
                body.append(_rect(column * width, bottom, min(width * 1.02, 1 - column * width), part, f"stack {DOTS[kind]}"))
        said = ", ".join(f"{RUNGS[kind]} {part_of(number, whole)}" for kind, number in counts.items() if number)
        body.append(_rect(column * width, 0, width, height, "hit", f"{_steps_text(trace, column)}: {said}"))
    y = [(share, f"{share:.0%}".replace("%", " %")) for share in (0, 0.5, 1)]
    label = f"{name}: share of head-steps by rung over {trace['steps']:,} decode steps"
    return frame(_joined(body), height, label, step_ticks(trace), y, "decode step", "share of head-steps")


def bytes_over_steps(trace: dict[str, Any], name: str) -> Markup:
    """What one decode step moved from host memory, all layers together."""
    height, columns, values = 150, trace["columns"], per_step(trace)
    known = [value for value in values if value is not None]
    top = max(known, default=0.0) * 1.06 or 1.0
    unit = 1024 ** min(3, int(math.log(max(top, 1), 1024)))
    ticks = nice_ticks(0, top / unit, 4)
    body = []
    for column, value in enumerate(values):
        if value is None:
            continue
        part = height * value / top
        body.append(_rect((column + GAP) / columns, height - part, (1 - 2 * GAP) / columns, part, "moved"))
        said = f"{_steps_text(trace, column)}: {size(value)} a step; {size(trace['bytes_moved'][column])} in all"
        body.append(_rect(column / columns, 0, 1 / columns, height, "hit", said))
    y = [(tick * unit / top, f"{tick:g}") for tick in ticks]
    label = f"{name}: bytes moved from host memory in a decode step, over {trace['steps']:,} steps"
    title = f"{('B', 'KiB', 'MiB', 'GiB')[round(math.log(unit, 1024))]} a step"
    return frame(_joined(body), height, label, step_ticks(trace), y, "decode step", title)


def histograms(
    cache: CacheView, names: dict[str, tuple[str, str]], mark: float | None, mark_text: str, as_percent: bool
) -> Markup:
    """Histograms on one logarithmic axis, one below the other. `names`: which -> title, class; `mark`: where a line is."""
    found = {name: histogram for name in names if (histogram := histogram_of(cache, name)) is not None}
    places = [place for histogram in found.values() for place in histogram.places]
    if mark and found:
        places.append(round(16 * math.log10(mark)))
    if not places:
        return Markup("")
    low, high = 16 * math.floor((min(places) - 1) / 16), 16 * math.ceil(max(places) / 16)
    if high - low <= 16 and not mark:
        high += 16
    out = []
    for name, histogram in found.items():
        title, kind = names[name]
        out.append(_ridge(histogram, title, kind, low, high, mark, as_percent))
    decades = list(range(low // 16, high // 16 + 1))
    thin = max(1, math.ceil((len(decades) - 1) / 5))
    ticks = [((16 * d - low) / (high - low), percent(10.0**d, 1) if as_percent else short(10.0**d, 1)) for d in decades[::thin]]
    note = Markup('<p class="marknote"><i class="dot tolerance"></i>{}</p>').format(mark_text) if mark else Markup("")
    return Markup('<div class="ridges">{}<div class="xaxis" aria-hidden="true">{}</div>{}</div>').format(
        _joined(out), x_ticks(ticks), note
    )


def _ridge(histogram: Histogram, title: str, kind: str, low: int, high: int, mark: float | None, as_percent: bool) -> Markup:
    height, top, width = 84, max([*histogram.counts, 1]), 1 / (high - low)
    body = [
        _line((16 * decade - low) * width, 0, (16 * decade - low) * width, height, "grid")
        for decade in range(low // 16, high // 16 + 1)
    ]
    write = percent if as_percent else short
    for place, number in zip(histogram.places, histogram.counts, strict=True):
        part = (height - 6) * number / top
        edges = f"{write(10 ** ((place - 1) / 16))} to {write(10 ** (place / 16))}"
        said = f"{title}, {edges}: {number:,} head-steps ({part_of(number, histogram.total)})"
        body.append(
            _rect((place - 1 - low + GAP) * width, height - max(part, 1.2), (1 - 2 * GAP) * width, max(part, 1.2), kind)
        )
        body.append(_rect((place - 1 - low) * width, 0, width, height, "hit", said))
    if mark:
        at = (16 * math.log10(mark) - low) * width
        body.append(_line(at, 0, at, height, "tolerance"))
    body.append(_line(0, height - 0.5, 1, height - 0.5, "base"))
    apart = [f"{number:,} {what}" for number, what in ((histogram.zero, "are 0"), (histogram.infinite, "infinite")) if number]
    note = "; ".join([f"{histogram.total:,} head-steps", *apart])
    return Markup(
        '<p class="ridge-title"><b>{}</b> <small>{}</small></p>'
        '<svg role="img" aria-label="{}" width="100%" height="{}">{}</svg>'
    ).format(title, note, f"{title}: histogram of {note}", height, _joined(body))


def memory_over_contexts(points: list[Planned], name: str, measured: tuple[int, float] | None) -> Markup:
    """Device bytes by part over the dense cache's, one column a context; `measured`: context and share, a dot."""
    height = 210
    top = 1.12 * max([1.0, *(sum(point.parts.values()) for point in points), measured[1] if measured else 0.0])
    width = 1 / len(points)
    body = []
    for place, point in enumerate(points):
        bottom = float(height)
        for part, share in point.parts.items():
            bottom -= height * share / top
            body.append(_rect((place + 0.14) * width, bottom, 0.72 * width, height * share / top, f"part {part_class(part)}"))
        listed = ", ".join(f"{PARTS.get(part, part)} {percent(share)}" for part, share in point.parts.items())
        said = f"{tokens(point.context)} tokens: {size(point.device)}, {short(point.device / point.dense)} of dense ({listed})"
        body.append(_rect(place * width, 0, width, height, "hit", said))
    line = height * (1 - 1 / top)
    body.append(_line(0, line, 1, line, "dense-line"))
    if measured is not None:
        contexts = [point.context for point in points]
        at = _between(contexts, measured[0])
        if at is not None:
            said = f"measured at {measured[0]:,} tokens: {short(measured[1])} of dense"
            body.append(
                Markup('<circle cx="{}" cy="{:.2f}" r="6" class="measured" data-tip="{}"/>').format(
                    _percent((at + 0.5) * width), height * (1 - measured[1] / top), said
                )
            )
    x = [((place + 0.5) * width, tokens(point.context)) for place, point in enumerate(points)]
    y = [(share / top, f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    ends = f"{tokens(points[0].context)} to {tokens(points[-1].context)}"
    label = f"{name}: device memory over the dense cache's, by part, for contexts from {ends}"
    return frame(_joined(body), height, label, x, y, "tokens in the cache", "device bytes over dense")


def _between(contexts: list[int], context: int) -> float | None:
    """Where a context lies among columns that stand for `contexts`; None outside."""
    for place, (left, right) in enumerate(pairwise(contexts)):
        if left <= context <= right:
            return place + math.log(context / left) / math.log(right / left)
    return 0.0 if contexts == [context] else None


def part_class(part: str) -> str:
    """The CSS class of a part of memory."""
    return f"part-{part}" if part in PARTS else "part-other"


def gauge(bound: float | None, median: float | None, rtol: float | None) -> Markup:
    """The largest and the median bound on a line that ends a little beyond the tolerance."""
    if bound is None or not rtol or not math.isfinite(bound):
        return Markup("")
    top = max(rtol, bound) * 1.08
    marks = [_line(rtol / top, 3, rtol / top, 19, "tolerance")]
    if median is not None:
        marks.append(_line(median / top, 5, median / top, 17, "median"))
    said = f"largest bound {upward(bound)}, median {percent(median)}, tolerance {tolerance_text(rtol)}"
    return _small(bound / top, marks, said)


def ratio_gauge(ratio: float | None, what: str, ends: tuple[float, float] | None = None) -> Markup:
    """A ratio to the dense cache's on a line where a mark stands at 1; `ends`: its quartiles."""
    if ratio is None or not math.isfinite(ratio):
        return Markup("")
    top = max(1.0, ratio, *(ends or ())) * 1.08
    marks = [_line(1 / top, 3, 1 / top, 19, "one")]
    marks += [_line(end / top, 5, end / top, 17, "median") for end in ends or ()]
    return _small(ratio / top, marks, f"{what}: {short(ratio)} of the dense cache's")


def _small(share: float, marks: list[Markup], said: str) -> Markup:
    body = [_rect(0, 8, 1, 6, "rail"), _rect(0, 8, share, 6, "fill"), *marks]
    return Markup('<svg class="gauge" role="img" aria-label="{0}" data-tip="{0}" width="100%" height="22">{1}</svg>').format(
        said, _joined(body)
    )


def small_interval(interval: dict[str, Any], said: str) -> Markup:
    """A difference and its interval beside 0."""
    mean, low, high = interval["mean"], interval.get("low"), interval.get("high")
    if low is None or high is None:
        return Markup("")
    reach = 1.15 * max(abs(value) for value in (low, high, mean, 1e-300))
    at = {value: (value + reach) / (2 * reach) for value in (low, high, mean)}
    body = [_line(0, 11, 1, 11, "grid"), _line(0.5, 1, 0.5, 21, "zero"), _line(at[low], 11, at[high], 11, "interval")]
    body += [_line(at[end], 6, at[end], 16, "interval") for end in (low, high)]
    body.append(Markup('<circle cx="{}" cy="11" r="4.5" class="mean"/>').format(_percent(at[mean])))
    return Markup('<svg class="gauge" role="img" aria-label="{0}" data-tip="{0}" width="100%" height="22">{1}</svg>').format(
        said, _joined(body)
    )
