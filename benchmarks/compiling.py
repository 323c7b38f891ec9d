"""How long kernels are waited for at their first use: compiled by numba, and later taken from its cache on disk.

Each sample is a process of its own that fills a short cache and decodes one token, first with an empty cache folder, then with
what that left there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import save
from hf_certkv.bench import statistics

PARTS = ("numba imported", "blocks written", "first step", "first promotion", "the same again")
ROOT = Path(__file__).parent.parent
CODE = """
import json, time
import torch
from hf_certkv import CertifiedQuantizedCache
from hf_certkv.bench.model import KV_HEADS, QUERY_HEADS, model_config

attend = torch.nn.functional.scaled_dot_product_attention
keys, values = torch.randn(2, 1, KV_HEADS, 512, 128, dtype=torch.bfloat16)
query = torch.randn(1, QUERY_HEADS, 1, 128, dtype=torch.bfloat16)
found = []

def timed(call):
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    found.append({"seconds": time.perf_counter() - wall, "processor": time.process_time() - processor})
    return result

def numba_imported():
    from hf_certkv.kernels import cpu_step, cpu_write

def filled(rtol):
    cache = CertifiedQuantizedCache(model_config(128, layers=1), rtol=rtol, kernel="cpu")
    cache.update(keys, values, 0)
    return cache, cache.update(keys[:, :, -1:], values[:, :, -1:], 0)

with torch.inference_mode():
    timed(numba_imported)
    fast, held = timed(lambda: filled(1e6))
    timed(lambda: attend(query, *held, enable_gqa=True))
    cache, held = filled(0.05)
    for _ in range(2):
        timed(lambda: attend(query, *held, enable_gqa=True))
assert cache.report().to_dict()["overall"]["promoted_key_blocks"] > 0
print(json.dumps(found))
"""


def sample(folder: str) -> list[dict[str, float]]:
    """Seconds, and those of the processor, of the parts in a new process that keeps its kernels in a folder."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


def main(rounds: Annotated[int, typer.Option(help="samples, each in two new processes")] = 5) -> None:
    """Measure and save `benchmarks/results/compiling.json`."""
    samples: dict[str, list[list[dict[str, float]]]] = {"compiled": [], "from disk": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for found in samples.values():
                found.append(sample(folder))
    rows: list[dict[str, Any]] = []
    for name, found in samples.items():
        for number, part in enumerate(PARTS):
            row: dict[str, Any] = {"kernels": name, "part": part}
            for key in ("seconds", "processor"):
                row[key] = statistics.summary([one[number][key] for one in found])
            rows.append(row)
            print(f"{name:10} {part:15} {row['seconds']['median']:7.3f} s, processor {row['processor']['median']:7.3f} s")
    save("compiling", {"rounds": rounds, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
