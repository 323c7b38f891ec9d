"""One cache in a process of its own, and that process's memory: `python -m hf_certkv.bench.resident REQUEST`.

Prints one line of JSON. Resident bytes are of the whole process, so what counts is the difference before and after filling,
once the allocator gave back what was freed; beside it, untrimmed, with what it keeps. The peak is above what was resident
before, and has in it the keys and values of the one layer that is being handed over.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .harness import synchronizer
from .memory import counted
from .model import QUERY_HEADS, model_config
from .systems import System, all_systems
from .traces import make_trace

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """This process's resident set; None without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def return_freed() -> bool:
    """Ask glibc to give back what is freed and only kept for later: otherwise it is resident, and no one's. False elsewhere."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def restart_peak() -> bool:
    """Begin the peak anew, where the system allows it: what importing took is not the cache's."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """The largest resident set since the start, or since `restart_peak`; None where it cannot be told."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(
    system: System, context: int, head_dim: int, batch: int, layers: int, device: torch.device, seed: int, steps: int
) -> dict[str, Any]:
    """Fill a cache layer by layer, decode some tokens of attention, and say what it took."""
    config = model_config(head_dim, layers)
    sizes = {"heads": config.num_key_value_heads, "query_heads": QUERY_HEADS, "channels": head_dim}
    # A small one first: what libraries set up at their first use is not the cache's either.
    _fill(system.make(model_config(head_dim, 1)), "diffuse", 512, batch, 1, seed, device, sizes, steps)
    gc.collect()
    return_freed()
    restarted = restart_peak()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
    before, device_before = resident_bytes(), torch.cuda.memory_allocated(device) if cuda else None
    cache = system.make(config)
    seconds = _fill(cache, "diffuse", context, batch, layers, seed, device, sizes, steps)
    gc.collect()
    untrimmed, peak = resident_bytes(), peak_bytes()
    trimmed = return_freed()
    after = resident_bytes()
    out: dict[str, Any] = {
        "counted": counted(cache),
        "resident_before_bytes": before,
        "resident_after_bytes": after,
        "resident_untrimmed_bytes": None if before is None or untrimmed is None else untrimmed - before,
        "trimmed": trimmed,
        "resident_bytes": None if before is None or after is None else after - before,
        "peak_above_before_bytes": None if before is None or peak is None else peak - before,
        "peak_restarted": restarted,
        **seconds,
    }
    if cuda:
        out["device_allocated_bytes"] = torch.cuda.memory_allocated(device) - (device_before or 0)
        out["device_peak_bytes"] = torch.cuda.max_memory_allocated(device) - (device_before or 0)
    return out


def _fill(
    cache: Any, trace: str, context: int, batch: int, layers: int, seed: int, device: torch.device, sizes: Any, steps: int
) -> dict[str, float]:
    """Hand over `context` tokens a layer, then `steps` single ones with attention. Returns seconds of each."""
    fill = step = 0.0
    wait = synchronizer(device)
    query = torch.empty(0)
    for layer in range(layers):
        drawn = make_trace(trace, context, batch, seed=seed + layer, device=device, **sizes)
        query = drawn.query
        start = time.perf_counter()
        returned = cache.update(drawn.keys, drawn.values, layer)
        wait()
        fill += time.perf_counter() - start
        del drawn, returned
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for layer in range(layers):
            new = torch.randn(2, batch, sizes["heads"], 1, sizes["channels"], generator=generator)
            key, value = new.to(device, torch.bfloat16)
            start = time.perf_counter()
            keys, values = cache.update(key, value, layer)
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            wait()
            step += (time.perf_counter() - start) / steps
            del keys, values
    return {"fill_seconds": fill, "step_seconds": step}


def main() -> None:
    """Answer the request on the command line."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    name = request.pop("system")
    system = next(one for one in all_systems() if one.name == name)
    with torch.no_grad():
        print(json.dumps(measure(system, device=torch.device(request.pop("device")), **request)))


if __name__ == "__main__":
    main()
