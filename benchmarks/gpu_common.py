"""What the GPU measurements share: where they run, how they time, what they draw, where results go.

`--device cpu` is a dry run with tiny sizes: it shows that a script works, and its figures say nothing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from hf_certkv import CertifiedQuantizedCache, CertKVConfig, store
from hf_certkv.bench.harness import Timer, describe_failure, synchronizer
from hf_certkv.bench.memory import available_bytes
from hf_certkv.bench.model import KV_HEADS, QUERY_HEADS
from hf_certkv.bench.rows import evidence
from hf_certkv.bench.run import plain
from hf_certkv.bench.traces import SMALL_QUERY, Trace
from hf_certkv.environment import describe

CHANNELS = 128
FILE = "gpu.json"
HEAD_START = 200_000  # cycles that the device waits, so that what is timed is queued before it begins
PIECE = 2**24  # numbers quantised at a time while a cache is filled, which is not timed
DeviceName = Annotated[str, typer.Option("--device", help="cuda, or cpu for a tiny dry run")]
OutFolder = Annotated[Path, typer.Option("--out", help=f"folder of {FILE}")]
KernelName = Annotated[str, typer.Option("--kernel", help="CertKVConfig.kernel of every cache")]
Call = Callable[[], Any]


def device_of(name: str) -> torch.device:
    """The device to measure on. Raises: typer.BadParameter: there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch sees no CUDA device here.")
    return torch.device(name)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what."""
    out = {**describe(), "device": device.type}
    for name in ("triton", "numba", "xxhash"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        out |= {
            "gpu": found.name,
            "gpu_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "capability": f"{found.major}.{found.minor}",
            "l2_bytes": l2_bytes(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return out


def l2_bytes(device: torch.device) -> int:
    """Size of the device's second-level cache; of a CPU, little enough for a dry run."""
    if device.type != "cuda":
        return 2**18
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 * 2**20


@dataclass
class Part:
    """One script's share of the results: written after every step, so that what was measured outlives a time limit.

    Attributes: name: in the file; device; out: folder; result: plain JSON types; problems: why the script ends with status 1.
    """

    name: str
    device: torch.device
    out: Path
    result: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Put what there is into the file, beside the other parts."""
        path = self.out / FILE
        self.out.mkdir(parents=True, exist_ok=True)
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
        held["machine"] = machine(self.device)
        held["parts"][self.name] = plain({**self.result, "problems": self.problems})
        other = path.with_suffix(".tmp")
        other.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        other.replace(path)

    def check(self, fine: bool, words: str) -> None:
        """Note a problem, and say so at once, unless all is fine."""
        if not fine:
            self.problems.append(words)
            print(f"PROBLEM: {words}", flush=True)

    @contextmanager
    def attempt(self, words: str) -> Iterator[None]:
        """What fails inside is a problem; what comes after it is measured all the same."""
        try:
            yield
        except Exception as error:
            self.check(False, f"{words}: {describe_failure(error)}")
        self.save()

    def close(self) -> None:
        """Save, and end with status 1 where there was a problem."""
        self.save()
        raise typer.Exit(1 if self.problems else 0)


class DeviceTimer(Timer):
    """Times by the device's own clock: events around the calls, which are queued before the device gets to them."""

    def __init__(self, device: torch.device, rounds: int, warmup: int = 2, seed: int = 0) -> None:
        super().__init__(rounds, warmup, seed, synchronize=synchronizer(device))
        self.device = device

    def _sample(self, candidate: Call, calls: int) -> float:
        if self.device.type != "cuda":
            return super()._sample(candidate, calls)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(HEAD_START)
        first.record()
        for _ in range(calls):
            candidate()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / calls


@dataclass
class Replay:
    """Something to call again and again.

    Attributes: way: "graph", or what is done instead, and why; outputs: of the graph; kept: what a graph writes to, and kernels
        called later might let go of.
    """

    call: Call
    way: str
    outputs: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


def host_syncs(call: Call, device: torch.device) -> int | None:
    """How often a call waits for the device, as far as torch notices; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(one.message) for one in found)


def replay(calls: Sequence[Call], device: torch.device, restore: Call = lambda: None) -> Replay:
    """All of these calls, one after the other, as one CUDA graph; in a plain loop where they cannot be captured.

    Args: restore: called after a capture that failed in the middle of the calls.
    """

    def loop() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return Replay(loop, "plain calls: no CUDA device")
    torch.cuda.synchronize()  # an event from before must not be waited for inside of a graph
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is allocated and compiled at first use is not for a graph
        for _ in range(2):
            loop()
    torch.cuda.current_stream(device).wait_stream(side)
    waits = host_syncs(loop, device)
    if waits:  # a capture would fail, and leave torch's allocator in the middle of it
        return Replay(loop, f"loop: {waits / len(calls):.1f} waits for the device a call")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            outputs = [call() for call in calls]
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:
        restore()
        torch.cuda.synchronize()
        return Replay(loop, f"loop: capture failed: {describe_failure(error)}")
    return Replay(graph.replay, "graph", outputs, _scratch())


def _scratch() -> list[Tensor]:
    """What the kernels work in, which steps share and replace when they need more of it."""
    step = sys.modules.get("hf_certkv.kernels.triton_step")
    return list(step.scratch.held.values()) if step is not None else []


def copy_seconds(device: torch.device, mebibytes: int = 1024) -> tuple[int, Call]:
    """A copy from device memory to device memory: the bytes that it reads and writes, and the call."""
    size = (mebibytes if device.type == "cuda" else 1) * 2**20
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size, lambda: target.copy_(source)


def draw(
    tokens: int,
    device: torch.device,
    seed: int,
    heads: int = KV_HEADS,
    query_heads: int = QUERY_HEADS,
    channels: int = CHANNELS,
    dtype: torch.dtype = torch.bfloat16,
) -> Trace:
    """As the trace `diffuse` of `hf_certkv.bench.traces`, drawn on the device itself: a CPU takes seconds a layer."""
    generator = torch.Generator(device).manual_seed(seed)
    keys = torch.empty(1, heads, tokens, channels, dtype=dtype, device=device)
    values = torch.empty_like(keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    for head in range(heads):
        keys[0, head] = normal(tokens, channels)
        values[0, head] = normal(tokens, channels) + normal(channels)
    query = SMALL_QUERY * normal(1, query_heads, 1, channels)
    return Trace("diffuse", keys, values, query.to(dtype), seed)


@contextmanager
def filling() -> Iterator[None]:
    """Quantise in larger pieces than a small device has room for, and, in a dry run, without compiling anything for that."""
    before = store.ENCODE_NUMBERS, store.COMPILED
    store.ENCODE_NUMBERS, store.COMPILED = PIECE, False
    try:
        yield
    finally:
        store.ENCODE_NUMBERS, store.COMPILED = before


def settle(cache: Any, device: torch.device) -> None:
    """Wait until the originals have arrived on the host: until then the device holds them as well."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    for layer in getattr(cache, "certified_layers", ()):
        layer.flush()


def with_rtol(cache: CertifiedQuantizedCache, rtol: float) -> None:
    """Give a filled cache another tolerance, on which nothing that it holds depends."""
    cache.settings = cache.settings.replace(rtol=rtol)
    for layer in cache.certified_layers:
        layer.config = layer.config.replace(rtol=rtol)
        layer.forget()


def served(cache: Any) -> dict[str, Any]:
    """How a cache's steps were served, and by which kernel; empty for a dense cache."""
    if not isinstance(cache, CertifiedQuantizedCache):
        return {}
    report = cache.report().to_dict()
    return {**evidence(cache), "kernels": report["overall"]["kernels"], "materialised": report["materialised_operations"]}


def check_fast(part: Part, where: str, found: dict[str, Any]) -> None:
    """What claims to be a figure of the fast path, and on a GPU of its kernels, must be one."""
    part.check(found.get("fast_share") == 1.0, f"{where}: share of the fast path {found.get('fast_share')}")
    part.check(found.get("materialised") == {}, f"{where}: served with originals: {found.get('materialised')}")
    if part.device.type == "cuda":
        part.check(set(found.get("kernels", ())) == {"triton"}, f"{where}: calls by kernel {found.get('kernels')}")


def settings(kernel: str, **changes: Any) -> CertKVConfig:
    """Settings of a cache, `kernel` being the one to ask for."""
    return CertKVConfig(kernel=kernel, **changes)  # type: ignore[arg-type]


def host_bytes() -> int | None:
    """Host memory that is free, within the limit of the container, where there is one."""
    free = available_bytes(torch.device("cpu"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        room = int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no container, or no limit
        return free
    return room if free is None else min(free, room)


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [int(one) for one in text.split(",") if one.strip()]


def rounds_for(device: torch.device, rounds: int) -> int:
    """Samples of each candidate; two in a dry run."""
    return rounds if device.type == "cuda" else 2


def prepare(device: torch.device) -> None:
    """Leave a dry run the threads that the environment asks for, and no more; spare a GPU's run the search for old garbage."""
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:  # every capture of a graph collects garbage, among all that was imported
        gc.collect()
        gc.freeze()


def clean(device: torch.device) -> None:
    """Give back what the last measurement held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
