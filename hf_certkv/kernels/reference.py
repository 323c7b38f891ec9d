"""The decode pass in plain torch: the specification that every faster kernel is tested against. Pure.

Order of summation, which the rounding bound relies on (docs/certificate.md, section 5): a score is one chain over the
channels; weights are exponentials relative to their own segment's maximum; a segment's sums are one chain over its tokens;
segments are combined in one chain, with factors computed in float64. So no addend goes through more than
`chain_length(...)` additions, and each weight is rescaled once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import TINY, EncodedBlocks, KeyCodec, ValueCodec, token_steps

RESCALINGS = 1
CHUNK_NUMBERS = 2**21  # dequantised numbers held at a time: 8 MiB of scratch for keys, as much for values


@dataclass
class Segments:
    """Unnormalised softmax sums of each segment (a block, or the exact tokens), relative to the segment's own maximum.

    Attributes: float32; maximum, total, square: `[batch, kv_heads, rows, segments]` (largest score, sum of weights, sum of
    squared weights); output, square_output: `[batch, kv_heads, segments, rows, channels]`, values by weights and by squared
    weights, the latter None where a kernel does without; sums: `[batch, kv_heads, rows, segments, 4]`, of weight * step, of its
    square, and of the values' squared norms by weights and by squared weights. A segment that is masked throughout has
    maximum -inf and sums 0.
    """

    maximum: Tensor
    total: Tensor
    square: Tensor
    output: Tensor
    square_output: Tensor | None
    sums: Tensor


@dataclass
class Combined:
    """What the segments add up to.

    Attributes: output: float32 `[batch, kv_heads, rows, channels]`; mass, root_square_mass: float64
    `[batch, kv_heads, rows, segments]`, rho and pi of the certificate; sink_mass: float64 `[batch, kv_heads, rows]`, the
    weight of the sink logit; attended: bool, shaped as `mass`; step, moment: float64, a segment's means by weight of steps and
    of values' squared distances from the output; root_square_step, square_moment: by squared weight, the former a root mean
    square. All four are 0 for a segment that is masked throughout.
    """

    output: Tensor
    mass: Tensor
    root_square_mass: Tensor
    sink_mass: Tensor
    attended: Tensor
    step: Tensor
    root_square_step: Tensor
    moment: Tensor
    square_moment: Tensor


def chain_length(block: int, exact_tokens: int, segments: int) -> int:
    """Longest chain of float32 additions that an addend of the output goes through."""
    return max(block, exact_tokens) + segments


def attend(
    query: Tensor, keys: Tensor, values: Tensor, steps: Tensor | None, bias: Tensor | None, softcap: float | None
) -> Segments:
    """Sums of `segments` groups of tokens.

    Args:
        query: float32 `[batch, kv_heads, rows, channels]`, already multiplied by the softmax scale.
        keys, values: float32 `[batch, kv_heads, segments, tokens, channels]`.
        steps: float32 `[batch, kv_heads, segments, tokens]`, `codecs.token_steps` of quantised values; None for exact ones.
        bias: float32, added to the scores, `[batch | 1, kv_heads | 1, rows | 1, segments, tokens]`; -inf masks.
        softcap: c of c * tanh(score / c), or None.
    """
    segments, tokens = keys.shape[2], keys.shape[3]
    scores = (query @ keys.flatten(2, 3).mT).unflatten(-1, (segments, tokens))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    maximum = scores.amax(dim=-1)
    base = torch.where(maximum == -torch.inf, torch.zeros_like(maximum), maximum)
    weights = torch.exp(scores - base.unsqueeze(-1))
    squares, norms = weights.square(), values.square().sum(dim=-1).unsqueeze(2)
    stepped = weights * steps.unsqueeze(2) if steps is not None else torch.zeros_like(weights)
    sums = [part.sum(dim=-1) for part in (stepped, stepped.square(), weights * norms, squares * norms)]
    return Segments(
        maximum,
        weights.sum(dim=-1),
        squares.sum(dim=-1),
        weights.transpose(2, 3) @ values,
        squares.transpose(2, 3) @ values,
        torch.stack(sums, dim=-1),
    )


def decode_pass(
    query: Tensor,
    keys: EncodedBlocks,
    values: EncodedBlocks,
    exact_keys: Tensor,
    exact_values: Tensor,
    block_bias: Tensor | None,
    exact_bias: Tensor | None,
    key_codec: KeyCodec,
    value_codec: ValueCodec,
    softcap: float | None = None,
) -> Segments:
    """Every block at its base level, and the exact tokens as one last segment.

    Args:
        query: float32 `[batch, kv_heads, rows, channels]`, already multiplied by the softmax scale.
        keys, values: codes of `[batch, kv_heads, blocks, ...]`.
        exact_keys, exact_values: `[batch, kv_heads, tokens, channels]`, originals, at least one token.
        block_bias: as in `attend`; exact_bias: `[batch | 1, kv_heads | 1, rows | 1, tokens]`.
    """
    batch, heads, blocks, block, channels = keys.codes.shape
    width = exact_values.shape[-1]
    step = max(1, CHUNK_NUMBERS // max(1, batch * heads * block * max(channels, width)))
    parts = []
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        part_keys = key_codec.decode(
            keys.codes[:, :, start:stop], None, keys.scale[:, :, start:stop], keys.offset[:, :, start:stop]
        )
        part_values = value_codec.decode(
            values.codes[:, :, start:stop], None, values.scale[:, :, start:stop], values.offset[:, :, start:stop], width
        )
        bias = block_bias[..., start:stop, :] if block_bias is not None else None
        parts.append(attend(query, part_keys, part_values, token_steps(values.scale[:, :, start:stop]), bias, softcap))
    exact = (exact_keys.float().unsqueeze(2), exact_values.float().unsqueeze(2))
    parts.append(attend(query, *exact, None, exact_bias.unsqueeze(-2) if exact_bias is not None else None, softcap))
    return Segments(
        torch.cat([part.maximum for part in parts], dim=-1),
        torch.cat([part.total for part in parts], dim=-1),
        torch.cat([part.square for part in parts], dim=-1),
        torch.cat([part.output for part in parts], dim=2),
        torch.cat([part.square_output for part in parts if part.square_output is not None], dim=2),
        torch.cat([part.sums for part in parts], dim=-2),
    )


def redo_blocks(
    segments: Segments,
    index: tuple[Tensor, Tensor, Tensor],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    steps: Tensor,
    block_bias: Tensor | None,
    softcap: float | None = None,
) -> None:
    """Replace the sums of single blocks, in place, by those of better keys or values.

    Args:
        index: int64 `[n]` each: batch row, KV head and block; keys, values: float32 `[n, block, channels]`.
        steps: float32 `[n, block]`, as in `attend`; of no matter where values are originals.
        query: as in `decode_pass`; block_bias: as in `attend`.
    """
    rows, heads, blocks = index
    bias = None
    if block_bias is not None:
        full = block_bias.expand(query.shape[0], query.shape[1], -1, -1, -1)
        bias = full[rows, heads, :, blocks].unsqueeze(1).unsqueeze(-2)
    blocks_of = (keys[:, None, None], values[:, None, None], steps[:, None, None])
    part = attend(query[rows, heads].unsqueeze(1), *blocks_of, bias, softcap)
    segments.maximum[rows, heads, :, blocks] = part.maximum[:, 0, :, 0]
    segments.total[rows, heads, :, blocks] = part.total[:, 0, :, 0]
    segments.square[rows, heads, :, blocks] = part.square[:, 0, :, 0]
    segments.output[rows, heads, blocks] = part.output[:, 0, 0]
    if segments.square_output is not None and part.square_output is not None:
        segments.square_output[rows, heads, blocks] = part.square_output[:, 0, 0]
    segments.sums[rows, heads, :, blocks] = part.sums[:, 0, :, 0]


def combine(segments: Segments, sink_logit: Tensor | None = None) -> Combined:
    """Softmax over all segments. Args: sink_logit: float32 `[batch | 1, kv_heads, rows]`, a token of value 0, or None."""
    highest = segments.maximum.amax(dim=-1)
    if sink_logit is not None:
        highest = torch.maximum(highest, sink_logit.expand_as(highest))
    factor = torch.exp(segments.maximum.double() - highest.double().unsqueeze(-1))
    weighed = factor * segments.total.double()
    normaliser = weighed.sum(dim=-1)
    sink = torch.zeros_like(normaliser)
    if sink_logit is not None:
        sink = torch.exp(sink_logit.double() - highest.double())
        normaliser = normaliser + sink
    scale = factor / normaliser.unsqueeze(-1)
    output = torch.einsum("bhrs,bhsrd->bhrd", scale.float(), segments.output)
    step, square_step, moment, square_moment = segments.sums.double().unbind(dim=-1)
    # Distances from the output: sum w ||v - o||^2 = sum w ||v||^2 - 2 o . (sum w v) + ||o||^2 sum w.
    size = output.double().square().sum(dim=-1, keepdim=True)
    weight, square = segments.total.double(), segments.square.double()
    assert segments.square_output is not None, "these sums are another kernel's, which certifies them itself"
    moment = moment - 2 * torch.einsum("bhsrd,bhrd->bhrs", segments.output, output) + size * weight
    square_moment = square_moment - 2 * torch.einsum("bhsrd,bhrd->bhrs", segments.square_output, output) + size * square
    over, over_square = weight.clamp_min(TINY), square.clamp_min(TINY)  # at least 1 wherever anything is attended
    return Combined(
        output,
        weighed / normaliser.unsqueeze(-1),
        scale * segments.square.double().sqrt(),
        sink / normaliser,
        segments.maximum > -torch.inf,
        step / over,
        (square_step / over_square).sqrt(),
        moment / over,
        square_moment / over_square,
    )


def score_weights(query: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """sum_c |q_c| S_c and ||q * S||_2 of every row and block, rounded up; float64 `[batch, kv_heads, rows, blocks]`.

    Args: query: float32 `[batch, kv_heads, rows, channels]`, unscaled; scale: float16 `[batch, kv_heads, blocks, channels]`.
    """
    step, size = scale.float().abs(), query.abs()
    up = 1 + (query.shape[-1] + 8) * 2.0**-23
    # Normalised by the row's largest entry, so that squares can neither overflow nor underflow where they matter.
    largest = size.amax(dim=-1, keepdim=True)
    unit = size / torch.where(largest > 0, largest, torch.ones_like(largest))
    widest = step.amax(dim=(-1, -2), keepdim=True)
    widest = torch.where(widest > 0, widest, torch.ones_like(widest))
    relative = step / widest
    factor = largest.double() * widest.double() * up
    slack = query.shape[-1] * 2.0**-60  # what underflow of a product of relative numbers can hide, generously
    l1 = (unit @ relative.mT).double() + slack
    l2 = ((unit * unit) @ (relative * relative).mT).double().sqrt() + slack
    hidden = TINY * widest.double()  # of each channel of the query, where subnormal numbers are flushed
    return l1 * factor + query.shape[-1] * hidden, l2 * factor + query.shape[-1] ** 0.5 * hidden
