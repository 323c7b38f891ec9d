"""Constructed cases in which a bound is nearly attained: what planted bugs break."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..codecs import ValueCodec
from .cases import Case, tensors


def equal_values(dtype: torch.dtype = torch.float32, size: float = 1.0, **changes: Any) -> Case:
    """Exact keys, equal weights, equal values: the triangle entry of the value error is attained."""
    torch.manual_seed(5)
    v = (torch.randn(1, 2, 1, 16) * size).expand(1, 2, 81, 16).clone()
    v[:, :, 80] = 0
    return Case(
        torch.zeros(1, 4, 1, 8, dtype=dtype),
        torch.zeros(1, 2, 81, 8, dtype=dtype),
        v.to(dtype),
        settings={"atol": 1e6, "recent_window": 1, **changes},
    )


def one_value(**changes: Any) -> Case:
    """Exact keys, nearly all weight on the only token with a value residual."""
    torch.manual_seed(6)
    v = torch.zeros(1, 2, 81, 16)
    v[:, :, 20] = torch.randn(1, 2, 16) * 10
    bias = torch.zeros(1, 1, 1, 81)
    bias[..., 20] = 20.0
    return Case(torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 81, 8), v, bias, settings={"atol": 1e6, **changes})


def offset_values() -> Case:
    """Values in a narrow band around 300.1: the rounding of their stored offset is far larger than a step."""
    torch.manual_seed(7)
    v = 300.1 + 0.01 * torch.rand(1, 2, 81, 16)
    return Case(torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 81, 8), v, settings={"atol": 1e6})


def exact_everything(dtype: torch.dtype = torch.float32) -> Case:
    """Nothing is lost by quantisation: only rounding is left. Values are constant over the channels of a token."""
    torch.manual_seed(8)
    v = torch.randint(-90, 90, (1, 2, 97, 1)).expand(1, 2, 97, 16).to(dtype)
    return Case(torch.zeros(1, 4, 1, 8, dtype=dtype), torch.zeros(1, 2, 97, 8, dtype=dtype), v.clone(), settings={"atol": 1e6})


SPAN = 2.56  # of every key channel
STEP_ERROR = 0.5  # of the stored step: how far a key at the top of its range is read too low
LOW_ERROR = 7.5 / 16  # and how far one at the bottom is read too high


def spread_keys(top: Tensor, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Keys at the top or the bottom of their range, one token of each block masked to make the range; and the mask."""
    keys = torch.where(top.view(1, 1, tokens, 1), SPAN, 0.0).expand(1, 2, tokens, channels).clone()
    kept = torch.ones(tokens, dtype=torch.bool)
    for start in range(0, tokens - 1, 16):
        keys[:, :, start] = 0.0 if bool(top[start + 1]) else SPAN
        kept[start] = False
    keys[:, :, tokens - 1] = 0.0
    return keys, kept


def shifted_scores(shift: float, share: float, centre: float = 0.0, **changes: Any) -> Case:
    """One block whose scores are all read too low by `shift`, with values opposite to the exact token's, seen from `centre`."""
    channels, tokens = 8, 17
    keys, kept = spread_keys(torch.ones(tokens, dtype=torch.bool), tokens, channels)
    size = shift / (STEP_ERROR * channels * SPAN / 256)
    q = torch.full((1, 4, 1, channels), size)
    values = torch.full((1, 2, tokens, 16), centre - 1.0)
    values[:, :, -1] = centre + 1.0
    bias = torch.full((tokens,), -size * SPAN * channels + math.log(share / 15))
    bias[-1] = 0.0
    bias = torch.where(kept, bias, -torch.inf).view(1, 1, 1, tokens)
    return Case(q, keys, values, bias, scale=1.0, settings={"atol": 1e6, "value_bits": 8, **changes})


def read_at_the_output(shift: float, share: float) -> Case:
    """As `shifted_scores`, but the block's values are read as the exact token's: only residuals keep them apart."""
    case = shifted_scores(shift, share, value_bits=4)
    torch.manual_seed(10)
    values = torch.randn(1, 2, 1, 16).repeat(1, 1, 17, 1)
    codec = ValueCodec(4, 0, refine=False)
    coded = codec.encode(values[:, :, :16])
    values[:, :, 16] = codec.decode(coded.codes, None, coded.scale, coded.offset, 16)[:, :, 0]
    return replace(case, values=values)


def two_blocks(shift: float, value: tuple[float, float], lead: float) -> Case:
    """One block read too low by `shift` and one read too high: weights move between them. `lead`: of true scores."""
    channels, tokens = 8, 33
    top = torch.arange(tokens) < 16
    keys, kept = spread_keys(top, tokens, channels)
    size = shift / (STEP_ERROR * channels * SPAN / 256)
    q = torch.full((1, 4, 1, channels), size)
    values = torch.where(top.view(1, 1, tokens, 1), *value).expand(1, 2, tokens, 16).clone()
    values[:, :, -1] = 0.0
    bias = torch.where(top, lead - size * SPAN * channels, 0.0)
    bias[-1] = -60.0
    bias = torch.where(kept, bias, -torch.inf).view(1, 1, 1, tokens)
    return Case(q, keys, values, bias, scale=1.0, settings={"atol": 1e6, "value_bits": 8})


def clamped_keys() -> Case:
    """Channels span far more than 256 of the largest float16 steps: residuals are far above half a step."""
    q, k, v = tensors("normal", torch.float32, 81, 8, 16, 1, 1, 9)
    return Case(3e-8 * q, 3e8 * k, v, scale=0.2, settings={"atol": 1e6})


def unlike_heads() -> Case:
    """Values of one KV head are a hundred times those of the other."""
    case = equal_values()
    v = case.values.clone()
    v[:, 1] *= 100
    return replace(case, values=v)


def with_sink() -> Case:
    """A sink logit that takes most of the weight."""
    case = exact_everything()
    return replace(case, sinks=torch.tensor([5.0, 6.0, 4.0, 5.0]))


TIGHT: dict[str, tuple[Case, float]] = {
    "equal values": (equal_values(), 0.99),
    "equal values, 8 bits": (equal_values(value_bits=8), 0.9),
    "one value": (one_value(), 0.99),
    "shifted scores": (shifted_scores(0.1, 0.01), 0.85),
    "shifted scores, large": (shifted_scores(1.0, 0.001), 0.65),
    "shifted scores, far from zero": (shifted_scores(0.1, 0.01, centre=4.0), 0.85),
    "read at the output": (read_at_the_output(1.0, 0.05), 0.7),
    "two blocks": (two_blocks(2.5, (1.0, 0.0), -3.5), 0.1),
    "flipped": (two_blocks(40.0, (1.0, -1.0), 20.0), 0.99),
    "clamped keys": (clamped_keys(), 0.0),
    "exact": (exact_everything(), 0.0),
}
