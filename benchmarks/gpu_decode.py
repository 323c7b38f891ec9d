"""A decode step of a whole model of 8B shape on a GPU: dense caches beside the certified one, time and memory.

Caches are filled through `update` with random keys and values: a prefill would take minutes. `DynamicCache` copies all keys and
values at each step; `dense, in place` has room for the next token, and is the faster dense cache.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

from benchmarks.gpu_common import (
    Call,
    DeviceName,
    KernelName,
    OutFolder,
    Part,
    check_fast,
    clean,
    device_of,
    host_syncs,
    numbers,
    prepare,
    rounds_for,
    served,
    settings,
)
from benchmarks.gpu_model import LAYERS, allocated, build, device_profile, fill, in_place, model_config, steps
from hf_certkv import CertifiedQuantizedCache
from hf_certkv.bench import statistics
from hf_certkv.bench.harness import Timer, synchronizer
from hf_certkv.bench.systems import ANY_TOLERANCE, DYNAMIC

IN_PLACE, FAST = "dense, in place", "fast path K8 V4"
BLOCK = 64  # tokens: as many steps finish one block a layer
WARM_UP = 3
PROFILE = "profile.txt"
Row = dict[str, Any]


def systems(config: Any, kernel: str, formats: list[int]) -> dict[str, Call]:
    """How each cache is made."""
    out: dict[str, Call] = {DYNAMIC: lambda: DynamicCache(config=config), IN_PLACE: lambda: in_place(config)}
    for bits in formats:
        given = settings(kernel, rtol=ANY_TOLERANCE, value_bits=bits)
        out[f"fast path K8 V{bits}"] = lambda given=given: CertifiedQuantizedCache(config, settings=given)  # type: ignore[misc]
    return out


def measure(
    model: Any, tokens: int, device: torch.device, kernel: str, formats: list[int], rounds: int, part: Part, text: Path
) -> list[Row]:
    """Rows of all systems at one context."""
    config, caches, rows = model.config, {}, {}
    for name, make in systems(config, kernel, formats).items():
        start = time.perf_counter()
        caches[name] = make()
        rows[name] = {"context": tokens, "layers": config.num_hidden_layers, "system": name}
        rows[name] |= fill(caches[name], tokens, config, device)
        rows[name]["fill_seconds"] = time.perf_counter() - start
    calls = {name: steps(model, cache) for name, cache in caches.items()}
    found = Timer(rounds, WARM_UP, synchronize=synchronizer(device)).run(calls).seconds
    # Each cache alone, without the others between its steps; allocations of a step are the same, what is live is not.
    for name, row in rows.items():
        row["seconds"] = statistics.summary(found[name])
        for other in (DYNAMIC, IN_PLACE):
            row[f"over_{other}"] = statistics.ratio(found[name], found[other])
        row["host_waits_a_step"] = host_syncs(calls[name], device)
        row["peak_above_held_bytes"] = _peak(calls[name], device)
        row["device_seconds"], row["kernels_a_step"], table = device_profile(calls[name], device)
        with text.open("a", encoding="utf-8") as file:
            file.write(f"\n\none step, {tokens:,} tokens, {config.num_hidden_layers} layers, {name}\n\n{table}\n")
        if name.startswith("fast path"):
            row |= served(caches[name])
            check_fast(part, f"{tokens:,} tokens, {name}", row)
            row |= block_step(calls[name], caches[name], device)
            row["memory"] = caches[name].memory().to_dict()
    return list(rows.values())


def _peak(call: Call, device: torch.device) -> int | None:
    """Bytes that a step takes for a while beyond what is held."""
    before = allocated(device)
    if before is None:
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated(device)) - before


def block_step(call: Call, cache: CertifiedQuantizedCache, device: torch.device) -> Row:
    """Seconds of the step that finishes a block in every layer: one in BLOCK, and costlier than the others."""
    wait, layer = synchronizer(device), cache.certified_layers[0]
    for _ in range(2 * BLOCK):
        before = layer.store.blocks
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds = time.perf_counter() - start
        if layer.store.blocks > before:
            return {"block_step_seconds": seconds}
    return {"block_step_seconds": None}


def show(rows: list[Row]) -> None:
    """A short table."""
    for row in rows:
        line = f"{row['context']:>9,} {row['system']:<18} {1e3 * row['seconds']['median']:8.2f} ms a step"
        line += f" ({row[f'over_{DYNAMIC}']['median']:.3f} of {DYNAMIC}, {row[f'over_{IN_PLACE}']['median']:.3f} of in place)"
        if row["device_seconds"] is not None:
            line += f", kernels {1e3 * row['device_seconds']:8.2f} ms in {row['kernels_a_step']}"
        line += f", {(row['allocated_bytes'] or row['device_bytes']) / 2**30:7.3f} GiB"
        if "fast_share" in row:
            line += f", fast {row['fast_share']:.3f}, {row['kernels']}, block step {row['block_step_seconds']}"
        print(line, flush=True)


@torch.inference_mode()
def main(
    device: DeviceName = "cuda",
    out: OutFolder = Path("gpu_out"),
    kernel: KernelName = "auto",
    contexts: Annotated[str, typer.Option(help="tokens, with commas")] = "8192,32768,65536,131072",
    formats: Annotated[str, typer.Option(help="bits of values, with commas")] = "4",
    rounds: Annotated[int, typer.Option(help="steps of each")] = 15,
) -> None:
    """Measure all contexts; end with status 1 where a figure is not what it claims to be."""
    place = device_of(device)
    prepare(place)
    config = model_config(place, LAYERS if place.type == "cuda" else 2)
    part = Part("decode", place, out, {"rows": [], "model": {**config.to_diff_dict(), "dtype": "bfloat16"}})
    out.mkdir(parents=True, exist_ok=True)
    (out / PROFILE).write_text("torch.profiler, one decode step each\n", encoding="utf-8")
    before = allocated(place)
    model = build(config, place)
    part.result["weight_bytes"] = None if before is None else (allocated(place) or 0) - before
    for tokens in numbers(contexts) if place.type == "cuda" else [512]:
        with part.attempt(f"{tokens:,} tokens"):
            rows = measure(model, tokens, place, kernel, numbers(formats), rounds_for(place, rounds), part, out / PROFILE)
            part.result["rows"] += rows
            show(rows)
        clean(place)
    part.close()


if __name__ == "__main__":
    typer.run(main)
