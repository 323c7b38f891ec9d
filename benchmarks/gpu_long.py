"""A request of a million tokens on one GPU: as many layers of 8B shape as host memory and time allow, and what they say of 32.

Originals lie in pinned host memory, 4 GiB a layer and million tokens: 32 layers would need more than most machines have.
Figures for 32 layers are extrapolated in proportion to the layers, and named so.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu_common import (
    DeviceName,
    KernelName,
    OutFolder,
    Part,
    check_fast,
    device_of,
    filling,
    host_bytes,
    prepare,
    rounds_for,
    served,
    settings,
)
from benchmarks.gpu_model import LAYERS, allocated, build, device_profile, fill, fill_layer, in_place, model_config, steps
from hf_certkv import CertifiedQuantizedCache
from hf_certkv.bench import statistics
from hf_certkv.bench.harness import Timer, synchronizer
from hf_certkv.bench.systems import ANY_TOLERANCE

SPARE = 16 * 2**30  # bytes of host memory that stay free
Row = dict[str, Any]


def fill_some(
    cache: Any, tokens: int, config: Any, device: torch.device, seconds: float, layers: int, host: int
) -> tuple[int, str, int | None]:
    """Fill layer after layer. Returns how many, what ended it, and what the device allocated; the rest are taken away."""
    before, start, count, why = allocated(device), time.perf_counter(), 0, "all layers"
    with filling():
        while count < layers:
            fill_layer(cache, count, tokens, config, device)
            count += 1
            each = (time.perf_counter() - start) / count
            if time.perf_counter() - start + each > seconds:
                why = "time"
                break
            free = host_bytes()
            if host and free is not None and free < host + (SPARE if device.type == "cuda" else 0):
                why = "host memory"
                break
            if device.type == "cuda" and free_bytes(device) < 24 * 2**30:
                why = "device memory"
                break
    del cache.layers[count:]
    after = allocated(device)
    return count, why if count < layers else "all layers", None if before is None or after is None else after - before


def free_bytes(device: torch.device) -> int:
    """Device memory that can still be allocated."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def extrapolated(row: Row, fixed: float, count: int) -> Row:
    """What LAYERS layers would take, if each takes what those that were measured take. `fixed`: seconds besides the layers."""
    factor = LAYERS / count
    out: Row = {"layers": LAYERS, "seconds": fixed + (row["seconds"]["median"] - fixed) * factor}
    for name in ("allocated_bytes", "host_bytes"):
        out[name] = None if row.get(name) is None else row[name] * factor
    return {"extrapolated": out}


@torch.inference_mode()
def main(
    device: DeviceName = "cuda",
    out: OutFolder = Path("gpu_out"),
    kernel: KernelName = "auto",
    tokens: Annotated[int, typer.Option(help="of the request")] = 2**20,
    seconds: Annotated[float, typer.Option(help="that filling the certified cache may take")] = 45.0,
    rounds: Annotated[int, typer.Option(help="steps of each")] = 9,
) -> None:
    """Fill, step, and say how far it got; end with status 1 where a figure is not what it claims to be."""
    place = device_of(device)
    prepare(place)
    cuda = place.type == "cuda"
    tokens, layers = (tokens, LAYERS) if cuda else (1024, 2)
    config = model_config(place, layers)
    cache = CertifiedQuantizedCache(config, settings=settings(kernel, rtol=ANY_TOLERANCE, refine="off"))
    part = Part("long", place, out, {"tokens": tokens, "rows": [], "settings": cache.settings.to_dict()})
    part.result["host_free_bytes"] = host_bytes()
    with part.attempt(f"{tokens:,} tokens"):
        start = time.perf_counter()
        per_layer = 4 * 2**30 if cuda else 0
        count, why, grown = fill_some(cache, tokens, config, place, seconds, layers, per_layer)
        part.result |= {"layers": count, "stopped_by": why, "fill_seconds": time.perf_counter() - start}
        model = build(model_config(place, count), place)
        memory = cache.memory()
        certified: Row = {"system": "fast path K8 V4", "layers": count, "allocated_bytes": grown, "host_bytes": memory.host}
        certified["memory"] = memory.to_dict()
        dense, dense_row = in_place(model.config), {"system": "dense, in place", "layers": count}
        caches = {"fast path K8 V4": cache}
        if not cuda or free_bytes(place) > memory.dense + 12 * 2**30:
            dense_row |= fill(dense, tokens, model.config, place)
            caches["dense, in place"] = dense
        else:
            part.result["dense"] = f"{memory.dense / 2**30:.1f} GiB of dense keys and values do not fit beside the rest"
        calls = {name: steps(model, one) for name, one in caches.items()}
        wait = synchronizer(place)
        hidden = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=place)
        fixed = Timer(rounds_for(place, rounds), synchronize=wait).run({"head": lambda: model.lm_head(hidden)}, True).seconds
        besides = statistics.summary(fixed["head"])
        found = Timer(rounds_for(place, rounds), 3, synchronize=wait).run(calls).seconds
        for row in (certified, dense_row):
            if row["system"] not in found:
                continue
            name = str(row["system"])
            row["seconds"] = statistics.summary(found[name])
            row["device_seconds"], row["kernels_a_step"], _ = device_profile(calls[name], place)
            row |= extrapolated(row, besides["median"], count)
            part.result["rows"].append(row)
        certified |= served(cache)
        check_fast(part, f"{tokens:,} tokens", certified)
        part.result["besides_the_layers_seconds"] = besides
        for row in part.result["rows"]:
            wide = row["extrapolated"]
            print(
                f"{tokens:,} tokens, {count} layers ({why}): {row['system']}: {1e3 * row['seconds']['median']:.2f} ms a step, "
                f"extrapolated to {wide['layers']} layers: {1e3 * wide['seconds']:.2f} ms, "
                f"{(wide['allocated_bytes'] or 0) / 2**30:.1f} GiB on the device"
            )
    part.close()


if __name__ == "__main__":
    typer.run(main)
