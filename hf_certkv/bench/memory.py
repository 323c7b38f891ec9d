"""Bytes of a cache: as counted from what it holds, as `certkv plan` predicts, and what this machine has left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..cache import CertifiedQuantizedCache, storage_bytes
from ..config import CertKVConfig
from ..plan import plan_memory
from .model import DTYPE, KV_HEADS, model_config
from .options import BenchOptions
from .systems import DENSE, OURS, System

USABLE = 0.7  # of the memory that is free
OURS_COPIES, OTHER_COPIES = 1.8, 1.2  # of the dense bytes: codes, planes and originals; codes, and what a step copies
SUBPROCESS_SECONDS = 1800


def counted(cache: Any) -> dict[str, int]:
    """Device and host bytes that a cache's tensors keep alive, whole storages, each counted once; and what ours works in."""
    if isinstance(cache, CertifiedQuantizedCache):
        memory = cache.memory()
        return {"device_bytes": memory.device + memory.working, "host_bytes": memory.host}
    return {"device_bytes": storage_bytes([vars(layer) for layer in cache.layers]), "host_bytes": 0}


def dense_bytes(context: int, head_dim: int, batch: int, layers: int) -> int:
    """Bytes of dense keys and values in bfloat16."""
    return 2 * batch * layers * KV_HEADS * context * head_dim * DTYPE.itemsize


def available_bytes(device: torch.device) -> int | None:
    """Free memory where the caches are, None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        import psutil
    except ImportError:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    return int(psutil.virtual_memory().available)


def too_large(need: int, device: torch.device) -> str | None:
    """Why something that needs so many bytes is not measured; None if there is room."""
    free = available_bytes(device)
    if free is None or need <= USABLE * free:
        return None
    return f"needs about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def needed(systems: list[System], dense: int, fixed: float) -> float:
    """Bytes for these systems' caches and `fixed` copies of the dense bytes."""
    return dense * (fixed + sum(OURS_COPIES if system.kind == OURS else OTHER_COPIES for system in systems))


def groups(systems: list[System], dense: int, fixed: float, device: torch.device) -> list[list[System]]:
    """As few groups as fit the free memory, each with the dense system; empty where not even the dense and another one fit."""
    free = available_bytes(device)
    if free is None or needed(systems, dense, fixed) <= USABLE * free:
        return [systems]
    reference = [system for system in systems if system.kind == DENSE]
    out: list[list[System]] = []
    for system in systems:
        if system.kind == DENSE:
            continue
        if not out or needed([*out[-1], system], dense, fixed) > USABLE * free:
            out.append([*reference])
        out[-1].append(system)
    return out if all(needed(group, dense, fixed) <= USABLE * free for group in out) else []


def predicted(system: System, context: int, head_dim: int, batch: int, layers: int, device: str) -> dict[str, int] | None:
    """What `certkv plan` says of this package's caches, and of what a step works in; None of the others."""
    if system.kind != OURS:
        return None
    settings = CertKVConfig.from_dict(dict(system.settings))
    plan = plan_memory(model_config(head_dim, layers), context, batch, DTYPE, settings, device)
    return {"device_bytes": plan.device + plan.working, "host_bytes": plan.host}


def resident(system: System, context: int, head_dim: int, batch: int, layers: int, options: BenchOptions) -> dict[str, Any]:
    """Fill one cache in a fresh process and measure that process: resident sets of systems in one process mix."""
    request = {
        "system": system.name, "context": context, "head_dim": head_dim, "batch": batch, "layers": layers,
        "device": options.device, "seed": options.seed, "threads": torch.get_num_threads(), "steps": 3,
    }  # fmt: skip
    package = Path(__file__).resolve().parent.parent.parent
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hf_certkv.bench.resident", json.dumps(request)],
            capture_output=True, text=True, check=False, timeout=SUBPROCESS_SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {SUBPROCESS_SECONDS} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"failed": (lines[-1] if lines else f"ended with status {done.returncode}")[:300]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(system: System, place: dict[str, Any], options: BenchOptions) -> tuple[dict[str, Any], str | None]:
    """A row: bytes predicted, counted and resident; or why it was left out. `place`: context, head_dim, batch, layers."""
    dense = dense_bytes(**place)
    for device in (torch.device("cpu"), torch.device(options.device)):
        reason = too_large(4 * dense, device)
        if reason is not None:
            return {}, reason
    found = resident(system, **place, options=options)
    row = {
        **place,
        "system": system.name,
        "dense_bytes": dense,
        "predicted": predicted(system, **place, device=options.device),
        **found,
    }
    return row, None
