"""Synthetic keys, values and queries with stated statistics, which are also measured on what was drawn.

All traces: keys are standard normal; each value is standard normal plus a common vector of the head whose entries are standard
normal too, so that outputs do not average to nothing. What differs:

diffuse: queries of small norm (entries of standard deviation 0.5): weights nearly even over all tokens.
concentrated: each query points at four near-equal keys, which hold about nine tenths of its weight.
outliers: four key channels are 20 times larger; queries as in `diffuse`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

TRACES = ("diffuse", "concentrated", "outliers")
SMALL_QUERY = 0.5
NEEDLES, NEEDLE_SHARE, NEEDLE_SPREAD = 4, 0.9, 0.1
OUTLIERS, OUTLIER_FACTOR = 4, 20.0
TOP = 64


@dataclass(frozen=True)
class Trace:
    """keys, values: `[batch, kv_heads, tokens, channels]`; query: `[batch, query_heads, 1, channels]`; all of one dtype."""

    name: str
    keys: Tensor
    values: Tensor
    query: Tensor
    seed: int


def make_trace(
    name: str,
    tokens: int,
    batch: int = 1,
    heads: int = 8,
    query_heads: int = 32,
    channels: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Trace:
    """Draw a trace. Everything is drawn on the CPU, so that a seed means the same on every device.

    Raises: InputError: no such trace, or too few tokens for the needles.
    """
    if name not in TRACES:
        raise InputError(f"trace {name!r}: expected one of {', '.join(TRACES)}.")
    groups = query_heads // heads
    if tokens < 2 * NEEDLES * groups:
        raise InputError(f"trace {name!r} of {tokens} tokens: expected at least {2 * NEEDLES * groups}.")
    generator = torch.Generator().manual_seed(seed)
    keys = torch.empty(batch, heads, tokens, channels, dtype=dtype)
    values = torch.empty_like(keys)
    for row in range(batch):  # head by head: no float32 copy of the whole
        for head in range(heads):
            keys[row, head] = torch.randn(tokens, channels, generator=generator)
            common = torch.randn(channels, generator=generator)
            values[row, head] = torch.randn(tokens, channels, generator=generator) + common
    query = SMALL_QUERY * torch.randn(batch, heads, groups, channels, generator=generator)
    if name == "outliers":
        places = torch.randperm(channels, generator=generator)[:OUTLIERS]
        keys[..., places] *= OUTLIER_FACTOR
    if name == "concentrated":
        needle = torch.randn(batch, heads, groups, channels, generator=generator)
        needle *= math.sqrt(channels) / torch.linalg.vector_norm(needle, dim=-1, keepdim=True)
        places = torch.randperm(tokens, generator=generator)[: groups * NEEDLES].view(groups, NEEDLES)
        noise = NEEDLE_SPREAD * torch.randn(batch, heads, groups, NEEDLES, channels, generator=generator)
        keys[:, :, places] = (needle.unsqueeze(3) + noise).to(dtype)
        query = needle * needle_strength(tokens, channels)
    return Trace(
        name, keys.to(device), values.to(device), query.reshape(batch, query_heads, 1, channels).to(device, dtype), seed
    )


def needle_strength(tokens: int, channels: int) -> float:
    """How long a query must be, in units of its needle, for the needles to hold NEEDLE_SHARE of the weight.

    A needle scores a * sqrt(channels), the other tokens score normal(0, a^2), so that they weigh tokens * exp(a^2 / 2); the
    smaller root of a * sqrt(channels) - a^2 / 2 = log(tokens / NEEDLES) + log(share / (1 - share)). Where there is none, the
    length that comes closest.
    """
    wanted = math.log(tokens / NEEDLES) + math.log(NEEDLE_SHARE / (1 - NEEDLE_SHARE))
    return math.sqrt(channels) - math.sqrt(max(0.0, channels - 2 * wanted))


def statistics_of(trace: Trace) -> dict[str, Any]:
    """What the statistics are, measured on the trace; means over query heads and rows unless said.

    effective_tokens: exp(entropy) of the attention weights; top_share: weight of the 64 heaviest tokens; key_channel_ratio:
    largest over median standard deviation of a key channel (of all heads); value_mean_ratio: norm of the mean value over the
    root mean square distance from it.
    """
    batch, heads, tokens, channels = trace.keys.shape
    groups = trace.query.shape[1] // heads
    effective, top, ratios, means = [], [], [], []
    for row in range(batch):
        for head in range(heads):
            keys, values = trace.keys[row, head].float(), trace.values[row, head].float()
            query = trace.query[row, head * groups : (head + 1) * groups, 0].float()
            weights = torch.softmax(query @ keys.T / math.sqrt(channels), dim=-1)
            entropy = -(weights * weights.clamp_min(1e-30).log()).sum(dim=-1)
            effective += entropy.exp().tolist()
            top += weights.topk(min(TOP, tokens), dim=-1).values.sum(dim=-1).tolist()
            spread = keys.std(dim=0)
            ratios.append(float(spread.max() / spread.median()))
            mean = values.mean(dim=0)
            distance = torch.linalg.vector_norm(values - mean, dim=-1).square().mean().sqrt()
            means.append(float(torch.linalg.vector_norm(mean) / distance))
    return {
        "tokens": tokens,
        "effective_tokens": sum(effective) / len(effective),
        "top_share": sum(top) / len(top),
        "key_channel_ratio": max(ratios),
        "value_mean_ratio": sum(means) / len(means),
    }


def exact_attention(trace: Trace, keys: Tensor | None = None, values: Tensor | None = None) -> Tensor:
    """float64 attention of the trace's query over its originals (or those given): `[batch, query_heads, 1, channels]`."""
    keys, values = trace.keys if keys is None else keys, trace.values if values is None else values
    batch, heads, _, channels = keys.shape
    groups = trace.query.shape[1] // heads
    out = torch.empty(batch, heads * groups, 1, values.shape[-1], dtype=torch.float64, device=keys.device)
    for row in range(batch):
        for head in range(heads):  # one head at a time: a float64 copy of all of them is four times the cache
            part = slice(head * groups, (head + 1) * groups)
            scores = trace.query[row, part, 0].double() @ keys[row, head].double().T / math.sqrt(channels)
            out[row, part, 0] = torch.softmax(scores, dim=-1) @ values[row, head].double()
    return out


def errors(output: Tensor, exact: Tensor) -> dict[str, float]:
    """Distance of an output from the exact one over the exact one's norm, by head: median and largest."""
    distance = torch.linalg.vector_norm(output.double() - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
    return {"median": float(distance.median()), "max": float(distance.max())}
