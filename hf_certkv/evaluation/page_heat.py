"""The heat map of bounds: a picture of one pixel a cell, coloured for light and dark pages, and its figures for the script."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from .page_charts import step_ticks, x_ticks
from .page_data import KINDS, CacheView, Scale, layers_of, scale_of
from .page_text import percent, tolerance_text

# Colours below and above the tolerance. Blue and orange are told apart by everyone; each family grows away from the page.
COLOURS = {
    "light": (("#eaf2f8", "#7db1d8", "#0a4a86"), ("#fdb863", "#e0590b", "#6b1500")),
    "dark": (("#16222e", "#1f5680", "#58a3dc"), ("#a84400", "#f2923a", "#ffe3ad")),
}
BELOW, ABOVE = 170, 85  # colours of each family; 0 is where there is nothing


def heat_map(cache: CacheView, kind: str) -> Markup:
    """One kind of bound by layer and head over decode steps, a picture that the script makes speak."""
    trace, scale = cache.trace, scale_of(cache)
    assert trace is not None and scale is not None
    rows = len(trace["rows"])
    high = max(1, min(16, 420 // rows))
    height = rows * high
    labels, lines, last = [], [], -math.inf
    for layer, first, count in layers_of(trace):
        middle = (first + count / 2) * high
        if middle - last >= 13:
            labels.append(Markup('<span style="top:{:.1f}px">{}</span>').format(middle, f"layer {layer}"))
            last = middle
        if first and high * count >= 8:
            lines.append(Markup('<i style="top:{}px"></i>').format(first * high))
    light, dark = (_picture(trace[kind], scale, theme) for theme in ("light", "dark"))
    label = f"{cache.title}: {KINDS[kind]} bound by layer and head ({rows} rows) over {trace['steps']:,} decode steps"
    return Markup(
        '<div class="chart heat"><p class="ytitle">layer and head</p>'
        '<div class="yaxis" style="height:{0}px" aria-hidden="true">{1}</div>'
        '<div class="plot heat-plot" style="height:{0}px" tabindex="0" role="group" '
        'aria-label="{2}. Arrow keys move from cell to cell.">'
        '<picture><source srcset="{3}" media="(prefers-color-scheme: dark)"><img src="{4}" alt="{2}"></picture>{5}'
        '<b class="cursor" hidden></b></div><div class="xaxis" aria-hidden="true">{6}</div>'
        '<p class="xtitle">decode step</p></div>'
    ).format(height, Markup("").join(labels), label, dark, light, Markup("").join(lines), x_ticks(step_ticks(trace)))


def heat_data(cache: CacheView) -> Markup:
    """The figures of a cache's heat maps, for the script: float32, NaN where there is none."""
    trace = cache.trace
    assert trace is not None
    parts = Markup(" ").join(Markup('data-{}="{}"').format(kind.replace("_", "-"), _packed(trace[kind])) for kind in KINDS)
    rows = " ".join(f"{layer}:{head}" for layer, head in trace["rows"])
    return Markup('<div class="heat-data" hidden data-rows="{}" data-steps="{}" data-columns="{}" {}></div>').format(
        rows, trace["steps"], trace["columns"], parts
    )


def heat_legend(cache: CacheView) -> Markup:
    """The colour bar, with the tolerance marked."""
    scale = scale_of(cache)
    assert scale is not None
    below = math.log(scale.middle / scale.low)
    above = math.log(scale.top / scale.middle) if scale.top > scale.middle else 0.0
    share = below / (below + above) if below + above else 1.0
    ticks = []
    if cache.rtol:
        ticks = [(0.0, tolerance_text(scale.low)), (share / 2, tolerance_text(scale.middle / 10))]
        if above and share < 0.82:
            ticks.append((1.0, percent(scale.top)))
        ticks.append((share, f"tolerance {tolerance_text(cache.rtol)}"))
    else:
        ticks = [(0.0, percent(scale.low)), (1.0, percent(scale.top))]
    upper = Markup('<i class="above" style="width:{:.2f}%"></i>').format(100 * (1 - share)) if above else Markup("")
    return Markup(
        '<div class="colourbar" role="img" aria-label="{}">'
        '<div class="ramp"><i class="below" style="width:{:.2f}%"></i>{}</div>'
        '<div class="xaxis" aria-hidden="true">{}</div></div>'
    ).format(
        f"Colours from {percent(scale.low)} to {percent(scale.top)}, logarithmic; orange above {percent(scale.middle)}.",
        100 * share, upper, x_ticks(ticks),
    )  # fmt: skip


def _picture(grid: list[list[float | None]], scale: Scale, theme: str) -> str:
    """A PNG of one pixel a cell as a data address."""
    cells = np.array([[_index(value, scale) for value in row] for row in grid], dtype=np.uint8)
    image = Image.frombytes("P", (cells.shape[1], cells.shape[0]), cells.tobytes())
    image.putpalette(palette(theme).astype(np.uint8).tobytes())
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True, transparency=0)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _index(value: float | None, scale: Scale) -> int:
    if value is None:
        return 0
    above, place = scale.place(value)
    return BELOW + 1 + round(place * (ABOVE - 1)) if above else 1 + round(place * (BELOW - 1))


def palette(theme: str) -> np.ndarray:
    """`[256, 3]` colours, 0 to 255: none, those below the tolerance, those above."""
    out = np.zeros((256, 3))
    for stops, start, count in zip(COLOURS[theme], (1, BELOW + 1), (BELOW, ABOVE), strict=True):
        numbers = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops])
        places = np.linspace(0, len(stops) - 1, count)
        out[start : start + count] = np.stack([np.interp(places, range(len(stops)), numbers[:, i]) for i in range(3)], axis=1)
    return out.round()


def _packed(grid: list[list[Any]]) -> str:
    with np.errstate(over="ignore"):  # what is beyond float32 is as good as infinite
        values = np.array([[math.nan if value is None else value for value in row] for row in grid], dtype="<f4")
    return base64.b64encode(values.tobytes()).decode()
