"""The dense rung on a GPU: attention over the originals of the KV heads that are flagged, without the host deciding anything.

Originals of finished blocks are read straight from their host pages, each number once: what is checked against the page's
checksum is what is computed with. How sums are rounded, which the bound relies on (docs/certificate.md, section 5): a score is
one sum over the channels in float32. A program takes some blocks of a unit; its weights are relative to the largest score so
far, and what it has is rescaled before each tile of tokens. So an addend goes through at most as many float32 additions as the
program has tokens. Programs are put together in float64; the output is rounded to float32, and from there to the model's type.

A *unit* is one KV head of one batch row. An *item* is a block, or as many exact tokens as a block has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import bounds
from .triton_common import INFINITY, OUTWARD, TINY, UNIT, exp32, exp64, expm1_64, gamma, power_of_two, rounded

OVERFLOW: Any = tl.constexpr(bounds.OVERFLOW)
EXP_ERROR: Any = tl.constexpr(bounds.EXP_ERROR)
TANH_ERROR: Any = tl.constexpr(bounds.TANH_ERROR)
SCORE_SPAN: Any = tl.constexpr(bounds.SCORE_SPAN)
SPLITS: Any = tl.constexpr(16)  # programs that the merge reads at a time
MOST_ROWS = 64
TILE_NUMBERS = 8192  # of keys or values that a program holds at a time; half as many beside more than 16 rows

Allocator = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class HostPages:
    """Where the originals of a layer's finished blocks lie.

    The page of (kind, block, unit) is row-major `[block, channels]` in the model's type, at the address
    `slabs[block // rows] + (value_offset if kind else 0) + ((block % rows) * units + unit) * bytes of a page`.

    Attributes:
        slabs: int64 `[slabs]` on the device, addresses divisible by 16; rows: of blocks in a slab; value_offset: bytes.
        blocks: finished blocks; block: tokens of each.
        sums: int64 `[units, >= blocks, 2]`, checksums of keys and values: the sum of a page's numbers, as unsigned integers of
            their size, times the multipliers, modulo 2^64; key_multipliers, value_multipliers: int64 `[block * channels]`.
    """

    slabs: Tensor
    rows: int
    value_offset: int
    blocks: int
    block: int
    sums: Tensor
    key_multipliers: Tensor
    value_multipliers: Tensor


@dataclass(frozen=True)
class Plan:
    """How the items of a unit are shared out: `programs` programs with `span` items each, read `tile` tokens at a time."""

    programs: int
    span: int
    tile: int
    block: int

    @property
    def chain(self) -> int:
        """Longest chain of additions that an addend of the output goes through."""
        return self.span * self.block + self.programs

    @property
    def rescalings(self) -> int:
        """How often a weight is rescaled, at most: before each tile, and when programs are put together."""
        return self.span * (self.block // self.tile) + 1


@triton.jit
def tanh32(x):
    """tanh of float32, absolute error below 4u = 2^-22; NaN stays NaN.

    (1 - t) / (1 + t) with t = exp(-2|x|) within 4u of itself, which moves the quotient y by 4u * 2t / (1 + t)^2 = 2u (1 - y^2);
    three roundings move it by 3u y: together less than 3.2u. -2|x| is exact, and t = 0 below LEAST_EXPONENT is no coarser.
    """
    t = exp32(-2.0 * tl.abs(x))
    found = tl.div_rn(1.0 - t, 1.0 + t)
    return tl.where(x < 0, -found, found)


@triton.jit
def page_of(slabs, offset, block, rows, unit, units, NUMBERS: tl.constexpr, TYPE: tl.constexpr):
    """A pointer to the page of a block and unit."""
    BYTES: tl.constexpr = NUMBERS * (TYPE.primitive_bitwidth // 8)
    place = (block % rows).to(tl.int64) * units + unit
    address = tl.load(slabs + block // rows) + offset + place * BYTES
    # Pages begin at multiples of 16 bytes: otherwise numbers would be fetched one by one.
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def signed(page, multipliers, place, inside):
    """Numbers of a page as float32, and their part of its checksum; 0 outside. The page is read once, for both."""
    raw = tl.load(page + place, mask=inside, other=0.0)
    if page.dtype.element_ty.primitive_bitwidth == 32:
        bits = raw.to(tl.uint32, bitcast=True).to(tl.int64)
    else:
        bits = raw.to(tl.uint16, bitcast=True).to(tl.int64)
    part = bits * tl.load(multipliers + place, mask=inside, other=0)
    return raw.to(tl.float32), tl.sum(tl.sum(part, axis=1), axis=0)


@triton.jit
def compare(found, known, trouble, KIND: tl.constexpr, unit, block):
    """1 where a checksum is not the one that is known, else 0. The first to find that notes it in `trouble`."""
    wrong = (found != tl.load(known)).to(tl.int32)
    if wrong != 0:
        before = tl.atomic_cas(trouble, 0, 1 | (KIND << 1))
        if before == 0:
            tl.store(trouble + 1, unit)
            tl.store(trouble + 2, block)
    return wrong


@triton.jit
def scores_of(scaled, keys, softcap, bias, bias_row, there, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, USED: tl.constexpr,
              ROWS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Scores `[ROWS, TILE]` of keys `[TILE, WIDE]`; -inf where the mask says so, or there is no token."""
    row, token = tl.arange(0, ROWS), tl.arange(0, TILE)
    scores = tl.dot(scaled, tl.trans(keys), input_precision="ieee")
    if SOFTCAP:
        scores = tanh32(tl.div_rn(scores, tl.zeros_like(scores) + softcap)) * softcap
    if BIAS:
        inside = (row < USED)[:, None] & there[None, :]
        added = tl.load(bias + row[:, None].to(tl.int64) * bias_row + token[None, :], mask=inside, other=0.0)
        scores = tl.where(added == -INFINITY, -INFINITY, scores + added)
    return tl.where(there[None, :], scores, -INFINITY)


@triton.jit
def absorb(scores, values, maximum, total, output):
    """Take a tile into the sums so far, `[ROWS]`, `[ROWS]` and `[ROWS, WIDE_VALUES]`. A NaN score makes the total NaN."""
    top = tl.maximum(maximum, tl.max(scores, axis=1))
    base = tl.where(top == -INFINITY, 0.0, top)
    factor = exp32(maximum - base)
    w = exp32(scores - base[:, None])
    total = total * factor + tl.sum(w, axis=1)
    output = output * factor[:, None] + tl.dot(w, values, input_precision="ieee")
    return top, total, output


@triton.jit(
    do_not_specialize=[
        "rows", "blocks", "exact", "span", "sums_unit", "softcap",
        "block_bias_batch", "block_bias_head", "block_bias_row", "block_bias_block",
        "exact_bias_batch", "exact_bias_head", "exact_bias_row",
    ]
)  # fmt: skip
def split(
    dense, query, slabs, sums, key_multipliers, value_multipliers, exact_keys, exact_values, block_bias, exact_bias,
    maxima, totals, outputs, trouble,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    block_bias_batch, block_bias_head, block_bias_row, block_bias_block, exact_bias_batch, exact_bias_head, exact_bias_row,
    sums_unit, value_offset, rows, units, heads, blocks, exact, span, scaling, softcap,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, USED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    WIDE: tl.constexpr, WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (units, programs): sums of `span` items of a unit, if it is flagged; items are its blocks, then its exact tokens.

    Args: as `launch` has them, `*_batch`, `*_head` and so on their strides; maxima, totals: float32 `[units, programs, USED]`;
        outputs: float32 `[units, programs, USED, WIDTH]`, values by weights.
    """
    unit, program = tl.program_id(0), tl.program_id(1)
    if tl.load(dense + unit) == 0:
        return
    TYPE: tl.constexpr = query.dtype.element_ty
    PARTS: tl.constexpr = BLOCK // TILE
    row, token = tl.arange(0, ROWS), tl.arange(0, TILE)
    channel, column = tl.arange(0, WIDE), tl.arange(0, WIDE_VALUES)
    used = row < USED
    batch, head = (unit // heads).to(tl.int64), (unit % heads).to(tl.int64)
    place = unit.to(tl.int64) * (USED * CHANNELS) + row[:, None] * CHANNELS + channel[None, :]
    scaled = tl.load(query + place, mask=used[:, None] & (channel < CHANNELS)[None, :], other=0.0).to(tl.float32) * scaling

    maximum = tl.full((ROWS,), -INFINITY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, WIDE_VALUES), tl.float32)
    wrong = tl.full((), 0, tl.int32)
    first = program * span
    last = tl.minimum(first + span, blocks + (exact + BLOCK - 1) // BLOCK)
    whole = token < TILE
    for block in range(first, tl.minimum(last, blocks)):
        keys_at = page_of(slabs, 0, block, rows, unit, units, BLOCK * CHANNELS, TYPE)
        values_at = page_of(slabs, value_offset, block, rows, unit, units, BLOCK * WIDTH, TYPE)
        bias = block_bias + batch * block_bias_batch + head * block_bias_head + tl.cast(block, tl.int64) * block_bias_block
        key_sum, value_sum = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        for part in range(PARTS):
            at = part * TILE + token
            inside = (at < BLOCK)[:, None] & (channel < CHANNELS)[None, :]
            keys, of_keys = signed(keys_at, key_multipliers, at[:, None] * CHANNELS + channel[None, :], inside)
            inside = (at < BLOCK)[:, None] & (column < WIDTH)[None, :]
            values, of_values = signed(values_at, value_multipliers, at[:, None] * WIDTH + column[None, :], inside)
            key_sum += of_keys
            value_sum += of_values
            scores = scores_of(
                scaled, keys, softcap, bias + part * TILE, block_bias_row, whole, SOFTCAP, BIAS, USED, ROWS, TILE
            )
            maximum, total, output = absorb(scores, values, maximum, total, output)
        known = sums + unit.to(tl.int64) * sums_unit + block * 2
        wrong |= compare(key_sum, known, trouble, 0, unit, block)
        wrong |= compare(value_sum, known + 1, trouble, 1, unit, block)

    keys_from = exact_keys + batch * key_batch + head * key_head
    values_from = exact_values + batch * value_batch + head * value_head
    for item in range(tl.maximum(first, blocks), last):
        for part in range(PARTS):
            start = (item - blocks) * BLOCK + part * TILE
            there = start + token < exact
            at = (start + token).to(tl.int64)[:, None]
            inside = there[:, None] & (channel < CHANNELS)[None, :]
            keys = tl.load(keys_from + at * key_token + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            inside = there[:, None] & (column < WIDTH)[None, :]
            values = tl.load(values_from + at * value_token + column[None, :], mask=inside, other=0.0).to(tl.float32)
            bias = exact_bias + batch * exact_bias_batch + head * exact_bias_head + start
            scores = scores_of(scaled, keys, softcap, bias, exact_bias_row, there, SOFTCAP, BIAS, USED, ROWS, TILE)
            maximum, total, output = absorb(scores, values, maximum, total, output)

    # What was computed from a damaged page is no number at all: it makes the whole unit NaN.
    total = tl.where(wrong != 0, float("nan"), total)
    place = (unit.to(tl.int64) * tl.num_programs(1) + program) * USED + row
    tl.store(maxima + place, maximum, mask=used)
    tl.store(totals + place, total, mask=used)
    inside = used[:, None] & (column < WIDTH)[None, :]
    tl.store(outputs + place[:, None] * WIDTH + column[None, :], output, mask=inside)


@triton.jit
def bound_of(
    query_norm, key_norm, value_norm, bias_size, output_norm, scaling, lean, softcap, tokens, chain, rescalings,
    relative, absolute, SOFTCAP: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rounding bound of section 5 for a row, in float64; infinite if keys are not finite, even if they weigh nothing."""
    size = scaling * query_norm * key_norm
    four, channels = tl.full((), 4.0, tl.float64), tl.full((), CHANNELS, tl.float64)  # a constant's gamma would be float32
    error = gamma(channels + 4.0) * size
    lost = channels + lean * query_norm * key_norm + tl.sqrt(channels) * ((1.0 + scaling) * key_norm + scaling * query_norm)
    error += 2 * TINY * lost
    if SOFTCAP:
        error += softcap * TANH_ERROR + gamma(four) * size
    error = (error + 2 * UNIT * (size + bias_size) * 1.01) * OUTWARD
    slack = error + UNIT * SCORE_SPAN + (rescalings + 1.0) * EXP_ERROR * 1.01 + 2 * UNIT * rescalings
    grown = expm1_64(slack)
    variation = tl.where(grown > 1e300, 1.0, grown / (grown + 2.0))  # tanh(slack / 2)
    columns = tl.sqrt(tl.full((), WIDTH, tl.float64))
    moved = 2 * value_norm * variation + gamma(2.0 * (chain + rescalings + 1.0) + 1.0) * value_norm
    rounding = (moved + 4 * TINY * tokens * (value_norm + columns)) * OUTWARD
    bound = rounding + (relative * output_norm + columns * absolute) * OUTWARD
    fits = (scaling < OVERFLOW) & (scaling * query_norm < OVERFLOW) & (size < OVERFLOW)  # false for NaN
    return tl.where(fits, bound, INFINITY)


@triton.jit(do_not_specialize=["programs", "tokens", "chain", "rescalings", "sinks_batch", "sinks_head"])
def merge(
    dense, query, maxima, totals, outputs, sinks, key_norm, value_norm, bias_size, result, norm, bound,
    sinks_batch, sinks_head, heads, programs, tokens, chain, rescalings,
    scaling, scaling_rest, lean, softcap, softcap_rest, relative, absolute,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, USED: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr,
):  # fmt: skip
    """Grid (units, rows): programs put together, the output of a row, its norm and its bound, if the unit is flagged.

    Args: `scaling` and `softcap` are sizes here, each in two float32 numbers; lean: 1 where the scale may be flushed, else 0.
    """
    unit, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(dense + unit) == 0:
        return
    some, column = tl.arange(0, SPLITS), tl.arange(0, WIDE_VALUES)
    top = tl.full((), -INFINITY, tl.float64)
    if SINKS:
        logit = tl.load(sinks + (unit // heads) * sinks_batch + (unit % heads) * sinks_head + row).to(tl.float64)
        top = logit
    maxima += unit * programs * USED + row
    totals += unit * programs * USED + row
    outputs += (unit * programs * USED + row) * WIDTH
    for start in range(0, programs, SPLITS):
        there = start + some < programs
        part = tl.load(maxima + (start + some) * USED, mask=there, other=-INFINITY).to(tl.float64)
        top = tl.maximum(top, tl.max(part, axis=0))
    base = tl.where(top == -INFINITY, 0.0, top)
    total = tl.full((), 0.0, tl.float64)
    if SINKS:
        total = exp64(logit - base)
    output = tl.zeros((WIDE_VALUES,), tl.float64)
    for start in range(0, programs, SPLITS):
        there = start + some < programs
        part = tl.load(maxima + (start + some) * USED, mask=there, other=-INFINITY).to(tl.float64)
        factor = exp64(part - base)
        total += tl.sum(factor * tl.load(totals + (start + some) * USED, mask=there, other=0.0).to(tl.float64), axis=0)
        inside = there[:, None] & (column < WIDTH)[None, :]
        place = (start + some).to(tl.int64)[:, None] * (USED * WIDTH) + column[None, :]
        output += tl.sum(factor[:, None] * tl.load(outputs + place, mask=inside, other=0.0).to(tl.float64), axis=0)
    # A row that may attend to nothing is 0. Any NaN is in the total, whatever else is there.
    output = output / tl.where(total == 0.0, 1.0, total)
    made = rounded(output.to(tl.float32), result.dtype.element_ty)
    place = unit * USED + row
    tl.store(result + place * WIDTH + column, made, mask=column < WIDTH)
    seen = tl.where(column < WIDTH, made.to(tl.float32).to(tl.float64), 0.0)
    size = tl.sqrt(tl.sum(seen * seen, axis=0))
    tl.store(norm + place, size)
    channel = tl.arange(0, WIDE)
    q = tl.load(query + place * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32).to(tl.float64)
    found = bound_of(
        tl.sqrt(tl.sum(q * q, axis=0)), tl.load(key_norm + unit), tl.load(value_norm + unit), tl.load(bias_size), size,
        tl.full((), 0.0, tl.float64) + scaling + scaling_rest, lean, tl.full((), 0.0, tl.float64) + softcap + softcap_rest,
        tokens.to(tl.float64), chain.to(tl.float64), rescalings.to(tl.float64), relative, absolute, SOFTCAP, CHANNELS, WIDTH,
    )  # fmt: skip
    tl.store(bound + place, found)


def plan(blocks: int, block: int, exact: int, units: int, rows: int, widths: tuple[int, int], processors: int) -> Plan:
    """How to share out the items of a unit, by sizes alone: which units are flagged, the host does not know.

    A single flagged unit has to keep the link to the host busy; many of them, not the scheduler.
    """
    items = max(1, blocks + -(-exact // block))
    programs = min(items, max(1, processors), max(32, -(-8 * processors // units)))
    span = -(-items // programs)
    held = TILE_NUMBERS // max(power_of_two(width) for width in widths)
    tile = max(16, held if rows <= 16 else held // 2)
    return Plan(-(-items // span), span, min(block, tile), block)


def _halves(x: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is x, within 2^-48 of it: a kernel takes no float64 ones."""
    high = float(torch.tensor(x, dtype=torch.float32))
    return high, x - high if abs(high) < float("inf") else 0.0


def _strides(x: Tensor, count: int) -> list[int]:
    """The strides of the first axes, 0 where there is one number for all."""
    return [x.stride(axis) if x.shape[axis] > 1 else 0 for axis in range(count)]


def launch(
    dense: Tensor, query: Tensor, pages: HostPages, exact_keys: Tensor, exact_values: Tensor,
    scaling: float, softcap: float | None, block_bias: Tensor | None, exact_bias: Tensor | None, sinks: Tensor | None,
    key_norm: Tensor, value_norm: Tensor, bias_size: Tensor, trouble: Tensor, result: Tensor, norm: Tensor, bound: Tensor,
    scratch: Allocator, processors: int,
) -> Plan:  # fmt: skip
    """Put the exact attention of flagged units over what is in `result`, `norm` and `bound`; the others are left as they are.

    A page whose checksum is wrong makes its unit NaN, and `trouble` `[1 | kind << 1, unit, block]` by the first one found.

    Args:
        dense: int32 `[units]`, units = batch * kv_heads; query: `[units, rows, channels]` in the model's type, contiguous,
            unscaled, 1 to 64 rows.
        exact_keys, exact_values: `[batch, kv_heads, exact, channels]`, originals on the device, adjacent channels.
        block_bias: float32 `[batch | 1, kv_heads | 1, rows | 1, blocks, block]`, exact_bias: `[..., exact]`, adjacent tokens of
            a block, -inf masks; both or neither. sinks: sink logits `[batch | 1, kv_heads | 1, rows]`, adjacent rows.
        key_norm, value_norm: float64 `[units]`, the largest over everything held; bias_size: float64 `[]`, as in `row_bias`.
        trouble: int32 `[>= 3]`, zeros before; result: `[units, rows, width]` in the model's type; norm, bound: float64
            `[units, rows]`. All contiguous.
        scratch: gives a tensor of a name, shape and dtype on the device, uninitialised; processors: how many the device has.
    Returns: how the work was shared out, which the bound depends on.
    """
    batch, heads, exact, channels = exact_keys.shape
    units, rows, width = result.shape
    if units != batch * heads or not 1 <= rows <= MOST_ROWS or (block_bias is None) != (exact_bias is None):
        raise ValueError(f"{tuple(result.shape)} is no result of keys {tuple(exact_keys.shape)}, or one bias is missing")
    shared = plan(pages.blocks, pages.block, exact, units, rows, (channels, width), processors)
    maxima, totals = (scratch(name, (units, shared.programs, rows), torch.float32) for name in ("dense maxima", "dense totals"))
    outputs = scratch("dense outputs", (units, shared.programs, rows, width), torch.float32)
    wide, wide_values = (max(16, power_of_two(size)) for size in (channels, width))
    biases = [0] * 7
    if block_bias is not None and exact_bias is not None:
        biases = [*_strides(block_bias, 3), block_bias.stride(3), *_strides(exact_bias, 3)]
    (scale, scale_rest), (cap, cap_rest) = _halves(abs(scaling)), _halves(abs(softcap or 0.0))
    some_bias, other_bias = (query if part is None else part for part in (block_bias, exact_bias))
    split[(units, shared.programs)](
        dense, query, pages.slabs, pages.sums, pages.key_multipliers, pages.value_multipliers, exact_keys, exact_values,
        some_bias, other_bias, maxima, totals, outputs, trouble,
        *exact_keys.stride()[:3], *exact_values.stride()[:3], *biases, pages.sums.stride(0), pages.value_offset, pages.rows,
        units, heads, pages.blocks, exact, shared.span, float(scaling), float(softcap or 0.0),
        SOFTCAP=softcap is not None, BIAS=block_bias is not None, USED=rows, ROWS=max(16, power_of_two(rows)),
        CHANNELS=channels, WIDE=wide, WIDTH=width, WIDE_VALUES=wide_values, BLOCK=pages.block, TILE=shared.tile,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    relative, absolute = bounds.OUTPUT_ROUNDOFF[result.dtype]
    merge[(units, rows)](
        dense, query, maxima, totals, outputs, query if sinks is None else sinks, key_norm, value_norm, bias_size,
        result, norm, bound, *([0, 0] if sinks is None else _strides(sinks, 2)), heads, shared.programs,
        pages.blocks * pages.block + exact, shared.chain, shared.rescalings,
        scale, scale_rest, float(abs(scaling) < bounds.TINY), cap, cap_rest, relative, absolute,
        SOFTCAP=softcap is not None, SINKS=sinks is not None, USED=rows, CHANNELS=channels, WIDE=wide, WIDTH=width,
        WIDE_VALUES=wide_values, num_warps=4, num_stages=1,
    )  # fmt: skip
    return shared
