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


def above(case: Case, **changes: Any) -> Case:
    """The same with other settings."""
    return replace(case, settings={**case.settings, **changes})


def long_dot(size: float = 1024.0, lean: float = 0.0) -> Case:
    """A block whose scores are one large product and many, each half a unit in its last place: a chain loses all of them.

    Args: size: of the scores, a power of two; lean: how far the block's scores are read too high besides.
    """
    channels, tokens = 1024, 17
    keys, kept = spread_keys(torch.zeros(tokens, dtype=torch.bool), tokens, channels)
    small = torch.full((channels,), 2.0**-12)
    small[0], small[-1] = 1.0, 0.0
    keys[..., :-1] = small[:-1]
    keys[:, :, -1] = 0.0
    keys[:, :, -1, 0] = 1 + (channels - 2) * 2.0**-24  # the same score in one product
    q = small.clone()
    q[-1] = lean / size / (LOW_ERROR * SPAN / 256)
    values = torch.ones(1, 2, tokens, 16)
    values[:, :, -1] = -1.0
    bias = torch.zeros(tokens)
    bias[-1] = math.log(15)
    bias = torch.where(kept, bias, -torch.inf).view(1, 1, 1, tokens)
    return Case(q.expand(1, 4, 1, channels).contiguous(), keys, values, bias, scale=size, settings={"atol": 1e6})


def negative_scale() -> Case:
    """A softmax scale below zero."""
    case = shifted_scores(0.1, 0.01)
    return replace(case, query=-case.query, scale=-1.0)


def mixed_signs() -> Case:
    """Query channels of both signs, keys to match: residuals add up although the query's channels do not."""
    case = shifted_scores(0.1, 0.01)
    sign = torch.tensor([1.0, -1.0]).repeat(4)
    keys = case.keys.clone()
    keys[..., 1::2] = -keys[..., 1::2]
    return replace(case, query=case.query * sign, keys=keys)


def unlike_blocks() -> Case:
    """A block of constant keys before one whose scores are read too low: their numbers have nothing in common."""
    case = shifted_scores(0.1, 0.01)
    keys, values = (torch.cat([torch.zeros_like(part[:, :, :16]), part], dim=2) for part in (case.keys, case.values))
    assert case.mask is not None
    mask = torch.cat([torch.full_like(case.mask[..., :16], -20.0), case.mask], dim=-1)
    return replace(case, keys=keys, values=values, mask=mask)


def light_block() -> Case:
    """A block that is read as weighing e^-120 and weighs nearly everything: float32 cannot hold what it is read as."""
    return shifted_scores(150.0, 15 * math.exp(30.0))


def heavy_tail() -> Case:
    """A block of small values that is read as weighing nothing and weighs everything, beside an exact token of large value."""
    case = shifted_scores(40.0, 15 * math.exp(20.0))
    values = case.values.clone()
    values[:, :, :-1] = -0.01
    return replace(case, values=values)


def beyond_grid() -> Case:
    """Nearly all weight is read off a block of values far beyond the grid: only their true norms say how much that moves."""
    return above(two_blocks(40.0, (1e9, 0.0), 20.0), atol=1e12)


def hidden_by_rounding() -> Case:
    """Outputs halfway between two subnormal float16 numbers, in every channel."""
    q, k = torch.zeros(1, 4, 1, 8, dtype=torch.float16), torch.zeros(1, 2, 82, 8, dtype=torch.float16)
    values = (2.0 + torch.arange(82) % 2) * 2.0**-24
    return Case(q, k, values.half().view(1, 1, 82, 1).expand(1, 2, 82, 16).clone(), settings={"atol": 1e6, "recent_window": 2})


def below_normal() -> Case:
    """Two exact tokens, one of the smallest float32 number and one of 0: the output has half of it, which no float32 holds."""
    values = torch.zeros(1, 2, 18, 16)
    values[:, :, 16] = 2.0**-149
    kept = torch.arange(18) >= 16
    return Case(
        torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 18, 8), values, kept.view(1, 1, 1, 18), settings={"recent_window": 2}
    )


def two_readers() -> Case:
    """Two query heads of one KV head: one attends a token with a large value residual, the other one without."""
    case = one_value()
    bias = torch.zeros(1, 4, 1, 81)
    bias[:, 0::2, :, 20] = 20.0
    bias[:, 1::2, :, 60] = 20.0
    return replace(case, mask=bias)


def padded() -> Case:
    """A batch of two rows, one of which begins with padding; the heads differ too."""
    q, k, v = tensors("normal", torch.float32, 90, 8, 8, 2, 1, 3)
    kept = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    kept[0, ..., :50] = False
    return Case(q, k, v, kept, settings={"rtol": 0.3})


def vanishing(**changes: Any) -> Case:
    """Values that cancel: the output is next to nothing, what is read of it is not."""
    case = equal_values(**{"atol": 0.0, "rtol": 0.5, **changes})
    v = case.values[:, :, :1] * (1 - 2.0 * (torch.arange(81) % 2)).view(1, 1, 81, 1)
    v[:, :, 80] = 0
    return replace(case, values=v)


def late_weight() -> Case:
    """One round for promotions: raised keys bring weight to a block whose values were not worth raising."""
    case = shifted_scores(8.0, 9.0, max_rounds=1, atol=0.0, rtol=0.01, value_bits=4, refine="off")
    values = case.values.clone()
    values[:, :, :16] += 0.5 * torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(3))
    return replace(case, values=values)


def capped_scores() -> Case:
    """Scores far beyond their softcap."""
    q, k, v = tensors("huge query", torch.float32, 90, 8, 8, 1, 1, 3)
    return Case(q, k, v, softcap=2.0, settings={"rtol": 0.5})


def to_the_plane(**changes: Any) -> Case:
    """Ordinary numbers and a tolerance that the refinement planes meet."""
    q, k, v = tensors("normal", torch.float32, 81, 8, 8, 1, 1, 3)
    return Case(q, k, v, settings={"rtol": 0.02, "refine": "device", **changes})


def half_sunk() -> Case:
    """Scores read too low, and a sink logit as heavy as the exact token."""
    return replace(shifted_scores(0.1, 0.01), sinks=torch.zeros(4))


def far_centre() -> Case:
    """A heavy block of values far beyond the grid, and a light one of small values whose scores are read too low."""
    case = unlike_blocks()
    assert case.mask is not None
    mask, values = case.mask.clone(), torch.full_like(case.values, 1e30)
    mask[..., :16], mask[..., -1] = 0.0, -60.0
    values[:, :, 16:] = -1e3
    return above(replace(case, mask=mask, values=values), atol=1e36)


def sums_overflow() -> Case:
    """Values near the largest float32 number, one channel each: the sums of promoted blocks overflow."""
    v = torch.full((1, 2, 81, 1), 3.3e38)
    return Case(torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 81, 8), v, settings={"rtol": 1.0, "refine": "off"})


def moment_overflows() -> Case:
    """Values at the output's scale overflow the product of output and block: what is left of the moment is minus infinity."""
    channels = 8
    keys = torch.full((1, 1, 17, channels), -4 + 8 / 255 * 130.75)
    keys[:, :, 0], keys[:, :, 16] = -4.0, 1.9
    for channel in range(channels):
        keys[:, :, 1 + channel, channel] = 4.0
    values = torch.full((1, 1, 17, channels), 32768.0)
    values[:, :, 16] = 1e34
    return Case(torch.ones(1, 1, 1, channels), keys, values)


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
    "scale below zero": (negative_scale(), 0.9),
    "mixed signs": (mixed_signs(), 0.9),
    "unlike blocks": (unlike_blocks(), 0.9),
    "light block": (light_block(), 0.9),
    "half sunk": (half_sunk(), 0.85),
    "beyond the grid": (beyond_grid(), 0.3),
    "halfway between subnormal outputs": (hidden_by_rounding(), 0.99),
    "two readers": (two_readers(), 0.99),
}
