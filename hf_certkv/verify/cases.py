"""Decode calls over given originals, run through the public path and compared with the exact oracle, without slack."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from ..attention import AttentionCall, attend
from ..cache import CertifiedQuantizedCache
from ..certificate import StepRecord
from ..config import CertKVConfig
from ..ladder import Rung
from .oracle import Problem, at_most, decided, exact_errors, exact_norm, first_bits, flint, norm, precise, upper

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

    def to(self, device: torch.device) -> Case:
        """The same on a device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)


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


@dataclass(frozen=True)
class Verdict:
    """What the oracle says of one call. Head-steps are outputs of one query head at one position.

    Attributes: breaches: every breach of the promise, in words; share: the largest error / bound, rounded up; where: its
        batch row, query head and position; head_steps: outputs that were compared; shares: error / bound of each, `[batch,
        query_heads, positions]`, 0 where nothing is promised.
    """

    breaches: list[str]
    share: float
    where: tuple[int, int, int] | None
    head_steps: int
    shares: np.ndarray


def problems(case: Case) -> Iterator[tuple[list[tuple[int, int, int]], Problem]]:
    """The call as problems that share keys and values, with the place of every row in the output."""
    query, groups = case.query, case.query.shape[1] // case.keys.shape[1]
    scale = query.shape[-1] ** -0.5 if case.scale is None else case.scale
    mask = case.mask
    if mask is not None:
        mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        mask = mask.double()[(None,) * (4 - mask.dim())].expand(*query.shape[:3], -1)
    sinks = None if case.sinks is None else case.sinks.double().tolist()
    for b in range(query.shape[0]):
        for head in range(case.keys.shape[1]):
            mine = slice(head * groups, (head + 1) * groups)
            places = [(b, head * groups + i, p) for i in range(groups) for p in range(query.shape[2])]
            bias = None if mask is None else mask[b, mine].flatten(0, 1)
            logits = None if sinks is None else [sinks[h] for _, h, _ in places]
            rows = query[b, mine].flatten(0, 1)
            yield places, Problem(rows, case.keys[b, head], case.values[b, head], scale, bias, case.softcap, logits)


def judge(case: Case, output: Tensor, record: StepRecord, config: CertKVConfig) -> Verdict:
    """Every output of a call against the exact one, and every bound against the tolerance. No slack anywhere."""
    case, output = case.to(torch.device("cpu")), output.cpu()
    breaches: list[str] = []
    figures = np.zeros(output.shape[:3])
    for places, problem in problems(case):
        rows = torch.stack([output[place] for place in places])
        bounds = [float(record.bound[place]) for place in places]
        held, shares = compare(problem, rows, bounds)
        finite = torch.isfinite(rows).all(dim=-1).tolist()
        for i, (place, bound) in enumerate(zip(places, bounds, strict=True)):
            rung = Rung(int(record.rung[place]))
            figures[place] = shares[i]
            if math.isfinite(bound):
                if not (held[i] and finite[i]):
                    breaches.append(f"{place} {rung.name}: the error is {shares[i]:.9g} of the bound {bound!r}")
            elif rung not in DENSE and config.certified and attends(problem, i):
                breaches.append(f"{place} {rung.name}: bound {bound}")
    share, where = float(figures.max()), None
    if share > 0:
        at = np.unravel_index(int(figures.argmax()), figures.shape)
        where = (int(at[0]), int(at[1]), int(at[2]))
    return Verdict(breaches + over_budget(output, record, config), share, where, figures.size, figures)


def compare(problem: Problem, outputs: Tensor, bounds: list[float]) -> tuple[list[bool], list[float]]:
    """Whether each row's error is within its bound, where that is finite, and error / bound, rounded up."""
    shares = [0.0] * len(bounds)

    def question() -> list[bool | None]:
        answers: list[bool | None] = []
        for i, error in enumerate(exact_errors(problem, outputs.double().nan_to_num())):
            if error is None or not math.isfinite(bounds[i]):
                answers.append(True)
                continue
            bound = flint.arb(bounds[i])
            answers.append(at_most(error, bound))
            if bounds[i] > 0:
                shares[i] = upper(error / bound)
                answers[-1] = answers[-1] if precise(error, bound) else None
        return answers

    return decided(question, first_bits(problem)), shares


def attends(problem: Problem, row: int) -> bool:
    """Whether a row attends anything."""
    return problem.sinks is not None or problem.bias is None or bool((problem.bias[row] > -torch.inf).any())


def over_budget(output: Tensor, record: StepRecord, config: CertKVConfig) -> list[str]:
    """Certified outputs whose bound is above the tolerance: by head, or together where heads share a budget."""
    if not config.certified:
        return []
    everyone = list(range(output.shape[1]))
    shared: list[tuple[int, int, list[int], list[int]]] = []
    for b in range(output.shape[0]):
        for p in range(output.shape[2]):
            served = [h for h in everyone if int(record.rung[b, h, p]) not in DENSE]
            groups = [(served, everyone)] if config.scope == "layer" else [([h], [h]) for h in served]
            # Bounds that are not finite are named by `judge`.
            shared += [(b, p, *group) for group in groups if np.isfinite(record.bound[b, group[0], p]).all()]
    outputs = output.double()

    def fit() -> list[bool | None]:
        answers: list[bool | None] = []
        atol, rtol = flint.arb(config.atol), flint.arb(config.rtol)
        for b, p, heads, sharing in shared:
            if not bool(torch.isfinite(outputs[b, sharing, p]).all()):  # a tolerance that is not a number admits nothing
                answers.append(not heads)
                continue
            together = norm([flint.arb(float(record.bound[b, h, p])) for h in heads])
            answers.append(at_most(together, atol + rtol * exact_norm(outputs[b, sharing, p])))
        return answers

    return [
        f"batch row {b}, heads {heads}, position {p}: bounds {record.bound[b, heads, p].tolist()} are above the tolerance"
        for fits, (b, p, heads, _) in zip(decided(fit), shared, strict=True)
        if not fits
    ]


def examine(case: Case) -> Verdict:
    """Run a case and judge it."""
    output, record, cache = run(case)
    return judge(case, output, record, cache.settings)


def assert_sound(case: Case) -> tuple[float, StepRecord]:
    """Run, compare with the oracle; the largest error / bound, and the record."""
    output, record, cache = run(case)
    verdict = judge(case, output, record, cache.settings)
    assert not verdict.breaches, verdict.breaches[:4]
    return verdict.share, record


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
    "drifting",
    "lined values",
    "lined keys",
)
BEYOND = ("far below zero", "far above zero", "one channel far below zero")  # of what the 16-bit offsets hold
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite numbers of a dtype from random bits."""
    info = torch.iinfo(BITS[dtype])
    x = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(BITS[dtype]).view(dtype)
    return torch.where(torch.isfinite(x), x, torch.ones((), dtype=dtype))


def tensors(
    regime: str,
    dtype: torch.dtype,
    tokens: int,
    channels: int,
    width: int,
    batch: int,
    positions: int,
    seed: int,
    heads: int = 2,
    groups: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query `[batch, heads * groups, positions, channels]`, keys and values `[batch, heads, tokens, ...]` of a regime."""
    g = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max
    q = torch.randn(batch, heads * groups, positions, channels, generator=g)
    k = torch.randn(batch, heads, tokens, channels, generator=g)
    v = torch.randn(batch, heads, tokens, width, generator=g)
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
        k[:, :, tokens // 3] = 6 * q[:, ::groups, 0]
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
    elif regime == "drifting":  # as rotary embeddings make keys: channels of unlike size and offset, slow waves along tokens
        wave = torch.arange(tokens)[:, None] * torch.logspace(0, -3, channels)
        k = 0.3 * k + 4 * torch.randn(1, heads, 1, channels, generator=g) * torch.cos(wave)
        v = v * torch.logspace(0, -1.5, width)
    elif regime == "lined values":  # all residuals of values alike, all weights alike: the triangle inequality is attained
        q, v = 0 * q, v[:, :, :1].expand_as(v).clone()
    elif regime == "lined keys":  # tokens at either end of every channel's range, queries that add up their residuals
        top = torch.rand(batch, heads, tokens, 1, generator=g) < 0.5
        k = torch.where(top, 2.56, 0.0).expand_as(k).contiguous()
        q = (0.02 + 0.3 * torch.rand(q[..., :1].shape, generator=g)).expand_as(q).contiguous()
        v = torch.where(top, v[:, :, :1], -v[:, :, :1])
    elif regime in ("far below zero", "far above zero"):
        sign = -1 if regime == "far below zero" else 1
        k, q = sign * (70000 + 3000 * torch.rand(k.shape, generator=g)), q * 1e-3
    elif regime == "one channel far below zero":
        k[..., 0] = -70000 - 3000 * torch.rand(k.shape[:-1], generator=g)
        q = q * 1e-2
    return q.to(dtype), k.to(dtype), v.to(dtype)


MASKS = ("none", "bool", "inf", "finfo.min", "-1e9", "alibi", "rows", "heads", "causal", "padding", "window", "one row")


def mask_of(
    kind: str, dtype: torch.dtype, batch: int, positions: int, tokens: int, seed: int, query_heads: int = 4
) -> Tensor | None:
    """A mask that hides some tokens, never all; "one row" hides all of them from a single batch row."""
    if kind == "none":
        return None
    g = torch.Generator().manual_seed(seed + 77)
    place = torch.arange(tokens)
    last = tokens - positions + torch.arange(positions).unsqueeze(-1)  # what each new token may see at most
    if kind == "causal":
        return place <= last
    if kind == "window":
        return ((place <= last) & (place > last - max(2, tokens // 3)))[None, None]
    if kind == "padding":
        start = torch.randint(0, tokens, (batch,), generator=g)
        return (place >= start.clamp(max=tokens - positions).view(-1, 1, 1, 1)).expand(batch, 1, positions, tokens)
    shape = {
        "rows": (positions, tokens),
        "heads": (batch, query_heads, positions, tokens),
        "alibi": (1, query_heads, 1, tokens),
    }.get(kind, (batch, 1, positions, tokens))
    kept = torch.rand(shape, generator=g) < 0.6
    kept[..., -1] = True
    kept[..., : tokens // 4] &= bool(seed % 2)
    if kind == "one row":
        kept[seed % batch] = False
    if kind in ("bool", "rows", "one row"):
        return kept
    if kind == "alibi":
        slope = torch.tensor([0.5, 0.1, 0.02, 2.0])[torch.arange(query_heads) % 4].view(1, -1, 1, 1)
        return (slope * torch.arange(1 - tokens, 1).float()).to(dtype).expand(shape)
    low = {"inf": -math.inf, "finfo.min": torch.finfo(dtype).min, "-1e9": -1e9, "heads": -math.inf}[kind]
    if kind == "-1e9" and dtype == torch.float16:
        dtype = torch.float32
    added = torch.randn(shape, generator=g) if kind == "heads" else torch.zeros(shape)
    return torch.where(kept, added, torch.tensor(low)).to(dtype)
