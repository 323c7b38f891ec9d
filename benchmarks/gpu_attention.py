"""The attention operation alone on a GPU: the fast path beside the fastest dense attention that torch has.

Every system attends once on each of several layers, in one CUDA graph: together they hold four times the second-level cache, so
that each layer is read from memory, as in a model (`rotated`, the headline). `warm`: one layer again and again. `eager`: the
calls as Python makes them, and the clock on the wall.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import costs
from benchmarks.gpu_common import (
    Call,
    DeviceName,
    DeviceTimer,
    KernelName,
    OutFolder,
    Part,
    Replay,
    check_fast,
    clean,
    copy_seconds,
    device_of,
    draw,
    filling,
    host_syncs,
    l2_bytes,
    numbers,
    prepare,
    replay,
    rounds_for,
    served,
    settings,
    settle,
)
from hf_certkv import CertifiedQuantizedCache
from hf_certkv.bench import statistics
from hf_certkv.bench.attention_op import attend, judge
from hf_certkv.bench.harness import Timer, describe_failure, synchronizer
from hf_certkv.bench.model import model_config
from hf_certkv.bench.systems import ANY_TOLERANCE
from hf_certkv.bench.traces import Trace, errors, exact_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "torch's choice": None,
}
# How query heads that share a KV head are handed over: to a backend that knows of it; with KV heads copied beforehand, untimed;
# or as so many positions of one head, which is the same for one new token.
FORMS = ("grouped", "repeated", "packed")
FORMATS = (4, 8)  # bits of a value
CACHES_OVER_L2 = 4
MOST_LAYERS = 64
Row = dict[str, Any]


class Held:
    """A cache of several layers, each holding its own tokens, and attention on what each layer returned last."""

    def __init__(self, traces: list[Trace], device: torch.device, kernel: str, **changes: Any) -> None:
        self.traces = traces
        config = model_config(traces[0].keys.shape[-1], len(traces))
        self.cache = CertifiedQuantizedCache(config, settings=settings(kernel, rtol=ANY_TOLERANCE, **changes))
        with filling():
            for layer, trace in enumerate(traces):
                self.cache.update(trace.keys[..., :-1, :], trace.values[..., :-1, :], layer)
        settle(self.cache, device)
        self.handles: list[tuple[Tensor, Tensor]] = []
        self.restore()
        self.calls: list[Call] = [partial(self.call, layer) for layer in range(len(traces))]

    def restore(self) -> None:
        """The last token, which a call that failed has taken back: handles of before are then stale."""
        if self.cache.get_seq_length() == self.traces[0].keys.shape[2]:
            return
        with filling():
            self.handles = [
                self.cache.update(trace.keys[..., -1:, :], trace.values[..., -1:, :], layer)
                for layer, trace in enumerate(self.traces)
            ]

    def call(self, layer: int) -> Tensor:
        """Attention of one layer."""
        return attend(self.traces[layer].query, *self.handles[layer], enable_gqa=True)

    @property
    def read_bytes(self) -> float:
        """Bytes of one layer that a step on the fast path reads."""
        parts = self.cache.memory().parts
        return sum(parts[name] for name in ("codes", "scales", "numbers", "exact")) / len(self.traces)


def dense_calls(traces: list[Trace], backend: str, form: str) -> list[Call]:
    """One call a layer. Raises what torch raises where a backend does not take this form."""
    kind = BACKENDS[backend]
    calls: list[Call] = []
    for trace in traces:
        query, keys, values = trace.query, trace.keys, trace.values
        groups = query.shape[1] // keys.shape[1]
        if form == "repeated":
            keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        if form == "packed":
            query = query.view(query.shape[0], keys.shape[1], groups, -1)
        calls.append(partial(_dense, kind, query, keys, values, form == "grouped", trace.query.shape))
    return calls


def _dense(kind: Any, query: Tensor, keys: Tensor, values: Tensor, grouped: bool, shape: torch.Size) -> Tensor:
    with nullcontext() if kind is None else sdpa_kernel(kind):
        return attend(query, keys, values, enable_gqa=grouped).view(shape)


def prepare_dense(traces: list[Trace], exact: Tensor, device: torch.device) -> tuple[dict[str, list[Call]], list[Row]]:
    """Every way that works, and a row for every way that does not."""
    ways: dict[str, list[Call]] = {}
    failed: list[Row] = []
    for backend in BACKENDS:
        for form in FORMS:
            name = f"dense bf16, {backend}, {form}"
            try:
                calls = dense_calls(traces, backend, form)
                error = errors(calls[0](), exact)["max"]
                synchronizer(device)()
                if not error < 0.05:
                    raise RuntimeError(f"off by {error:.3g} of the output")
                ways[name] = calls
            except Exception as problem:  # a backend that is not there, or not for this
                failed.append({"system": name, "failed": describe_failure(problem)})
    return ways, failed


def layers_for(tokens: int, device: torch.device) -> int:
    """Layers that together hold CACHES_OVER_L2 times the second-level cache, in the smallest format."""
    heads = model_config(128, 1).num_key_value_heads
    layer = sum(costs.coded_bytes(min(FORMATS)).values()) * tokens * heads
    return max(2, min(MOST_LAYERS, int(-(-CACHES_OVER_L2 * l2_bytes(device) // layer))))


def rates(seconds: list[float], size: float, copy: float | None) -> Row:
    """Bytes a second, and their share of what a copy reads and writes."""
    found = statistics.summary([size / one for one in seconds])
    return {"bytes_per_second": found, "share_of_copy": None if copy is None else found["median"] / copy}


def measure(tokens: int, device: torch.device, kernel: str, rounds: int, part: Part) -> list[Row]:
    """Rows of all systems at one context."""
    layers = layers_for(tokens, device)
    traces = [draw(tokens, device, seed=layer) for layer in range(layers)]
    exact = exact_attention(traces[0])
    dense, rows = prepare_dense(traces, exact, device)
    held = {f"fast path K8 V{bits}": Held(traces, device, kernel, value_bits=bits) for bits in FORMATS}
    calls: dict[str, list[Call]] = {**dense, **{name: one.calls for name, one in held.items()}}
    restore: dict[str, Callable[[], None]] = {name: one.restore for name, one in held.items()}
    waits = {name: host_syncs(one.calls[0], device) for name, one in held.items()}
    rotated = {name: replay(part, device, restore.get(name, lambda: None)) for name, part in calls.items()}
    warm = {name: replay(part[:1], device, restore.get(name, lambda: None)) for name, part in calls.items()}
    size, copying = copy_seconds(device)
    timer = DeviceTimer(device, rounds)
    found = timer.run({**{name: one.call for name, one in rotated.items()}, "copy": copying}, repeatable=True).seconds
    copy = statistics.summary([size / one for one in found.pop("copy")])
    seconds = {name: [one / layers for one in part] for name, part in found.items()}
    fastest = min(dense, key=lambda name: statistics.summary(seconds[name])["median"])
    again = timer.run({name: one.call for name, one in warm.items()}, repeatable=True).seconds
    eager = Timer(rounds, synchronize=synchronizer(device)).run({name: _loop(calls[name]) for name in (fastest, *held)}).seconds
    for name in calls:
        row: Row = {"system": name, "way": rotated[name].way, "seconds": statistics.summary(seconds[name])}
        row["warm_seconds"], row["warm_way"] = statistics.summary(again[name]), warm[name].way
        row["over_dense"] = statistics.ratio(seconds[name], seconds[fastest])
        row["fastest_dense"] = name == fastest
        if name in eager:
            row["eager_seconds"] = statistics.summary([one / layers for one in eager[name]])
        row["bytes"] = held[name].read_bytes if name in held else _dense_bytes(traces[0], name)
        row |= rates(seconds[name], row["bytes"], copy["median"])
        row["warm_bytes_per_second"] = row["bytes"] / row["warm_seconds"]["median"]
        if name in held:
            row["host_waits_a_call"] = waits[name]
            row |= certified_row(held[name], rotated[name], exact, part, f"{tokens:,} tokens, {name}")
        else:
            row["error"] = errors(calls[name][0](), exact)
        rows.append(row)
    return [{"context": tokens, "layers": layers, "copy_bytes_per_second": copy, **row} for row in rows]


def _loop(calls: list[Call]) -> Call:
    def call() -> None:
        for one in calls:
            one()

    return call


def _dense_bytes(trace: Trace, name: str) -> float:
    copies = trace.query.shape[1] // trace.keys.shape[1] if name.endswith("repeated") else 1
    return float((trace.keys.nbytes + trace.values.nbytes) * copies)


def certified_row(held: Held, replayed: Replay, exact: Tensor, part: Part, where: str) -> Row:
    """How the calls were served, that bounds hold, and that a graph computes what a plain call does."""
    row: Row = {}
    if part.device.type == "cuda":
        part.check(replayed.way == "graph", f"{where}: {replayed.way}")
    if replayed.outputs:
        same = [torch.equal(call(), output) for call, output in zip(held.calls, replayed.outputs, strict=True)]
        row["graph_equals_call"] = all(same)
        part.check(all(same), f"{where}: the graph's output is not the call's")
    output, over_bound = judge(held.cache, held.calls[0], exact)
    row |= {"error": errors(output, exact), "error_over_bound": over_bound, **served(held.cache)}
    part.check(over_bound <= 1, f"{where}: the true error is {over_bound:.4g} of the bound")
    check_fast(part, where, row)
    return row


def show(rows: list[Row]) -> None:
    """A short table, fastest first."""
    for row in sorted(rows, key=lambda row: row["seconds"]["median"] if "seconds" in row else 9e9):
        if "failed" in row:
            print(f"{row['context']:>9,} {row['system']:<38} {row['failed'][:100]}")
            continue
        line = f"{row['context']:>9,} {row['system']:<38} {1e6 * row['seconds']['median']:9.1f} us"
        line += f" {row['over_dense']['median']:6.3f} of dense {row['bytes_per_second']['median'] / 1e9:8.1f} GB/s"
        line += f" {100 * row['share_of_copy']:5.1f} % of copy, warm {1e6 * row['warm_seconds']['median']:9.1f} us"
        if "eager_seconds" in row:
            line += f", eager {1e6 * row['eager_seconds']['median']:8.1f} us"
        if "fast_share" in row:
            line += f", fast {row['fast_share']:.3f}, {row['kernels']}, bound {row['bound'] and row['bound']['p50']}"
        print(f"{line} [{row['way'][:60]}]", flush=True)


@torch.inference_mode()
def main(
    device: DeviceName = "cuda",
    out: OutFolder = Path("gpu_out"),
    kernel: KernelName = "auto",
    contexts: Annotated[str, typer.Option(help="tokens, with commas")] = "8192,32768,65536,131072",
    rounds: Annotated[int, typer.Option(help="samples of each")] = 21,
) -> None:
    """Measure all contexts; end with status 1 where a figure is not what it claims to be."""
    place = device_of(device)
    prepare(place)
    part = Part("attention", place, out, {"rows": [], "rounds": rounds_for(place, rounds), "caches_over_l2": CACHES_OVER_L2})
    for tokens in numbers(contexts) if place.type == "cuda" else [512]:
        with part.attempt(f"{tokens:,} tokens"):
            rows = measure(tokens, place, kernel, rounds_for(place, rounds), part)
            part.result["rows"] += rows
            show(rows)
        clean(place)
    part.close()


if __name__ == "__main__":
    typer.run(main)
