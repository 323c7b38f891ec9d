"""A picture for each question, drawn from the run's JSON alone. No pyplot: no window system, no state shared with a caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Row = dict[str, Any]
Value = Callable[[Row], "dict[str, float] | None"]
# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#7F7F7F", "#8C564B", "#BCBD22")
MARKERS = "osD^vP*XdhpH<>"


@dataclass(frozen=True)
class Question:
    """A picture: what it asks, the part it is drawn from, and what draws it on a figure; False: nothing to draw."""

    title: str
    part: str
    draw: Callable[[Any, Result], bool]


def draw_all(result: Result, folder: Path, endings: tuple[str, ...] = ("png", "svg")) -> list[str]:
    """Draw what the run has data for, each as PNG and SVG unless said otherwise. Returns the file names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for name, question in QUESTIONS.items():
        if not result["parts"].get(question.part, {}).get("rows"):
            continue
        figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        if not question.draw(figure, result):
            continue
        figure.suptitle(question.title, fontsize=12, weight="bold")
        for ending in endings:
            path = folder / f"{name}.{ending}"
            # Dates and random ids would make every run's pictures differ.
            figure.savefig(path, metadata={"Date": None} if ending == "svg" else None)
            written.append(path.name)
    return written


def _first_shape(result: Result, part: str) -> list[Row]:
    """Rows of the head size and batch that were measured everywhere."""
    options = result["options"]
    first = (options["head_dims"][0], options["batches"][0])
    return [row for row in result["parts"][part]["rows"] if (row["head_dim"], row["batch"]) == first]


def _style(result: Result, name: str) -> dict[str, str]:
    names = [one["name"] for one in result["systems"]]
    if name not in names:  # dense attention: black for bfloat16, grey for float32
        return {"color": "black" if "bf16" in name else "grey", "marker": "x" if "repeated" in name else "+", "linestyle": "--"}
    place = names.index(name)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def _lines(axis: Any, result: Result, rows: list[Row], value: Value, scale: float = 1) -> bool:
    """One line a system over contexts, with quartiles as a band. Returns whether there was anything."""
    systems = dict.fromkeys(row["system"] for row in rows)
    drawn = False
    for name in systems:
        points = []
        for row in rows:
            found = value(row)
            if row["system"] == name and found:
                points.append((row["context"], *(scale * found[key] for key in ("median", "q1", "q3"))))
        if points:
            x, median, low, high = zip(*sorted(points), strict=True)
            style = _style(result, name)
            axis.plot(x, median, label=name, markersize=5, linewidth=1.5, **style)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            drawn = True
    axis.set_xscale("log", base=2)
    contexts = sorted({row["context"] for row in rows})
    axis.set_xticks(contexts, [f"{context // 1024}K" if context >= 1024 else str(context) for context in contexts])
    axis.set_xlabel("tokens in the cache")
    axis.grid(alpha=0.3)
    return drawn


def figure_of(row: Row, name: str, key: str) -> Any:
    """One figure of a summary, None where there is none."""
    return (row.get(name) or {}).get(key)


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)


def _attention(figure: Any, result: Result) -> bool:
    rows = [row for row in _first_shape(result, "attention") if row["trace"] == "diffuse"]
    axis = figure.subplots()
    drawn = _lines(axis, result, rows, lambda row: row.get("seconds"), 1e3)
    axis.set_yscale("log")
    axis.set_ylabel("ms a call, median and quartiles")
    _legend(figure, axis)
    return drawn


def _ratios(part: str) -> Callable[[Any, Result], bool]:
    def draw(figure: Any, result: Result) -> bool:
        axis = figure.subplots()
        drawn = _lines(axis, result, _first_shape(result, part), lambda row: row.get("over_dense"))
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylabel("over DynamicCache")
        _legend(figure, axis)
        return drawn

    return draw


def _memory(figure: Any, result: Result) -> bool:
    rows = [row for row in _first_shape(result, "memory") if row.get("counted")]
    if not rows:
        return False
    longest = max(row["context"] for row in rows)
    rows = [row for row in rows if row["context"] == longest]
    axis = figure.subplots()
    for place, row in enumerate(rows):
        dense, counted = row["dense_bytes"], row["counted"]
        bars = [("device, counted", counted["device_bytes"], "#0072B2"), ("host, counted", counted["host_bytes"], "#56B4E9")]
        left = 0.0
        for label, value, colour in bars:
            axis.barh(place, value / dense, left=left, color=colour, label=label if place == 0 else None)
            left += value / dense
        for label, key, marker in (
            ("process grew by", "resident_bytes", "D"), ("at its peak", "peak_above_before_bytes", "|")
        ):  # fmt: skip
            if row.get(key) is not None:
                axis.plot(row[key] / dense, place, marker, color="#D55E00", label=label if place == 0 else None)
    axis.set_yticks(range(len(rows)), [row["system"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"of the dense bfloat16 keys and values ({longest:,} tokens)")
    _legend(figure, axis)
    return True


def _groups(result: Result) -> tuple[list[str], list[str], list[Row]]:
    """Traces, this package's systems, and their rows at the longest context at which all traces were measured."""
    rows = [row for row in _first_shape(result, "attention") if "fast_share" in row]
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    full = [
        context for context in {row["context"] for row in rows}
        if {row["trace"] for row in rows if row["context"] == context} == set(traces)
    ]  # fmt: skip
    rows = [row for row in rows if full and row["context"] == max(full)]
    return traces, list(dict.fromkeys(row["system"] for row in rows)), rows


def _tolerances(figure: Any, result: Result) -> bool:
    traces, names, rows = _groups(result)
    if not rows:
        return False
    axes = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        of_name = {row["trace"]: row for row in rows if row["system"] == name}
        x = [index + (place - len(names) / 2 + 0.5) * width for index, trace in enumerate(traces) if trace in of_name]
        found = [of_name[trace] for trace in traces if trace in of_name]
        colour = _style(result, name)["color"]
        axes[0].bar(x, [row["fast_share"] for row in found], width, label=name, color=colour)
        axes[1].bar(x, [row["bytes_moved_per_call"] / 1024 for row in found], width, color=colour)
    axes[0].set_ylabel("share on the fast path")
    axes[1].set_ylabel("KiB moved a call")
    axes[1].set_xticks(range(len(traces)), traces)
    axes[1].set_xlabel(f"trace, {rows[0]['context']:,} tokens")
    _legend(figure, axes[0])
    return True


def _bounds(figure: Any, result: Result) -> bool:
    rows = [row for row in result["parts"]["attention"]["rows"] if figure_of(row, "bound", "p50")]
    rows = [row for row in rows if figure_of(row, "error", "median")]
    if not rows:
        return False
    axis = figure.subplots()
    for name in dict.fromkeys(row["system"] for row in rows):
        of_name = [row for row in rows if row["system"] == name]
        axis.plot(
            [row["error"]["median"] for row in of_name], [row["bound"]["p50"] for row in of_name], linestyle="", label=name,
            alpha=0.8, **_style(result, name),
        )  # fmt: skip
    ends = axis.get_xlim()
    axis.set_xscale("log")
    axis.set_yscale("log")
    low = max(ends[0], min(row["error"]["median"] for row in rows) / 2)
    axis.plot([low, ends[1]], [low, ends[1]], color="black", linewidth=0.8, label="bound = error")
    axis.set_xlabel("true error over the output's norm, median of heads")
    axis.set_ylabel("bound returned, over the output's norm, median")
    axis.grid(alpha=0.3)
    _legend(figure, axis)
    return True


QUESTIONS = {
    "attention": Question("How long does attention take?", "attention", _attention),
    "decode": Question("How long does a decode step take, over the dense cache?", "decode", _ratios("decode")),
    "prefill": Question("How long does a prefill take, over the dense cache?", "prefill", _ratios("prefill")),
    "memory": Question("Where are the bytes?", "memory", _memory),
    "tolerance": Question("What does a tolerance cost?", "attention", _tolerances),
    "bound": Question("How far is the bound from the true error?", "attention", _bounds),
}
