"""How else the decode kernel could have been made: each way timed beside dense attention, on the same tokens, in turns.

One query token, 8 KV heads of 4 query heads and 128 channels, K8 V4. What a candidate leaves out is said in `work`; the
dense ways pack the query heads of a KV head along positions, so that no KV head is repeated, or use `enable_gqa`.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import candidate_kernels as kernels
from benchmarks.common import save
from hf_certkv import CertifiedQuantizedCache, CertKVConfig
from hf_certkv.bench import statistics
from hf_certkv.bench.attention_op import judge
from hf_certkv.bench.harness import Timer
from hf_certkv.bench.model import KV_HEADS, QUERY_HEADS, model_config
from hf_certkv.bench.rows import evidence
from hf_certkv.bench.traces import Trace, errors, exact_attention, make_trace
from hf_certkv.kernels import cpu, cpu_step

CHANNELS = 128
attend = torch.nn.functional.scaled_dot_product_attention
BF16, FP32 = "dense bf16", "dense fp32"
SHIPPED, PASS, CERTIFICATE = "shipped: certified call", "shipped: numba call alone", "shipped: certificate alone"
ALL, HALF = "everything", "attention, no certificate"
Call = Callable[[], Any]


@dataclass
class Candidate:
    """A way, what of the work it does, and what its result is off by."""

    call: Call
    work: str
    checked: dict[str, Any]


def caches(trace: Trace) -> dict[str, Candidate]:
    """The shipped kernel on handles at a tolerance that all bounds meet, its parts, and the reference kernel."""
    out: dict[str, Candidate] = {}
    exact = exact_attention(trace)
    for name, kernel in ((SHIPPED, "auto"), ("reference kernel, plain torch: certified call", "reference")):
        settings = CertKVConfig(rtol=10.0, kernel=kernel)  # type: ignore[arg-type]
        cache = CertifiedQuantizedCache(model_config(CHANNELS, layers=1), settings=settings)
        cache.update(trace.keys[..., :-1, :], trace.values[..., :-1, :], 0)
        held = cache.update(trace.keys[..., -1:, :], trace.values[..., -1:, :], 0)

        def call(held: Any = held, cache: Any = cache) -> Tensor:  # handles do not keep their cache
            keys, values = held
            return attend(trace.query, keys, values, enable_gqa=True)

        step = _fused(call) if kernel == "auto" else None
        output, over_bound = judge(cache, call, exact)
        fast = evidence(cache)["fast_share"]
        if over_bound > 1 or fast < 1:
            raise RuntimeError(f"{name}: error / bound {over_bound}, fast path {fast}: expected at most 1, and 1")
        out[name] = Candidate(call, ALL, {"error": errors(output, exact), "error_over_bound": over_bound})
        if step is not None:
            out[PASS] = Candidate(step.run, "pass and certificate, without what Python does around them", {})
            out[CERTIFICATE] = Candidate(lambda step=step: _certify(step), "bounds and output from the pass's sums", {})  # type: ignore[misc]
    return out


def _fused(call: Call) -> cpu.FusedStep:
    """The step that a certified call makes."""
    made: list[cpu.FusedStep] = []
    original = cpu.FusedStep.run

    def run(self: cpu.FusedStep) -> None:
        made.append(self)
        original(self)

    cpu.FusedStep.run = run  # type: ignore[method-assign]
    try:
        call()
    finally:
        cpu.FusedStep.run = original  # type: ignore[method-assign]
    return made[0]


def _certify(step: cpu.FusedStep) -> None:
    step._do(cpu_step.CERTIFY)


def dense(trace: Trace) -> dict[str, Candidate]:
    """torch's ways of dense attention."""
    out = {}
    exact = exact_attention(trace)
    for kind, dtype in ((BF16, torch.bfloat16), (FP32, torch.float32)):
        keys, values, query = (part.to(dtype) for part in (trace.keys, trace.values, trace.query))
        packed = query.view(1, KV_HEADS, -1, CHANNELS)
        calls = {
            f"{kind}, packed": lambda q=packed, k=keys, v=values: attend(q, k, v).view(trace.query.shape),
            f"{kind}, enable_gqa": lambda q=query, k=keys, v=values: attend(q, k, v, enable_gqa=True),
        }
        for name, call in calls.items():
            out[name] = Candidate(call, "dense attention", {"error": errors(call(), exact)})
    return out


def sketches(trace: Trace, folder: Path) -> dict[str, Candidate]:
    """The same codes read in other ways; each is checked against float64 attention over what the codes stand for."""
    coded = kernels.encode(trace.keys[0], trace.values[0])
    query = (trace.query.float() / math.sqrt(CHANNELS)).view(KV_HEADS, -1, CHANNELS).contiguous()
    calls: dict[str, Call] = {
        "numba loops, vectorised by the compiler": lambda: kernels.loops(query, coded),
        "256 tokens to float32 by torch, then BLAS": lambda: kernels.tiles(query, coded, compiled=False),
        "256 tokens to float32 by numba, then BLAS": lambda: kernels.tiles(query, coded, compiled=True),
    }
    if kernels.compiler() is not None:
        function = kernels.build(folder)
        calls["C loops, gcc -O3 (needs a compiler)"] = lambda: kernels.in_c(query, coded, function)
    keys, values = coded.decoded()
    scores = query.double() @ keys.mT
    stored = (torch.softmax(scores, dim=-1) @ values).view(1, QUERY_HEADS, 1, CHANNELS)
    exact = exact_attention(trace)
    out = {}
    for name, call in calls.items():
        result = call().view(1, QUERY_HEADS, 1, CHANNELS)
        arithmetic = errors(result, stored)
        if not arithmetic["max"] < 1e-4:
            raise RuntimeError(f"{name}: off by {arithmetic['max']} of the output: expected float32 rounding")
        out[name] = Candidate(call, HALF, {"error": errors(result, exact), "error_of_arithmetic": arithmetic})
    out.update(_products(query, trace, torch.softmax(scores, dim=-1)))
    return out


def _products(query: Tensor, trace: Trace, weights: Tensor) -> dict[str, Candidate]:
    """torch's products of low precision: one half each, on formats that they can read and this package does not write."""
    keys, values = trace.keys[0].float(), trace.values[0].float()
    exact_scores = query.double() @ keys.double().mT
    low, high = keys.amin(dim=1, keepdim=True), keys.amax(dim=1, keepdim=True)
    scale, middle = (high - low) / 254, (high + low) / 2  # one scale a channel for the whole context
    codes = torch.round((keys - middle) / scale).to(torch.int8)
    shift = query @ middle.mT  # the same for all tokens: softmax does not see it, but scores are compared
    folded = query * scale
    out = {}

    def scored(name: str, work: str, call: Callable[[], list[Tensor]], units: Tensor | float) -> None:
        found = torch.stack([part.double() for part in call()]) * units + shift
        coded = (folded.double() @ codes.double().mT) + shift
        checked = {"score_error": float((found - exact_scores).abs().max()), "added": float((found - coded).abs().max())}
        out[name] = Candidate(call, work, checked)

    size = folded.abs().amax(dim=-1, keepdim=True) / 127
    whole = torch.round(folded / size).to(torch.int8)
    scored(
        "_int_mm, int8 queries", "scores only; one key scale a channel for the whole context",
        lambda: [torch._int_mm(q, k.t()) for q, k in zip(whole, codes, strict=True)], size.double(),
    )  # fmt: skip
    halves, ones = folded.bfloat16(), torch.ones(codes.shape[1], dtype=torch.bfloat16)
    scored(
        "_weight_int8pack_mm, bf16 queries", "scores only, rounded to bf16; one key scale a channel for the whole context",
        lambda: [torch.ops.aten._weight_int8pack_mm(q, k, ones) for q, k in zip(halves, codes, strict=True)], 1.0,
    )  # fmt: skip
    grouped = values.unflatten(1, (-1, kernels.GROUP))  # groups of tokens, not of channels: that is how these products go
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    step = ((high - low) / 15).clamp_min(1e-6).bfloat16()
    zero = (low + 8 * step.float()).bfloat16()
    nibbles = torch.round((grouped - zero.float().unsqueeze(2)) / step.float().unsqueeze(2) + 8).clamp(0, 15).to(torch.int32)
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(one.flatten(0, 1).t().contiguous(), 2) for one in nibbles]
    scales = torch.stack([step, zero], dim=-1)
    rough = weights.bfloat16()

    def mixed() -> list[Tensor]:
        return [
            torch.ops.aten._weight_int4pack_mm_for_cpu(w, v, kernels.GROUP, s)
            for w, v, s in zip(rough, packed, scales, strict=True)
        ]

    found = torch.stack(mixed()).double()
    decoded = (nibbles.double() - 8) * step.double().unsqueeze(2) + zero.double().unsqueeze(2)
    coded = weights @ decoded.flatten(1, 2)
    exact = weights @ values.double()
    checked = {"error": errors(found, exact), "added": errors(found, coded)}
    work = "values only, weights and output rounded to bf16; a value scale for 32 tokens of a channel"
    out["_weight_int4pack_mm, bf16 weights"] = Candidate(mixed, work, checked)
    return out


def measure(tokens: int, count: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All candidates at one number of tokens and threads."""
    torch.set_num_threads(count)
    trace = make_trace("diffuse", tokens)
    found = {**dense(trace), **caches(trace), **sketches(trace, folder)}
    seconds = Timer(rounds).run({name: one.call for name, one in found.items()}, repeatable=True).seconds
    fastest = {}
    for kind in (BF16, FP32):
        names = [name for name in found if name.startswith(kind)]
        fastest[kind] = min(names, key=lambda name: statistics.summary(seconds[name])["median"])
    rows = []
    for name, one in found.items():
        row = {"tokens": tokens, "threads": count, "candidate": name, "work": one.work, **one.checked}
        row["seconds"] = statistics.summary(seconds[name])
        row["fastest_dense"] = name in fastest.values()
        for key, kind in (("over_bf16", BF16), ("over_fp32", FP32)):
            row[key] = statistics.ratio(seconds[name], seconds[fastest[kind]])
            row[key]["of_minima"] = min(seconds[name]) / min(seconds[fastest[kind]])
        rows.append(row)
        print(f"{tokens:7,} {count} {name:45} {1e3 * row['seconds']['median']:8.2f} ms {row['over_bf16']['median']:6.2f}")
    return rows


def main(
    tokens: Annotated[str, typer.Option(help="with commas")] = "8192,32768",
    threads_: Annotated[str, typer.Option("--threads", help="with commas")] = "1,2",
    rounds: Annotated[int, typer.Option(help="samples of each")] = 11,
) -> None:
    """Measure all candidates and save `benchmarks/results/candidates.json`."""
    rows: list[dict[str, Any]] = []
    loads: list[dict[str, Any]] = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for size in tokens.split(","):
            for count in threads_.split(","):
                if hasattr(os, "getloadavg"):
                    loads.append({"tokens": int(size), "threads": int(count), "load": os.getloadavg()[0]})
                rows += measure(int(size), int(count), rounds, Path(folder))
                shape = {"kv_heads": KV_HEADS, "query_heads": QUERY_HEADS, "channels": CHANNELS}
                save("candidates", {**shape, "loads": loads, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
