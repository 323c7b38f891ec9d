"""Decode calls over given originals, run through the public path and compared with the exact oracle, without slack."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import mpmath
import torch
import torch.nn.functional as F
from mpmath import mpf
from oracle import exact_error, exact_norm
from torch import Tensor
from transformers import LlamaConfig

from hf_certkv import CertifiedQuantizedCache
from hf_certkv.attention import AttentionCall, attend
from hf_certkv.certificate import StepRecord
from hf_certkv.ladder import Rung

DENSE = (Rung.DENSE_HEAD, Rung.DENSE_LAYER)
BASE: dict[str, Any] = {
    "exact_below": 0,
    "sink_blocks": 0,
    "recent_window": 0,
    "block_size": 16,
    "record": "full",
    "rtol": 0.1,
    "dense_head_share": 1.0,
    "dense_layer_share": 1.0,
}


@dataclass(frozen=True)
class Case:
    """One decode call over given originals; what the oracle needs as well."""

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def new_cache(case: Case) -> CertifiedQuantizedCache:
    """A cache of one layer with the case's settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=1), **{**BASE, **case.settings})


def fill(cache: CertifiedQuantizedCache, case: Case) -> tuple[Tensor, Tensor]:
    """Prefill and one step of as many tokens as there are queries."""
    new = case.query.shape[2]
    cache.update(case.keys[:, :, :-new], case.values[:, :, :-new], 0)
    return cache.update(case.keys[:, :, -new:], case.values[:, :, -new:], 0)


def call_on(case: Case, keys: Tensor, values: Tensor) -> Tensor:
    """Attention through the public path: `scaled_dot_product_attention`, or `attend` for what that cannot carry."""
    if case.softcap is None and case.sinks is None:
        return F.scaled_dot_product_attention(case.query, keys, values, case.mask, scale=case.scale, enable_gqa=True)
    call = AttentionCall(
        case.query, keys, values, case.mask, scale=case.scale, enable_gqa=True, softcap=case.softcap, sinks=case.sinks
    )
    return attend(call)


def run(case: Case) -> tuple[Tensor, StepRecord, CertifiedQuantizedCache]:
    """The output, its record, and the cache."""
    cache = new_cache(case)
    keys, values = fill(cache, case)
    output = call_on(case, keys, values)
    cache.recorder.commit()
    return output, cache.recorder.records[-1], cache


def row_of_mask(mask: Tensor | None, batch: int, head: int, position: int) -> Tensor | None:
    """The additive bias of one output; -inf where a boolean mask hides."""
    if mask is None:
        return None
    full = mask[(None,) * (4 - mask.dim())]
    row = full[batch % full.shape[0], head % full.shape[1], position % full.shape[2]]
    return torch.where(row, 0.0, -torch.inf) if row.dtype == torch.bool else row


def errors(case: Case, output: Tensor) -> dict[tuple[int, int, int], mpf | None]:
    """The exact error of every output; None where nothing is attended."""
    query, groups = case.query, case.query.shape[1] // case.keys.shape[1]
    scale = query.shape[-1] ** -0.5 if case.scale is None else case.scale
    out: dict[tuple[int, int, int], mpf | None] = {}
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for p in range(query.shape[2]):
                bias = row_of_mask(case.mask, b, h, p)
                sink = float(case.sinks[h].float()) if case.sinks is not None else None
                given_q, keys, values = query[b, h, p], case.keys[b, h // groups], case.values[b, h // groups]
                if bias is not None and sink is None and not bool((bias > -torch.inf).any()):
                    out[b, h, p] = None
                elif not bool(torch.isfinite(output[b, h, p]).all()):
                    out[b, h, p] = mpf("inf")
                else:
                    out[b, h, p] = exact_error(output[b, h, p], given_q, keys, values, scale, bias, case.softcap, sink)
    return out


def violations(case: Case, output: Tensor, record: StepRecord, cache: CertifiedQuantizedCache) -> tuple[list[str], float]:
    """Every breach of the promise, and the largest share of a bound that an error reaches. No tolerance anywhere."""
    found, share = [], 0.0
    config = cache.settings
    norms: dict[tuple[int, int], list[tuple[mpf, float, bool]]] = {}
    for place, error in errors(case, output).items():
        bound, rung = float(record.bound[place]), Rung(int(record.rung[place]))
        if error is None:
            continue
        norm = exact_norm(output[place]) if error != mpf("inf") else mpf("inf")
        norms.setdefault((place[0], place[2]), []).append((norm, bound, rung in DENSE))
        if math.isfinite(bound):
            if not error <= mpf(bound):
                found.append(f"{place} {rung.name}: error {mpmath.nstr(error, 12)} above the bound {bound!r}")
            share = max(share, float(error / mpf(bound)) if bound > 0 else (math.inf if error else 0.0))
        elif rung not in DENSE and config.certified:
            found.append(f"{place} {rung.name}: bound {bound}")
        if rung not in DENSE and config.certified and config.scope == "head":
            budget = mpf(config.atol) + mpf(config.rtol) * norm
            if not mpf(bound) <= budget:
                found.append(f"{place} {rung.name}: bound {bound!r} above the budget {mpmath.nstr(budget, 12)}")
    if config.certified and config.scope == "layer":
        for place, heads in norms.items():
            if any(dense for _, _, dense in heads):
                continue
            together = mpmath.sqrt(mpmath.fsum(mpf(bound) ** 2 for _, bound, _ in heads))
            budget = mpf(config.atol) + mpf(config.rtol) * mpmath.sqrt(mpmath.fsum(norm**2 for norm, _, _ in heads))
            if not together <= budget:
                found.append(f"{place}: together {mpmath.nstr(together, 12)} above {mpmath.nstr(budget, 12)}")
    return found, share


def assert_sound(case: Case) -> tuple[float, StepRecord]:
    """Run, compare with the oracle; the largest error / bound, and the record."""
    output, record, cache = run(case)
    found, share = violations(case, output, record, cache)
    assert not found, found[:4]
    return share, record


REGIMES = (
    "normal",
    "raw",
    "subnormal",
    "large",
    "equal",
    "one-hot",
    "outlier",
    "duplicates",
    "constant",
    "tiny query",
    "huge query",
    "wild values",
    "moderate bits",
)
BEYOND = ("far below zero", "far above zero", "one channel far below zero")  # of what the 16-bit offsets hold
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite numbers of a dtype from random bits."""
    info = torch.iinfo(BITS[dtype])
    x = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(BITS[dtype]).view(dtype)
    return torch.where(torch.isfinite(x), x, torch.ones((), dtype=dtype))


def tensors(
    regime: str, dtype: torch.dtype, tokens: int, channels: int, width: int, batch: int, positions: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query `[batch, 4, positions, channels]`, keys and values `[batch, 2, tokens, ...]` of a regime."""
    g = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max
    q = torch.randn(batch, 4, positions, channels, generator=g)
    k = torch.randn(batch, 2, tokens, channels, generator=g)
    v = torch.randn(batch, 2, tokens, width, generator=g)
    if regime == "raw":
        return tuple(bits(part.shape, dtype, g) for part in (q, k, v))  # type: ignore[return-value]
    if regime == "subnormal":
        small = torch.finfo(dtype).smallest_normal
        return (q * 4).to(dtype), (k.double() * small / 4).to(dtype), (v.double() * small / 4).to(dtype)
    if regime == "large":
        size = min(largest / 64, 2.0**60)
        return (q / size).to(dtype), (k * size).to(dtype), (v * min(largest / 8, 1e4)).to(dtype)
    if regime == "equal":
        k[:] = k[:, :, :1]
    elif regime == "one-hot":
        k[:, :, tokens // 3] = 6 * q[:, ::2, 0]
        v[:, :, : tokens // 4] *= 30
    elif regime == "outlier":
        k[..., 0] = 30 * k[..., 0] + 100
        v[..., 1] *= 50
    elif regime == "duplicates":
        k[:, :, 1::2], v[:, :, 1::2] = k[:, :, 0:1], v[:, :, 0:1]
    elif regime == "constant":
        k, v = torch.full_like(k, 1 / 3), torch.full_like(v, 0.7)
    elif regime == "tiny query":
        q = q * 1e-6
    elif regime == "huge query":
        q = q * 60
    elif regime == "wild values":
        v = v * 10.0 ** (3 * torch.rand(v.shape, generator=g) - 2)
    elif regime == "moderate bits":
        q, k, v = (bits(part.shape, dtype, g).double().clamp(-6, 6) for part in (q, k, v))
    elif regime in ("far below zero", "far above zero"):
        sign = -1 if regime == "far below zero" else 1
        k, q = sign * (70000 + 3000 * torch.rand(k.shape, generator=g)), q * 1e-3
    elif regime == "one channel far below zero":
        k[..., 0] = -70000 - 3000 * torch.rand(k.shape[:-1], generator=g)
        q = q * 1e-2
    return q.to(dtype), k.to(dtype), v.to(dtype)


MASKS = ("none", "bool", "inf", "finfo.min", "-1e9", "alibi", "rows", "heads")


def mask_of(kind: str, dtype: torch.dtype, batch: int, positions: int, tokens: int, seed: int) -> Tensor | None:
    """A mask that hides some tokens, never all."""
    if kind == "none":
        return None
    g = torch.Generator().manual_seed(seed + 77)
    shape = {"rows": (positions, tokens), "heads": (batch, 4, positions, tokens), "alibi": (1, 4, 1, tokens)}.get(
        kind, (batch, 1, positions, tokens)
    )
    kept = torch.rand(shape, generator=g) < 0.6
    kept[..., -1] = True
    kept[..., : tokens // 4] &= bool(seed % 2)
    if kind in ("bool", "rows"):
        return kept
    if kind == "alibi":
        slope = torch.tensor([0.5, 0.1, 0.02, 2.0]).view(1, 4, 1, 1)
        return (slope * torch.arange(1 - tokens, 1).float()).to(dtype).expand(shape)
    low = {"inf": -math.inf, "finfo.min": torch.finfo(dtype).min, "-1e9": -1e9, "heads": -math.inf}[kind]
    if kind == "-1e9" and dtype == torch.float16:
        dtype = torch.float32
    added = torch.randn(shape, generator=g) if kind == "heads" else torch.zeros(shape)
    return torch.where(kept, added, torch.tensor(low)).to(dtype)
