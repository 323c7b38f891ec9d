"""A run: the parts one after the other, and everything they found as one dictionary of plain JSON types."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from ..environment import describe
from . import attention_op, decode_step, memory, prefill, quality
from .harness import Timer, synchronizer
from .memory import dense_bytes, too_large
from .model import HIDDEN, KV_HEADS, QUERY_HEADS, build_model
from .options import BenchOptions
from .rows import Row, growth
from .stages import kernel_name
from .systems import DENSE, DYNAMIC, OURS, System, all_systems, by_format
from .traces import TRACES, make_trace, statistics_of

SCHEMA = 1
TRACES_UP_TO = 32768  # tokens: longer ones are drawn of the first trace only
DECODE_COPIES = 2.0  # of the dense bytes, beside the caches: one layer's trace, and what is copied at a step
Tell = Callable[[str, str], None]
NOTES = (
    "Times are seconds a call. Systems take turns in one process, in an order drawn anew each round, after warm-up.",
    "fast path: a relative tolerance of 1e6, which every bound meets, so that every step stays on the fast path; the bound is "
    "computed and returned as at any tolerance. The share of the fast path stands beside each time.",
    "QuantizedCache backends quantise all their tokens again every 128 steps; so few steps are timed that none of it is in "
    "the figures.",
    "load: the machine's load averages before each part; where others keep its cores busy, several threads wait for each "
    "other, and times say little.",
    "over_dense, over_bf16, over_fp32: ratio of the medians, and quartiles of the ratios round by round.",
    "Where all systems together do not fit the memory that is free, they are measured in groups (`group`), each beside its own "
    "dense ones.",
    "Resident bytes are of one process per system, before and after filling and a few steps, once the allocator gave back what "
    "was freed (resident_untrimmed_bytes: with what it keeps); the peak also holds the keys and values of the layer that is "
    "being handed over.",
)


class Run:
    """One run under way. `result` is complete JSON at any time: what is not measured yet is missing from its parts."""

    def __init__(self, options: BenchOptions, tell: Tell, systems: list[System] | None = None) -> None:
        self.options, self.tell = options, tell
        self.device = torch.device(options.device)
        found = all_systems(options.quick) if systems is None else systems
        reasons = {system.name: system.unavailable(self.device) for system in found}
        self.systems = [system for system in found if reasons[system.name] is None]
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": describe(),
            "kernel": kernel_name(self.device),
            "options": options.to_dict(),
            "model": {"hidden": HIDDEN, "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "layers": options.layers},
            "systems": [system.describe(reasons[system.name]) for system in found],
            "notes": list(NOTES),
            "traces": [],
            "skipped": [],
            "parts": {},
            "seconds": {},
            "load": {},
        }

    def part(self, name: str) -> None:
        """Measure one part and keep what it found."""
        start = time.perf_counter()
        self.result["load"][name] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
        getattr(self, f"_{name}")()
        self.result["seconds"][name] = round(time.perf_counter() - start, 1)

    def _timer(self, warmup: int = 2) -> Timer:
        warmup = 1 if self.options.quick else warmup
        return Timer(self.options.rounds, warmup, self.options.seed, synchronize=synchronizer(self.device))

    def _groups(self, part: str, place: Row, dense: int, fixed: float) -> list[list[System]]:
        """Systems to measure at once; none where not even two have room, which is noted."""
        systems = self._allowed(part, place)
        found = memory.groups(systems, dense, fixed, self.device)
        if not found:
            reason = too_large(int(memory.needed(systems[:2], dense, fixed)), self.device) or "too little memory is free"
            self.result["skipped"].append({"part": part, **place, "reason": reason})
        return found

    def _allowed(self, part: str, place: Row, systems: list[System] | None = None) -> list[System]:
        """Systems that may hold so many tokens here; what is left out is noted."""
        out = []
        for system in self.systems if systems is None else systems:
            most = system.most_tokens if self.device.type == "cpu" else None
            if most is None or place["context"] * place["batch"] <= most:
                out.append(system)
                continue
            reason = f"{system.why_most} ({most:,} tokens at most on a CPU)"
            self.result["skipped"].append({"part": part, **place, "system": system.name, "reason": reason})
        return out

    def _attention(self) -> None:
        attention: list[Row] = []
        layer: list[Row] = []
        for context, head_dim, batch in self.options.shapes:
            place: Row = {"context": context, "head_dim": head_dim, "batch": batch}
            dense = dense_bytes(context, head_dim, batch, 1)
            groups = self._groups("attention", place, dense, attention_op.dense_copies(context, batch))
            for name in self._traces(context, head_dim, batch) if groups else ():
                self.tell("attention", f"{context:,} tokens, {batch} x {head_dim}, {name}")
                trace = make_trace(name, context, batch, KV_HEADS, QUERY_HEADS, head_dim, self.options.seed, device=self.device)
                self.result["traces"].append({**place, "name": name, "seed": trace.seed, **statistics_of(trace)})
                for number, group in enumerate(groups):
                    rows = attention_op.measure(trace, group, self._timer(), {**place, "group": number})
                    attention += _new_rows(attention, rows[0])
                    layer += _new_rows(layer, rows[1])
                del trace
        self.result["parts"]["attention"] = {"rows": attention, "growth": growth(attention)}
        self.result["parts"]["layer"] = {"rows": layer, "growth": growth(layer)}

    def _traces(self, context: int, head_dim: int, batch: int) -> tuple[str, ...]:
        """All traces where that can be paid for; another trace changes errors and what a tolerance costs, little else."""
        options = self.options
        first = (head_dim, batch) == (options.head_dims[0], options.batches[0])
        longest = min(options.contexts) if options.quick else TRACES_UP_TO
        return TRACES if first and context <= longest else TRACES[:1]

    def _models(self) -> Callable[[int], Any]:
        models: dict[int, Any] = {}

        def model(head_dim: int) -> Any:
            if head_dim not in models:
                models[head_dim] = build_model(head_dim, self.options.layers, self.device, self.options.seed)
            return models[head_dim]

        return model

    def _decode(self) -> None:
        rows: list[Row] = []
        model = self._models()
        for context, head_dim, batch in self.options.shapes:
            place: Row = {"context": context, "head_dim": head_dim, "batch": batch, "layers": self.options.layers}
            dense = dense_bytes(context, head_dim, batch, self.options.layers)
            for number, group in enumerate(self._groups("decode", place, dense, DECODE_COPIES)):
                self.tell("decode", f"{context:,} tokens, {batch} x {head_dim}")
                found = decode_step.measure(
                    model(head_dim), context, batch, group, self._timer(), {**place, "group": number}, self.options.seed
                )
                rows += _new_rows(rows, found)
        self.result["parts"]["decode"] = {"rows": rows, "growth": growth(rows)}

    def _prefill(self) -> None:
        rows: list[Row] = []
        model = self._models()
        head_dim, batch = self.options.head_dims[0], self.options.batches[0]
        for context in self.options.prefills:
            place: Row = {"context": context, "head_dim": head_dim, "batch": batch, "layers": self.options.layers}
            self.tell("prefill", f"{context:,} tokens")
            timer = self._timer(warmup=1)
            systems = self._allowed("prefill", place, by_format(self.systems))
            rows += prefill.measure(model(head_dim), context, batch, systems, timer, place, self.options.seed)
        self.result["parts"]["prefill"] = {"rows": rows, "growth": growth(rows)}

    def _filled(self, part: str, systems: list[System], contexts: tuple[int, ...], layers: int) -> None:
        head_dim, batch = self.options.head_dims[0], self.options.batches[0]
        rows: list[Row] = []
        for context in contexts:
            place: Row = {"context": context, "head_dim": head_dim, "batch": batch, "layers": layers}
            for system in self._allowed(part, place, systems):
                self.tell(part, f"{context:,} tokens, {system.name}")
                row, reason = memory.measure(system, place, self.options)
                if reason is None:
                    rows.append(row)
                else:
                    self.result["skipped"].append({"part": part, **place, "system": system.name, "reason": reason})
        self.result["parts"][part] = {"rows": rows}

    def _memory(self) -> None:
        systems, contexts = by_format(self.systems), self.options.contexts
        if self.options.quick:
            systems = [system for system in systems if system.kind == OURS and system.settings["value_bits"] == 4][-1:]
            contexts = contexts[-1:]
        self._filled("memory", systems, contexts, self.options.layers)

    def _long(self) -> None:
        systems = [
            system for system in by_format(self.systems) if system.name == DYNAMIC or system.name.startswith("fast path")
        ]
        if self.options.quick:
            systems = [system for system in systems if system.kind != DENSE][:1]
        self._filled("long", systems, (self.options.long,), 1)

    def _quality(self) -> None:
        rows = quality.measure(
            self.options.quality_context, self.options.audited_steps, self.systems, self._timer(), self.device,
            self.options.seed, lambda text: self.tell("quality", text),
        )  # fmt: skip
        self.result["parts"]["quality"] = {"rows": rows}


def _new_rows(rows: list[Row], found: list[Row]) -> list[Row]:
    """Those of `found` that are not in `rows` yet: every group has measured the dense systems for its own ratios."""
    known = {_identity(row) for row in rows}
    return [row for row in found if _identity(row) not in known]


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("context", "head_dim", "batch", "trace", "system"))


def plain(value: Any) -> Any:
    """The same with None for every number that is not finite: JSON has no others."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(
    options: BenchOptions,
    tell: Tell = lambda part, text: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    systems: list[System] | None = None,
) -> dict[str, Any]:
    """Measure what the options ask for.

    Args:
        options: of the run; tell: called with a part and what it is at; save: called with the result so far after each part;
        systems: to compare, all if None.

    Raises: InputError: an option is out of range.
    """
    before = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with torch.inference_mode():
            current = Run(options, tell, systems)
            for part in options.what:
                current.part(part)
                current.result = plain(current.result)
                save(current.result)
    finally:
        torch.set_num_threads(before)
    return current.result
