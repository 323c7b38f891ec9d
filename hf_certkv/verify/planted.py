"""Planted worst cases: calls built so that one part of the bound is attained in real arithmetic, or nearly so.

Each is what the search climbs from (search.py). The trick of most: a number far outside what float16 offsets and steps can hold
is read almost as if it were 0, so a residual is as large as the original, and rounding is small beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case

FAR = 2.0**60  # far outside what the codes can hold, and well inside float32 and bfloat16
FAST = {"atol": 1e100, "rtol": 0.0}  # nothing is promoted


def shaped(values: Tensor, heads: int = 1) -> Tensor:
    """`[tokens, channels]` as `[1, heads, tokens, channels]`."""
    return values.expand(1, heads, *values.shape).clone()


def one_head(
    query: list[float],
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
    **rest: Any,
) -> Case:
    """One query head at one position. Args: keys, values: `[tokens, channels]`; bias: `[tokens]`, kept in float32."""
    return Case(
        torch.tensor(query, dtype=torch.float64).view(1, 1, 1, -1).to(dtype),
        shaped(keys).to(dtype),
        shaped(values).to(dtype),
        None if bias is None else bias.view(1, 1, 1, -1).float(),
        scale=rest.pop("scale", 1.0),
        softcap=rest.pop("softcap", None),
        sinks=rest.pop("sinks", None),
        settings={**FAST, **rest},
    )


def hidden_tail(tokens: int) -> Tensor:
    """A bias that masks the last token, which is never quantised."""
    bias = torch.zeros(tokens)
    bias[-1] = -math.inf
    return bias


def value_triangle(width: int = 1, block: int = 16, dtype: torch.dtype = torch.float32) -> Case:
    """Equal weights, equal residuals as large as the values: E_val = eta   [section 4]."""
    keys, values = torch.zeros(block + 1, 1), torch.full((block + 1, width), FAR)
    return one_head([0.0], keys, values, hidden_tail(block + 1), dtype, block_size=block)


def negative_softcap(size: float) -> Case:
    """c * tanh(x / c) is even in c: the softcap's part of the score rounding counts its size   [section 5]."""
    case = value_triangle()
    return Case(case.query, case.keys, case.values, case.mask, 1.0, -size, None, case.settings)


def value_aligned(width: int = 2) -> Case:
    """Residuals in one direction and in proportion to unequal weights: E_val = pi * Sigma, below rho * eta   [section 4]."""
    bias = hidden_tail(17)
    bias[:16] = torch.linspace(-3, 0, 16)
    weights = torch.softmax(bias.double(), dim=0).unsqueeze(-1)
    return one_head([0.0], torch.zeros(17, 1), (weights * FAR).expand(-1, width), bias)


def value_cell(refine: str = "off", group: int = 0) -> Case:
    """Residuals of almost half a cell in every token and channel, all the same way; two channels span the range."""
    row = torch.tensor([0.0, 15.97, *[4.97] * 14])
    return one_head([0.0], torch.zeros(33, 1), row.expand(33, 16), hidden_tail(33), refine=refine, value_group=group)


def clusters(shift: float, softcap: float | None = None, dtype: torch.dtype = torch.float32) -> Case:
    """Logits in two clusters at +-shift that are read as one: total variation tanh(shift / 2)   [section 3, the cap]."""
    top = torch.arange(17) < 8
    far = 2.0**100  # what it is clamped to must be small beside it
    keys = torch.where(top, far, -far).unsqueeze(-1)
    values = torch.where(top, 1.0, -1.0).unsqueeze(-1)
    bias = torch.where(top, -shift, 0.0)
    bias[-1] = -math.inf
    return one_head([shift / far], keys, values, bias, dtype, softcap=softcap, value_bits=8)


def light_block(shift: float, share: float, width: int = 1) -> Case:
    """A block of little mass whose scores are all read too low, opposite the output: the sum of section 3."""
    tokens = 17
    keys = torch.full((tokens, 1), 2.0**100)
    values = torch.full((tokens, width), 1.0)
    keys[-1], values[-1] = 0.0, -1.0
    bias = torch.full((tokens,), math.log(share / 16))
    bias[-1] = 0.0
    return one_head([shift / 2.0**100], keys, values, bias, value_bits=8)


def aligned_scores(shift: float, share: float) -> Case:
    """As `light_block`, with score errors in proportion to the weights: pi * Lambda is below rho * Delta."""
    case = light_block(shift, share)
    lean = torch.linspace(-3, 0, 16)
    weights = torch.softmax(lean.double(), dim=0)
    assert case.mask is not None
    case.mask[..., :16] = (weights.log() + math.log(share)).float()
    case.keys[0, 0, :16, 0] *= (weights / weights.max()).float()
    return case


def output_tie(dtype: torch.dtype, width: int = 1) -> Case:
    """An output halfway between two numbers of the dtype, rounded to the even one below: E_out   [section 5]."""
    ulp = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    values = torch.where(torch.arange(17) % 2 == 0, 1.0, 1.0 + ulp).unsqueeze(-1).expand(-1, width)
    return one_head([0.0], torch.zeros(17, 1), values, hidden_tail(17), dtype, value_bits=8)


def value_and_output(dtype: torch.dtype) -> Case:
    """Value residuals and the rounding of the output point the same way."""
    base = torch.tensor([0.0, 3.97, 1.0, 1.0])
    return one_head([0.0], torch.zeros(17, 1), base.expand(17, 4) * 2, hidden_tail(17), dtype, refine="off")


def rounded_scores(size: float, softcap: float | None = None, scale: float = 1.0) -> Case:
    """Large scores of exact tokens, opposite values; the one block is masked, so only rounding is left   [section 5]."""
    place = torch.arange(33)
    top = place % 2 == 0
    keys = torch.where(top, 1.0, -1.0) * (1 + place / 97)
    query = torch.tensor(size / scale).item()
    capped = keys.double() * query * scale
    if softcap is not None:
        capped = softcap * torch.tanh(capped / softcap)
    bias = torch.where(place < 16, -math.inf, -capped.float())
    values = torch.where(top, 1.0, -1.0).unsqueeze(-1)
    rest: dict[str, Any] = {"scale": scale, "softcap": softcap, "recent_window": 17}
    return one_head([query], keys.unsqueeze(-1), values, bias, **rest)


def rounded_sums(block: int = 16) -> Case:
    """Exact tokens again: sums of numbers that float32 cannot add exactly, with weights that it cannot hold."""
    place = torch.arange(2 * block + 1)
    bias = torch.where(place < block, -math.inf, -0.01 * place)
    values = (1 + place / 97).unsqueeze(-1)
    return one_head([0.0], torch.zeros(2 * block + 1, 1), values, bias, block_size=block, recent_window=block + 1)


def aligned_sums(tokens: int) -> Case:
    """Exact tokens of equal weight whose running sum loses almost half a unit in the last place at every addition."""
    values, total = [], 0.0
    for _ in range(tokens):
        stage = math.frexp(total + 1.0)[1] - 1  # the sum after this addition lies in [2^stage, 2^(stage + 1))
        values.append(1.0 + max(0.0, 2.0 ** (stage - 1) - 1) * 2.0**-23)
        total = torch.tensor(total + values[-1], dtype=torch.float32).item()
    rows = torch.tensor([1.0] * 16 + values).unsqueeze(-1).expand(-1, 8)
    bias = torch.where(torch.arange(tokens + 16) < 16, -math.inf, 0.0)
    return one_head([0.0], torch.zeros(tokens + 16, 1), rows, bias, recent_window=tokens)


def common_offset() -> Case:
    """Keys and values with a huge common offset and a small spread: everything cancels."""
    g = torch.Generator().manual_seed(11)
    keys = 30000 + 0.01 * torch.rand(33, 4, generator=g)
    return one_head([1e-3, -1e-3, 1e-3, -1e-3], keys, 30000 + 0.01 * torch.rand(33, 4, generator=g), None)


def nearly_masked(beyond: float) -> Case:
    """A block whose bias is `beyond` the edge at which a token counts as masked, with enormous values   [section 3, masks]."""
    keys, values = torch.full((33, 1), 0.5), torch.ones(33, 1)
    values[:16] = FAR
    bias = torch.zeros(33)
    bias[:16] = -(2 * 0.5 * 0.5 + 800.0) - beyond
    return one_head([0.5], keys, values, bias)


def lifted_from_nothing(shift: float) -> Case:
    """A block that weighs exp(-shift) as read, and as much as all others in truth: the floor under masses   [section 3]."""
    keys, values = torch.full((17, 1), 2.0**100), torch.ones(17, 1)
    keys[-1], values[-1] = 0.0, -1.0
    bias = torch.full((17,), -shift)
    bias[-1] = 0.0
    return one_head([shift / 2.0**100], keys, values, bias, value_bits=8)


def huge_layer_budget() -> Case:
    """Scores so large that the bound is about 1e260, and a budget for the layer whose square overflows   [section 1]."""
    values = torch.linspace(0, 1, 68).view(17, 4)
    return one_head([7e8], torch.ones(17, 1), values, hidden_tail(17), scope="layer", atol=1e200)


def sink_near_the_top(logit: float) -> Case:
    """A sink logit beside scores of the same size, value residuals as large as the values   [section 1]."""
    case = value_triangle()
    sinks = torch.tensor([logit])
    return Case(case.query, case.keys, case.values, case.mask, 1.0, None, sinks, case.settings)


def tiny_scale(scale: float, dtype: torch.dtype = torch.float32) -> Case:
    """A softmax scale that float32 holds with few bits or not at all, and scores of ordinary size   [section 5, underflow]."""
    keys, values = torch.zeros(33, 1), torch.full((33, 1), -1.0)
    keys[-1], values[-1] = 1 / (scale * 2.0**126), 1.0
    return one_head([2.0**126], keys, values, None, dtype, scale=scale, value_bits=8, recent_window=1)


def subnormal_query(scale: float) -> Case:
    """A query below 2^-126, scaled up again by the softmax scale   [section 5, underflow]."""
    keys, values = torch.zeros(33, 1), torch.full((33, 1), -1.0)
    keys[-1], values[-1] = 1 / (scale * 2.0**-130), 1.0
    return one_head([2.0**-130], keys, values, None, scale=scale, value_bits=8, recent_window=1)


def dense_overflow() -> Case:
    """A product of query and key that overflows before the scale makes it small again, on the dense rung   [section 5]."""
    keys = torch.zeros(33, 4)
    keys[::2] = 2.0**64
    values = torch.where(torch.arange(33) % 2 == 0, 1.0, -1.0).unsqueeze(-1).expand(-1, 4)
    query = [-(2.0**64), 2.0**63, 2.0**63, 0.0]  # the first product is below the range, the sum is 0
    return one_head(query, keys, values, None, scale=2.0**-124, softcap=5.0, atol=0.0)


def dense_cast(dtype: torch.dtype, tokens: int = 65) -> Case:
    """The dense rung with weights that a 16-bit type rounds down, and an output that it rounds down again."""
    keys, values = torch.zeros(tokens, 4), torch.full((tokens, 4), 1.0)
    ulp = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    bias = torch.full((tokens,), math.log(0.5 * (1 + ulp / 2)))
    bias[-1] = 0.0
    values[: tokens // 2] = 1.0 + ulp
    return one_head([0.0] * 4, keys, values, bias, dtype, atol=0.0)


HALF, BRAIN = torch.float16, torch.bfloat16
PLANTED: dict[str, Callable[[], Case]] = {
    "value triangle": value_triangle,
    "value triangle, bfloat16, 7 channels": lambda: value_triangle(7, 16, BRAIN),
    "value triangle, block of 32": lambda: value_triangle(2, 32),
    "value residuals along the weights": value_aligned,
    "value residuals of half a cell": value_cell,
    "value residuals of half a cell, groups of 4": lambda: value_cell("host", 4),
    "clusters at +-2": lambda: clusters(2.0),
    "clusters at +-12": lambda: clusters(12.0),
    "clusters at +-0.1": lambda: clusters(0.1),
    "clusters at +-2, bfloat16": lambda: clusters(2.0, None, BRAIN),
    "clusters at +-2, softcap": lambda: clusters(2.0, 8.0),
    "light block": lambda: light_block(0.5, 3e-3),
    "light block, 3 channels": lambda: light_block(0.05, 2e-2, 3),
    "score errors along the weights": lambda: aligned_scores(0.05, 2e-2),
    "output tie, bfloat16": lambda: output_tie(BRAIN),
    "output tie, float16, 3 channels": lambda: output_tie(HALF, 3),
    "value and output, bfloat16": lambda: value_and_output(BRAIN),
    "value and output, float16": lambda: value_and_output(HALF),
    "rounded scores": lambda: rounded_scores(101.1),
    "rounded scores, scaled": lambda: rounded_scores(91.3, None, 1 / 3 + 1e-9),
    "rounded scores, softcap": lambda: rounded_scores(30.0, 1000.0),
    "rounded sums": rounded_sums,
    "rounded sums, block of 32": lambda: rounded_sums(32),
    "sums rounded the same way": lambda: aligned_sums(250),
    "common offset": common_offset,
    "inside the edge of the mask": lambda: nearly_masked(-1e-3),
    "beyond the edge of the mask": lambda: nearly_masked(1e-3),
    "lifted from nothing": lambda: lifted_from_nothing(720.0),
    "lifted from little": lambda: lifted_from_nothing(20.0),
    "value triangle, negative softcap": lambda: negative_softcap(1e5),
    "huge budget of a layer": huge_layer_budget,
    "sink near the top": lambda: sink_near_the_top(2.0),
    "scale that float32 calls 0": lambda: tiny_scale(6e-46),
    "scale that float32 holds with few bits": lambda: tiny_scale(1e-43),
    "subnormal query, large scale": lambda: subnormal_query(2.0**120),
    "dense: overflow before scaling": dense_overflow,
    "dense: weights and output rounded, bfloat16": lambda: dense_cast(BRAIN),
    "dense: weights and output rounded, float16": lambda: dense_cast(HALF),
}
