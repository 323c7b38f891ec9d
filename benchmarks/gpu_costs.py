"""What leaving the fast path costs on a GPU: a promoted block (from pinned host memory, or hot), and a head served densely.

Tolerances are searched that promote a wanted share of the blocks, or leave a wanted number of heads to the dense rung; what
they really did is read from the record of a call. A straight line through the times gives the cost of one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.gpu_attention import Held, dense_calls
from benchmarks.gpu_common import (
    Call,
    DeviceName,
    DeviceTimer,
    KernelName,
    OutFolder,
    Part,
    clean,
    device_of,
    draw,
    numbers,
    prepare,
    replay,
    rounds_for,
    settle,
    with_rtol,
)
from hf_certkv.bench import statistics
from hf_certkv.bench.systems import ANY_TOLERANCE
from hf_certkv.bench.traces import Trace
from hf_certkv.certificate import StepRecord
from hf_certkv.ladder import Rung

SHARES = (0.0, 0.002, 0.01, 0.03, 0.1, 0.2)  # of all pages (a block has two: its keys and its values)
SPREAD = (0.7, 1.3)  # factors of the queries of the first and the last KV head, so that no two heads fail at one tolerance
SEARCHES = 12
MOST_REFILLS = 512  # a refill brings a few blocks of each head only
DENSE = "dense"
Row = dict[str, Any]


def spread(trace: Trace) -> Trace:
    """The same trace with queries of a different size for each KV head."""
    heads = trace.keys.shape[1]
    factors = torch.linspace(*SPREAD, heads, device=trace.query.device).repeat_interleave(trace.query.shape[1] // heads)
    return Trace(trace.name, trace.keys, trace.values, (trace.query * factors[:, None, None]).to(trace.query.dtype), trace.seed)


def record_of(held: Held) -> StepRecord:
    """The record of one more call of the first layer."""
    recorder = held.cache.recorder
    held.cache.report()  # what came before is counted and not kept
    kept, recorder.full = recorder.full, True
    try:
        held.calls[0]()
        held.cache.report()
        return recorder.records[-1]
    finally:
        recorder.full = kept
        recorder.records.clear()


def relative_bounds(held: Held) -> list[float]:
    """The fast path's bound over the output's norm, of the worst query head of each KV head, ascending."""
    with_rtol(held.cache, ANY_TOLERANCE)
    record = record_of(held)
    by_head = (record.candidate / record.norm).reshape(held.traces[0].keys.shape[1], -1).max(axis=1)
    return sorted(float(one) for one in by_head)


def pages(record: StepRecord) -> int:
    """Pages that were promoted: keys and values count each."""
    return int(record.key_blocks.sum() + record.value_blocks.sum())


def describe(record: StepRecord, all_pages: int) -> Row:
    """What a call did."""
    dense = (record.rung == Rung.DENSE_HEAD) | (record.rung == Rung.DENSE_LAYER)
    return {
        "pages": pages(record),
        "pages_share": pages(record) / all_pages,
        "fast_share": float((record.rung == Rung.FAST).mean()),
        "dense_share": float(dense.mean()),
        "bytes_moved": record.bytes_moved,
        "kernel": record.kernel,
    }


def search(held: Held, share: float, highest: float, all_pages: int) -> float:
    """The largest tolerance found that promotes at least this share of the pages; ANY_TOLERANCE for none."""
    if share <= 0:
        return ANY_TOLERANCE
    low, high = highest / 8, highest * 1.01
    for _ in range(SEARCHES):
        middle = math.sqrt(low * high)
        with_rtol(held.cache, middle)
        if pages(record_of(held)) >= share * all_pages:
            low = middle
        else:
            high = middle
    return low


def timed(held: Held, dense: Call, device: torch.device, rounds: int) -> Row:
    """Seconds of a call as the cache is now, in turns with dense attention."""
    found = replay(held.calls[:1], device, held.restore)
    seconds = DeviceTimer(device, rounds).run({"ours": found.call, DENSE: dense}, repeatable=True).seconds
    row: Row = {"way": found.way, "seconds": statistics.summary(seconds["ours"])}
    row["dense_seconds"] = statistics.summary(seconds[DENSE])
    return row


def fit(points: list[Row], name: str) -> Row:
    """seconds = fixed + each * points[name], least squares over the points that left the fast path; and the worst residual.

    The fast path is no point of the line: what leaving it costs at all is in `fixed`.
    """
    there = [point for point in points if point[name] > 0]
    x = np.array([point[name] for point in there], dtype=np.float64)
    y = np.array([point["seconds"]["median"] for point in there])
    if len(there) < 2 or np.ptp(x) == 0:
        return {"of": name, "fixed_seconds": None, "each_seconds": None, "worst_residual": None, "points": len(there)}
    each, fixed = np.polyfit(x, y, 1)
    return {
        "of": name,
        "fixed_seconds": float(fixed),
        "each_seconds": float(each),
        "worst_residual": float(np.abs(fixed + each * x - y).max()),
        "points": len(there),
    }


def break_even(points: list[Row], line: Row, whole: int) -> float | None:
    """The share at which a call takes as long as dense attention; None where leaving the fast path takes longer."""
    if line["each_seconds"] is None or line["each_seconds"] <= 0:
        return None
    dense = float(np.median([point["dense_seconds"]["median"] for point in points]))
    count = (dense - line["fixed_seconds"]) / line["each_seconds"]
    return min(1.0, count / whole) if count > 0 else None


def heat(held: Held, device: torch.device) -> Row:
    """Fetch what a call promotes into the hot slots, as one `update` after the other would, until nothing more comes."""
    layer, held_before = held.cache.certified_layers[0], -1
    for _ in range(MOST_REFILLS):
        forget_wishes(layer)
        promoted = pages(record_of(held))
        layer.prefetch()
        settle(held.cache, device)
        filled = 0 if layer.hot.blocks is None else int((layer.hot.blocks >= 0).sum())
        if filled == held_before:
            break
        held_before = filled
    forget_wishes(layer)
    return {"hot_pages": 2 * filled, "promoted_beside_hot": promoted}


def forget_wishes(layer: Any) -> None:
    """Nothing is to be fetched at the next `prefetch`."""
    for name in ("wanted", "promoted"):
        if hasattr(layer, name):
            setattr(layer, name, None)


def forget(layer: Any) -> None:
    """Empty the hot slots."""
    layer.hot.clear()
    forget_wishes(layer)


def promotions(trace: Trace, dense: Call, device: torch.device, kernel: str, rounds: int, hot: bool) -> Row:
    """Points and line of promoted pages, whose originals are on the host or, `hot`, on the device."""
    blocks = trace.keys.shape[2] // 64
    slots = blocks if hot else 0
    held = Held([trace], device, kernel, refine="off", dense_head_share=1.0, dense_layer_share=1.0, hot_blocks=slots)
    layer = held.cache.certified_layers[0]
    all_pages = 2 * layer.store.blocks * layer.heads
    highest, points = relative_bounds(held)[-1], []
    for share in SHARES if device.type == "cuda" else SHARES[::2]:
        rtol = search(held, share, highest, all_pages)
        with_rtol(held.cache, rtol)
        record = record_of(held)
        point = {"rtol": rtol, "wanted": share, **describe(record, all_pages)}
        if hot:
            point |= heat(held, device)
        points.append({**point, **timed(held, dense, device, rounds)})
        forget(layer)
    line = fit(points, "hot_pages" if hot else "pages")
    return {"all_pages": all_pages, "points": points, "line": line, "break_even_share": break_even(points, line, all_pages)}


def dense_heads(trace: Trace, dense: Call, device: torch.device, kernel: str, rounds: int) -> Row:
    """Points and line of KV heads that are served densely on the originals, one by one, and of the whole layer."""
    held = Held([trace], device, kernel, refine="off", dense_head_share=0.0, dense_layer_share=1.0)
    bounds, heads = relative_bounds(held), trace.keys.shape[1]
    points = []
    for count in sorted({0, 1, 2, heads // 2, heads - 1}):
        rtol = math.sqrt(bounds[-count] * bounds[-count - 1]) if count else ANY_TOLERANCE
        with_rtol(held.cache, rtol)
        record = record_of(held)
        point = {"rtol": rtol, "wanted": count, **describe(record, 1)}
        point["heads"] = round(point["dense_share"] * heads)
        points.append({**point, **timed(held, dense, device, rounds)})
    line = fit(points, "heads")
    with_rtol(held.cache, 0.0)
    layer = {**describe(record_of(held), 1), **timed(held, dense, device, rounds)}
    even = break_even(points, line, heads)
    return {"heads": heads, "points": points, "line": line, "break_even_share": even, "whole_layer": layer}


def fastest_dense(trace: Trace, device: torch.device) -> tuple[str, Call]:
    """torch's own choice of attention, in the form that is fastest here."""
    ways: dict[str, Call] = {}
    for form in ("grouped", "packed"):
        ways[form] = replay(dense_calls([trace], "torch's choice", form), device).call
    found = DeviceTimer(device, 5).run(ways, repeatable=True).seconds
    name = min(found, key=lambda form: statistics.summary(found[form])["median"])
    return name, ways[name]


def show(tokens: int, name: str, found: Row) -> None:
    """The points, the line and the break-even share."""
    for point in found["points"]:
        done = f"{point['pages']:,} pages" if "heads" not in point else f"{point['heads']} heads"
        done += f", {point['hot_pages']:,} hot" if "hot_pages" in point else ""
        print(f"{tokens:>9,} {name:<12} {done:<28} {1e6 * point['seconds']['median']:10.1f} us [{point['way'][:50]}]")
    each, even = found["line"]["each_seconds"], found["break_even_share"]
    print(f"{tokens:>9,} {name}: {'-' if each is None else f'{1e6 * each:.3f} us'} each, break even at {even}", flush=True)


def check(part: Part, where: str, found: Row) -> None:
    """The points must have left the fast path as wanted, and by the GPU's kernels on a GPU."""
    moved = [point.get("heads", point["pages"]) for point in found["points"]]
    part.check(moved[0] == 0 and max(moved) > 0, f"{where}: promoted or dense: {moved}")
    if part.device.type == "cuda":
        kernels = sorted({point["kernel"] for point in found["points"]})
        part.check(kernels == ["triton"], f"{where}: calls by kernel {kernels}")


@torch.inference_mode()
def main(
    device: DeviceName = "cuda",
    out: OutFolder = Path("gpu_out"),
    kernel: KernelName = "auto",
    contexts: Annotated[str, typer.Option(help="tokens, with commas")] = "32768,131072",
    rounds: Annotated[int, typer.Option(help="samples of each")] = 11,
) -> None:
    """Measure all contexts; end with status 1 where nothing was promoted, or something else than wanted happened."""
    place = device_of(device)
    prepare(place)
    part = Part("costs", place, out, {"contexts": []})
    for tokens in numbers(contexts) if place.type == "cuda" else [512]:
        found: Row = {"context": tokens}
        part.result["contexts"].append(found)
        trace, count = spread(draw(tokens, place, seed=0)), rounds_for(place, rounds)
        found["dense"], dense = fastest_dense(trace, place)
        for name, hot in (("pinned", False), ("hot", True)):
            with part.attempt(f"{tokens:,} tokens, {name}"):
                found[name] = promotions(trace, dense, place, kernel, count, hot)
                check(part, f"{tokens:,} tokens, {name}", found[name])
                show(tokens, name, found[name])
        with part.attempt(f"{tokens:,} tokens, dense heads"):
            found["dense_heads"] = dense_heads(trace, dense, place, kernel, count)
            check(part, f"{tokens:,} tokens, dense heads", found["dense_heads"])
            show(tokens, "dense heads", found["dense_heads"])
        del trace, dense
        clean(place)
    part.close()


if __name__ == "__main__":
    typer.run(main)
