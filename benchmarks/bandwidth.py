"""How fast this machine reads memory: what a pass over codes cannot beat, since it has to read them.

Arrays that fit the second-level cache, the third (of a core's share of it, at least), and none. Each thread reads its own part.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import torch
import typer

from benchmarks.common import save
from hf_certkv.bench import statistics
from hf_certkv.bench.harness import Timer
from hf_certkv.kernels import micro, threads

MIB = 2**20
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@numba.njit(nogil=True, cache=False)
def _largest(address: int, start: int, stop: int) -> float:
    """The kernel's own vector loads, one after the other."""
    return micro.largest(address, start * micro.LANES, (stop - start) * micro.LANES)


def caches() -> dict[str, str]:
    """Sizes of the data caches, where the system tells."""
    out = {}
    for folder in sorted(CACHES.glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            out[f"L{level}"] = size
    return out


def candidates(mebibytes: int) -> dict[str, Any]:
    """Ways to read (and write) an array; each call reads all of it once. The last copies it: as many bytes written."""
    floats = np.ones(mebibytes * MIB // 4, np.float32)
    tensor = torch.from_numpy(floats)
    other = torch.empty_like(tensor)
    return {
        "largest float32, vector code": lambda: threads.run(
            lambda start, stop: _largest(floats.ctypes.data, start, stop), len(floats) // micro.LANES
        ),
        "torch.sum of float32": lambda: tensor.sum(),
        "copy, torch": lambda: other.copy_(tensor),
    }


def measure(mebibytes: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """Bytes read a second, by way."""
    torch.set_num_threads(count)
    size = mebibytes * MIB
    samples = Timer(rounds).run(candidates(mebibytes), repeatable=True).seconds
    rows = []
    for name, seconds in samples.items():
        rates = statistics.summary([size / one for one in seconds])
        rows.append({"bytes": size, "threads": count, "way": name, "bytes_per_second": rates})
        print(f"{mebibytes:5} MiB {count} {name:28} {rates['median'] / 1e9:6.1f} GB/s, at most {rates['max'] / 1e9:6.1f}")
    return rows


def main(
    sizes: Annotated[str, typer.Option(help="MiB, with commas: in L2, in L3, in memory")] = "1,24,768",
    threads_: Annotated[str, typer.Option("--threads", help="with commas")] = "1,2",
    rounds: Annotated[int, typer.Option(help="samples of each")] = 15,
) -> None:
    """Measure and save `benchmarks/results/bandwidth.json`."""
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    rows: list[dict[str, Any]] = []
    for size in sizes.split(","):
        for count in threads_.split(","):
            rows += measure(int(size), int(count), rounds)
    save("bandwidth", {"caches": caches(), "load": load, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
