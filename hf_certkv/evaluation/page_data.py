"""What a report says of one run, as plain figures: the page and the pictures for print are drawn from the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]

RUNGS = {
    "fast": "fast path",
    "keys": "keys raised",
    "values": "values raised",
    "dense_head": "dense head",
    "dense_layer": "dense layer",
    "uncertified": "UNCERTIFIED",
}  # from cheap to dear
PARTS = {
    "codes": "codes", "planes": "refinement", "scales": "scales", "numbers": "bound numbers", "checksums": "checksums",
    "exact": "exact tokens", "hot": "hot slots", "exact_layers": "exact layers",
}  # fmt: skip  # of the device, in the order in which they are stacked
KINDS = {"bound_max": "largest", "bound_mean": "mean", "candidate_max": "fast path alone"}
LEAST = 1.5e-14  # the bin that ends here holds what is 0, too
WAYS = {"ppl": "perplexity", "needle": "needles in a haystack", "ruler": "RULER", "divergence": "divergence"}


@dataclass(frozen=True)
class CacheView:
    """One cache of a run. `rtol`: its tolerance; None for the dense one. `shares`: of fast, raised and dense head-steps."""

    index: int
    name: str
    settings: dict[str, Any] | None
    summary: dict[str, Any]
    by_context: dict[str, Any]
    by_task: dict[str, Any]
    certificate: dict[str, Any] | None
    memory: dict[str, Any] | None
    speed: dict[str, Any] | None

    @property
    def certified(self) -> bool:
        """Whether its bounds were enforced."""
        return self.certificate is not None and bool(self.certificate["certified"])

    @property
    def uncertified(self) -> bool:
        """Whether it has bounds, and nothing enforced them."""
        return self.certificate is not None and not self.certificate["certified"]

    @property
    def title(self) -> str:
        """Its name; that of a cache that certifies nothing says so."""
        return f"{self.name} (UNCERTIFIED)" if self.uncertified else self.name

    @property
    def rtol(self) -> float | None:
        """The tolerance relative to the output's norm, enforced or not."""
        found = (self.settings or {}).get("rtol")
        return None if self.certificate is None or found is None else float(found)

    @property
    def atol(self) -> float:
        """The absolute tolerance."""
        return float((self.settings or {}).get("atol", 0.0))

    @property
    def shared(self) -> bool:
        """Whether the heads of a layer share the tolerance."""
        return (self.settings or {}).get("scope") == "layer"

    @property
    def head_steps(self) -> int:
        """Outputs of a head at a step that were recorded."""
        return 0 if self.certificate is None else int(self.certificate["overall"]["head_steps"])

    @property
    def shares(self) -> dict[str, int]:
        """Head-steps on the fast path, raised, dense and uncertified."""
        return {} if self.certificate is None else grouped(self.certificate["overall"]["rungs"])

    def figure(self, metric: str, key: str) -> float | None:
        """A quantile of a bound or error over all head-steps; None where nothing was measured."""
        found = None if self.certificate is None else self.certificate["overall"]["relative"].get(metric)
        value = None if found is None else found.get(key)
        return None if value is None else float(value)

    @property
    def trace(self) -> dict[str, Any] | None:
        """Its steps, if there were any that a certificate covers."""
        found = None if self.certificate is None else self.certificate.get("trace")
        return found if found and found["rows"] and found["columns"] else None

    @property
    def over_dense(self) -> float | None:
        """Device bytes over the dense cache's, as measured."""
        if not self.memory or not self.memory["dense_bytes"]:
            return None
        return float(self.memory["device_bytes"]) / float(self.memory["dense_bytes"])

    @property
    def time_over_dense(self) -> dict[str, Any] | None:
        """Decode time over the dense cache's: median, q1, q3."""
        return (self.speed or {}).get("over_dense")


def grouped(rungs: dict[str, int]) -> dict[str, int]:
    """Head-steps by what they cost: fast, raised, dense; and uncertified."""
    return {
        "fast": rungs["fast"],
        "raised": rungs["keys"] + rungs["values"],
        "dense": rungs["dense_head"] + rungs["dense_layer"],
        "uncertified": rungs["uncertified"],
    }


def caches_of(run: Run) -> list[CacheView]:
    """Every cache of a run, in order."""
    memory = run.get("memory", {}).get("measured", {})
    out = []
    for index, cache in enumerate(run["caches"]):
        name = cache["name"]
        summary = run.get("summary", {}).get(name, {})
        certificate = run.get("certificates", {}).get(name)
        measured = memory.get(name) or (certificate or {}).get("memory")
        out.append(
            CacheView(
                index, name, cache["settings"] or (certificate or {}).get("settings"), summary.get("overall", {}),
                summary.get("contexts", {}), summary.get("tasks", {}), certificate, measured, run.get("speed", {}).get(name),
            )
        )  # fmt: skip
    return out


def headline_first(caches: list[CacheView]) -> list[CacheView]:
    """The certified caches; the one called so comes first."""
    return sorted((cache for cache in caches if cache.certified), key=lambda cache: cache.name != "certified")


def task_name(run: Run) -> str:
    """What was done, in a word or two."""
    if run["kind"] == "generate":
        return "one generation"
    return WAYS.get(run["task"]["name"], run["task"]["name"])


def is_share(run: Run) -> bool:
    """Whether scores are right or wrong, so that their means are shares, shown in percent."""
    return bool(run.get("task", {}).get("metric", {}).get("right_or_wrong"))


def is_against_itself(run: Run) -> bool:
    """Whether the dense cache's own output is the yardstick, so that nothing can be better than dense."""
    return bool(run.get("task", {}).get("name") == "divergence")


def unit_of(run: Run) -> str:
    """What a difference of scores is counted in."""
    return "percentage points" if is_share(run) else run["task"]["metric"]["unit"] if "task" in run else ""


def verdict(run: Run, interval: dict[str, Any]) -> str:
    """What a difference and its interval say, in a word or two; nothing without an interval."""
    low, high = interval.get("low"), interval.get("high")
    if low is None or high is None or is_against_itself(run):
        return ""
    if low <= 0 <= high:
        return "no difference found"
    return "better than dense" if (low > 0) == run["task"]["metric"]["higher_is_better"] else "worse than dense"


def per_step(trace: dict[str, Any]) -> list[float | None]:
    """Bytes moved in one decode step of one item, all layers together, by column; None where no step was certified."""
    rows = len(trace["rows"])
    head_steps = [sum(column) for column in zip(*trace["rungs"].values(), strict=True)]
    return [None if not found else moved * rows / found for moved, found in zip(trace["bytes_moved"], head_steps, strict=True)]


def steps_of(trace: dict[str, Any], column: int) -> tuple[int, int]:
    """The first and the last decode step of a column, from 1 on."""
    steps, columns = trace["steps"], trace["columns"]
    first, following = -(-column * steps // columns), -(-(column + 1) * steps // columns)
    return first + 1, max(first + 1, following)


def layers_of(trace: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Runs of rows of one layer: layer, first row, rows."""
    out: list[tuple[int, int, int]] = []
    for row, (layer, _) in enumerate(trace["rows"]):
        if out and out[-1][0] == layer:
            out[-1] = (layer, out[-1][1], out[-1][2] + 1)
        else:
            out.append((layer, row, 1))
    return out


@dataclass(frozen=True)
class Scale:
    """Colours of bounds: from `low` to `middle`, the tolerance, one family, from there to `top` another; all above 0."""

    low: float
    middle: float
    top: float

    def place(self, value: float) -> tuple[bool, float]:
        """Whether a value is above the tolerance, and where in its family it lies, 0 to 1."""
        above = value > self.middle
        start, end = (self.middle, self.top) if above else (self.low, self.middle)
        if not math.isfinite(value):
            return above, 1.0
        if value <= start or end <= start:
            return above, 0.0
        return above, min(1.0, math.log(value / start) / math.log(end / start))


def scale_of(cache: CacheView) -> Scale | None:
    """A cache's colours: two decades below its tolerance, and above it as far as its bounds go."""
    trace = cache.trace
    if trace is None:
        return None
    known = [value for kind in KINDS for row in trace[kind] for value in row if value and math.isfinite(value)]
    largest, least = max(known, default=1.0), min(known, default=1e-3)
    if not cache.rtol:
        return Scale(least / 1.01, largest, largest)
    top = cache.rtol if largest <= cache.rtol else max(largest, cache.rtol * 1.5)
    return Scale(cache.rtol / 100, cache.rtol, top)


@dataclass(frozen=True)
class Histogram:
    """Bins of sixteen a decade: exponents of their upper edges in sixteenths, and counts; what is 0 or infinite is apart."""

    places: list[int]
    counts: list[int]
    zero: int
    infinite: int

    @property
    def total(self) -> int:
        """Everything counted."""
        return sum(self.counts) + self.zero + self.infinite


def histogram_of(cache: CacheView, name: str) -> Histogram | None:
    """One of a cache's histograms; None where it is empty."""
    bins = ((cache.certificate or {}).get("histograms") or {}).get(name) or []
    finite = sorted((round(16 * math.log10(edge)), number) for edge, number in bins if edge is not None and edge > LEAST)
    zero = sum(number for edge, number in bins if edge is not None and edge <= LEAST)
    infinite = sum(number for edge, number in bins if edge is None)
    if not finite and not zero and not infinite:
        return None
    return Histogram([place for place, _ in finite], [number for _, number in finite], zero, infinite)


@dataclass(frozen=True)
class Planned:
    """A cache's memory at one context. `parts`: of the device, over the dense cache's bytes, in the order of `PARTS`."""

    context: int
    parts: dict[str, float]
    device: int
    host: int
    dense: int


def planned_of(run: Run, name: str) -> list[Planned]:
    """A cache's planned memory by context."""
    planned = run.get("memory", {}).get("planned", {}).get(name, {})
    found = [point for context, memory in planned.items() if (point := point_of(int(context), memory))]
    return sorted(found, key=lambda point: point.context)


def with_measured(points: list[Planned], context: int | None, memory: dict[str, Any] | None) -> list[Planned]:
    """The planned points, and what was measured as one of its own where its context is shorter or longer than all of them."""
    if not points or not context or not memory or points[0].context <= context <= points[-1].context:
        return points
    found = point_of(context, memory)
    return sorted([*points, *([found] if found else [])], key=lambda point: point.context)


def point_of(context: int, memory: dict[str, Any]) -> Planned | None:
    """A memory report as shares of the dense cache's bytes; None where those are 0."""
    dense, device = memory["dense_bytes"], memory["device_bytes"]
    if not dense:
        return None
    parts = {part: size / dense for part, size in memory.get("parts", {}).items() if size and not part.startswith("host_")}
    ordered = {part: parts[part] for part in [*PARTS, *sorted(set(parts) - set(PARTS))] if part in parts}
    return Planned(context, ordered or {"device": device / dense}, device, memory.get("host_bytes", 0), dense)


def longest_context(run: Run) -> int | None:
    """Of the items: where memory was measured."""
    found = [item["context"] for item in run.get("items", []) if item.get("context")]
    return max(found, default=None)


@dataclass(frozen=True)
class Cell:
    """Items of one depth and context: how many, and the sum of their scores."""

    items: int
    total: float


def depth_grid(run: Run, name: str) -> tuple[list[Any], list[int], dict[tuple[Any, int], Cell]]:
    """Depths, contexts, and what was scored there by one cache; empty where items have no depth."""
    cells: dict[tuple[Any, int], Cell] = {}
    for item in run.get("items", []):
        depth, context = (item.get("group") or {}).get("depth"), item.get("context")
        score = item["scores"].get(name, {}).get("score")
        if depth is None or context is None or score is None:
            continue
        old = cells.get((depth, context), Cell(0, 0.0))
        cells[depth, context] = Cell(old.items + 1, old.total + score)
    depths = sorted({depth for depth, _ in cells}, key=lambda depth: (isinstance(depth, str), depth))
    return depths, sorted({context for _, context in cells}), cells
