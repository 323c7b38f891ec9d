"""The decode pass on a GPU: every code is read once, for all query rows of its KV head; sums are left behind by segment.

What is computed, and how it is rounded, is in docs/certificate.md, section 5 ("How the Triton kernels add up"). Codes of keys
are multiplied as integers, by three digits of eight bits for each factor, and codes of values by two digits of eleven bits, in
float16 products whose float32 sums are whole numbers below 2^24: exact, in whatever order a tensor core adds. Originals (exact
tokens, hot and promoted blocks) are multiplied in float32.

A *unit* is one KV head of one batch row. Segments of a unit: its N blocks, then its exact tokens, as many to a segment as a
block has.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..codecs import LENGTHS as LENGTH_CODES
from .triton_common import CHANGING, INFINITY, MIDDLE, exp32, expm1_64, whole

LENGTHS: Any = tl.constexpr(LENGTH_CODES)
CENTRE: Any = tl.constexpr(128.0)  # codes of keys are taken relative to this
LEAST_KEY: Any = tl.constexpr(22)  # stored exponents between which units and their inverses are normal numbers
SUMS: Any = tl.constexpr(8)  # of a segment, as in `cpu_certify`: steps, their squares, norms by w and w^2, sums of w to w^4


@triton.jit
def unit_of(top, BITS: tl.constexpr):
    """The power of two that brings numbers up to `top` below 2^BITS, and its inverse, the unit."""
    stored = top.to(tl.int32, bitcast=True) >> 23
    stored = tl.minimum(tl.maximum(stored, BITS), 254)
    power = ((253 + BITS - stored) << 23).to(tl.float32, bitcast=True)
    unit = ((stored - BITS + 1) << 23).to(tl.float32, bitcast=True)
    return power, unit


@triton.jit
def halves(codes):
    """Whole numbers below 256, in int16, as float16: by way of 1024 + x, whose bits are those of x below an exponent."""
    return (codes | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def tanh(x):
    """tanh of float32, through float64: within 2^-24."""
    twice = tl.minimum(2.0 * tl.abs(x).to(tl.float64), 80.0)
    grown = expm1_64(tl.where(x == x, twice, 0.0))
    found = (grown / (grown + 2.0)).to(tl.float32)
    found = tl.where(x < 0, -found, found)
    return tl.where(x == x, found, x)


@triton.jit
def read_query(query, unit, scaling, USED: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a unit's query as float32, times the softmax scale: `[ROWS, WIDE]`, 0 beyond what there is."""
    row, channel = tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = (row < USED)[:, None] & (channel < CHANNELS)[None, :]
    place = query + unit.to(tl.int64) * (USED * CHANNELS) + row[:, None] * CHANNELS + channel[None, :]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32) * scaling


@triton.jit
def settle(
    scores, steps, norms, softcap, bias, bias_row, tokens, maximum, sums, unit, segment, segments,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, USED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Scores `[ROWS, TOKENS]` of a segment to its weights, of which the maximum and the eight sums are stored.

    Args: steps, norms: float32 `[TOKENS]`, sigma_t and squared norms of values; bias: where the segment's first token has its
        bias in the first row, rows `bias_row` apart; tokens: how many there are, the others weigh nothing.
    """
    row, token = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    if SOFTCAP:
        scores = tanh(tl.div_rn(scores, tl.zeros_like(scores) + softcap)) * softcap
    there = (row < USED)[:, None] & (token < tokens)[None, :]
    if BIAS:
        scores += tl.load(bias + row[:, None] * bias_row + token[None, :], mask=there, other=0.0)
    scores = tl.where((token < tokens)[None, :], scores, -INFINITY)
    largest = tl.max(scores, axis=1)
    base = tl.where(largest == -INFINITY, 0.0, largest)
    w = exp32(scores - base[:, None])
    square, stepped = w * w, w * steps[None, :]
    place = (unit * USED + row).to(tl.int64) * segments + segment
    used = row < USED
    tl.store(maximum + place, largest, mask=used)
    to = sums + place * SUMS
    tl.store(to, tl.sum(stepped, axis=1), mask=used)
    tl.store(to + 1, tl.sum(stepped * stepped, axis=1), mask=used)
    tl.store(to + 2, tl.sum(w * norms[None, :], axis=1), mask=used)
    tl.store(to + 3, tl.sum(square * norms[None, :], axis=1), mask=used)
    tl.store(to + 4, tl.sum(w, axis=1), mask=used)
    tl.store(to + 5, tl.sum(square, axis=1), mask=used)
    tl.store(to + 6, tl.sum(square * w, axis=1), mask=used)
    tl.store(to + 7, tl.sum(square * square, axis=1), mask=used)
    return w


@triton.jit
def read_lengths(lengths, numbers, place, TOKENS: tl.constexpr, COUNT: tl.constexpr):
    """The squared norms of a block's values, rounded up: float32 `[TOKENS]` (`codecs.read_lengths`)."""
    radius = tl.load(numbers + place * COUNT + COUNT - 1).to(tl.float64)
    factor = (radius * radius / LENGTHS * (1 + 2.0**-20)).to(tl.float32)
    codes = tl.load(lengths + place * TOKENS + tl.arange(0, TOKENS)).to(tl.int32) & LENGTHS
    return codes.to(tl.float32) * factor


@triton.jit
def read_steps(scale, place, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """sigma_t of a block's tokens, rounded up: float32 `[TOKENS]` (`codecs.token_steps`)."""
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS,), tl.float32)
    for g in tl.static_range(GROUPS):
        step = tl.load(scale + (place * TOKENS + token) * GROUPS + g).to(tl.float32)
        total += step * step
    return tl.sqrt(total) * (1 + (GROUPS + 8) * 2.0**-23)


@triton.jit
def repeated(x, TIMES: tl.constexpr):
    """Rows `[n, columns]`, all of them TIMES times: `[TIMES * n, columns]`."""
    return tl.reshape(tl.broadcast_to(x[None, :, :], (TIMES, x.shape[0], x.shape[1])), (TIMES * x.shape[0], x.shape[1]))


@triton.jit
def parted(x, FEW: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr):
    """The first two or four of SLOTS times FEW rows, `[FEW, COLUMNS]` each: the first two twice where there are but two.

    By `tl.split`: sums over slots would leave each of their results in several threads.
    """
    if SLOTS > 4:
        slot = tl.arange(0, SLOTS // 4)[:, None, None]
        x = tl.sum(tl.where(slot == 0, tl.reshape(x, (SLOTS // 4, 4 * FEW, COLUMNS)), 0), axis=0)
    if SLOTS == 2:
        a, b = tl.split(tl.permute(tl.reshape(x, (2, FEW, COLUMNS)), (1, 2, 0)))
        c, d = a, b
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, (2, 2, FEW, COLUMNS)), (2, 3, 1, 0)))
        a, b = tl.split(first)
        c, d = tl.split(second)
    return a, b, c, d


@triton.jit
def key_scores(
    query, codes, scale, offset, l1, l2, errors, unit, block, blocks, place,
    USED: tl.constexpr, CHANNELS: tl.constexpr, FEW: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Scores `[FEW, TOKENS]` of a block of coded keys; what the score bound needs of the rows is stored.

    Args: query: scaled, `[FEW, WIDE]`. The digits of all rows lie below one another, so that one product has them all.
    """
    few, channel, token = tl.arange(0, FEW), tl.arange(0, WIDE), tl.arange(0, TOKENS)
    inside = channel < CHANNELS
    keys = tl.load(
        codes + (place * TOKENS + token)[None, :] * CHANNELS + channel[:, None], mask=inside[:, None], other=128
    )  # [WIDE, TOKENS]
    step = tl.load(scale + place * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    start = tl.load(offset + place * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    middle = start + step * (CENTRE + MIDDLE)
    at_middle, factor = query * middle[None, :], query * step[None, :]
    size = tl.abs(factor)
    largest = tl.max(tl.max(size, axis=1), axis=0)
    power, unit_step = unit_of(largest, 22)
    total = tl.sum(size, axis=1)
    error = (CHANNELS + 15) * 2.0**-24 * tl.sum(tl.abs(at_middle), axis=1) + 8 * CENTRE * 2.0**-24 * total
    to = (unit * USED + few).to(tl.int64) * blocks + block
    tl.store(errors + to, (error + (66.0 * CHANNELS) * unit_step) * (1 + 2.0**-8), mask=few < USED)
    tl.store(l1 + to, total, mask=few < USED)
    tl.store(l2 + to, tl.sum(factor * factor, axis=1), mask=few < USED)
    # Where a factor overflowed, every score is to be NaN.
    constant = tl.sum(at_middle, axis=1) + (largest - largest)
    digits = whole(factor * power).to(tl.int32)
    first = ((digits + 128) & 255) - 128
    rest = (digits - first) >> 8
    second = ((rest + 128) & 255) - 128
    third = (rest - second) >> 8
    SLOTS: tl.constexpr = 4 if FEW >= 4 else 16 // FEW
    a, b, c = first.to(tl.int8), second.to(tl.int8), third.to(tl.int8)
    every = tl.permute(tl.join(tl.join(b, c), tl.join(a, a)), (3, 2, 0, 1))
    stacked = repeated(tl.reshape(every, (4 * FEW, WIDE)), SLOTS // 4)
    products = tl.dot(stacked, (keys ^ 128).to(tl.int8, bitcast=True), out_dtype=tl.int32)
    middle_sum, upper_sum, low, _low = parted(products, FEW, TOKENS, SLOTS)
    high = middle_sum + 256 * upper_sum
    return (constant[:, None] + low.to(tl.float32) * unit_step) + high.to(tl.float32) * (unit_step * 256.0)


@triton.jit
def by_digits(
    w, step, codes, start, power, unit_step,
    FEW: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """sum_t w_t (start_t + step_t code_tc) `[FEW, COLUMNS]`: start `[FEW]` is summed already, codes are float16."""
    factors = whole((w * step[None, :]) * power)
    high = whole(factors * (1.0 / (1 << DIGIT)))
    low = factors - high * (1 << DIGIT)
    SLOTS: tl.constexpr = 2 if FEW >= 8 else 16 // FEW
    both = tl.reshape(tl.permute(tl.join(low.to(tl.float16), high.to(tl.float16)), (2, 0, 1)), (2 * FEW, TOKENS))
    products = tl.dot(repeated(both, SLOTS // 2), codes)
    lower, upper, _lower, _upper = parted(products, FEW, COLUMNS, SLOTS)
    made = lower + upper * (1 << DIGIT)
    return made * unit_step + start[:, None]


@triton.jit
def value_step(scale, offset, place, g, FOUR: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, DIGIT: tl.constexpr):
    """Steps and offsets of a group's codes `[TOKENS]`, and the power of two and unit of its factors."""
    at = (place * TOKENS + tl.arange(0, TOKENS)) * GROUPS + g
    step, start = tl.load(scale + at).to(tl.float32), tl.load(offset + at).to(tl.float32)
    if FOUR:
        start += step * MIDDLE
    else:
        step *= 1 / 16
    power, unit_step = unit_of(tl.max(step, axis=0), 2 * DIGIT - 1)
    return step, start, power, unit_step


@triton.jit
def add_values(
    w, codes, scale, offset, output, slips, squares, norms, unit, block, blocks, segments, place,
    USED: tl.constexpr, WIDTH: tl.constexpr, FEW: tl.constexpr, TOKENS: tl.constexpr, FOUR: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """Values of a coded block by weights `[FEW, TOKENS]`, to their place in `output`; what integers round, at most.

    COLUMNS: bytes of a token that are read at a time, CHUNKS times; each chunk is of one group, or its nibbles are of one each.
    """
    row, token, column = tl.arange(0, FEW), tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    BYTES: tl.constexpr = WIDTH // 2 if FOUR else WIDTH
    to = output + (unit.to(tl.int64) * segments + block) * (USED * WIDTH) + row[:, None] * WIDTH
    coarse = tl.zeros((), tl.float32)
    for j in tl.static_range(CHUNKS):
        at = j * COLUMNS + column
        there = at < BYTES
        stored = tl.load(codes + (place * TOKENS + token)[:, None] * BYTES + at[None, :], mask=there[None, :], other=0)
        stored = stored.to(tl.int16)
        ok = (row < USED)[:, None] & there[None, :]
        step, start, power, unit_step = value_step(scale, offset, place, j * COLUMNS // GROUP, FOUR, GROUPS, TOKENS, DIGIT)
        constant = tl.sum(w * start[None, :], axis=1)
        if FOUR:
            made = by_digits(w, step, halves(stored & 15), constant, power, unit_step, FEW, TOKENS, COLUMNS, DIGIT)
            tl.store(to + at[None, :], made, mask=ok)
            coarse += unit_step * unit_step * tl.sum(there.to(tl.float32), axis=0)
            if (BYTES + j * COLUMNS) // GROUP != j * COLUMNS // GROUP:
                step, start, power, unit_step = value_step(
                    scale, offset, place, (BYTES + j * COLUMNS) // GROUP, FOUR, GROUPS, TOKENS, DIGIT
                )
                constant = tl.sum(w * start[None, :], axis=1)
            made = by_digits(w, step, halves(stored >> 4), constant, power, unit_step, FEW, TOKENS, COLUMNS, DIGIT)
            tl.store(to + BYTES + at[None, :], made, mask=ok)
            coarse += unit_step * unit_step * tl.sum(there.to(tl.float32), axis=0)
        else:
            made = by_digits(w, step, halves(stored), constant, power, unit_step, FEW, TOKENS, COLUMNS, DIGIT)
            tl.store(to + at[None, :], made, mask=ok)
            coarse += unit_step * unit_step * tl.sum(there.to(tl.float32), axis=0)
    LARGEST: tl.constexpr = 15.0 if FOUR else 255.0
    slip = tl.sqrt(coarse) * (0.75 * LARGEST * TOKENS * (1 + 2.0**-18))
    tl.store(slips + unit.to(tl.int64) * blocks + block, slip)
    tl.store(squares + unit.to(tl.int64) * blocks + block, tl.sum(norms, axis=0))


@triton.jit
def read_originals(source, row_stride, tokens, COUNT: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr):
    """Originals as float32 `[TOKENS, WIDE]`: `tokens` rows of `COUNT` channels, `row_stride` numbers apart; else 0."""
    token, channel = tl.arange(0, TOKENS), tl.arange(0, WIDE)
    inside = (token < tokens)[:, None] & (channel < COUNT)[None, :]
    return tl.load(source + token[:, None] * row_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def largest_norm(x, COUNT: tl.constexpr):
    """The largest L2 norm of float32 rows `[TOKENS, WIDE]`, rounded up; NaN if one is: float64."""
    wide = x.to(tl.float64)
    square = tl.sum(wide * wide, axis=1)
    odd = tl.sum((square != square).to(tl.int32), axis=0)
    most = tl.max(tl.where(square == square, square, 0.0), axis=0)
    norm = tl.sqrt(most) * (1 + (COUNT + 8) * 2.0**-52 + 2.0**-30)
    return tl.where(odd > 0, INFINITY - INFINITY, norm)


@triton.jit
def float_segment(
    wide, keys, values, steps, norms, softcap, bias, bias_row, tokens, maximum, sums, output, unit, segment, segments,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, USED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    WIDE_VALUES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A segment of float32 keys `[TOKENS, WIDE]` and values: maximum, sums, output."""
    row, channel = tl.arange(0, ROWS), tl.arange(0, WIDE_VALUES)
    scores = tl.dot(wide, tl.trans(keys), input_precision="ieee")
    w = settle(
        scores, steps, norms, softcap, bias, bias_row, tokens, maximum, sums, unit, segment, segments,
        SOFTCAP, BIAS, USED, ROWS, TOKENS,
    )  # fmt: skip
    made = tl.dot(w, values, input_precision="ieee")
    to = output + (unit.to(tl.int64) * segments + segment) * (USED * WIDTH) + row[:, None] * WIDTH + channel[None, :]
    tl.store(to, made, mask=(row < USED)[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def as_exact(errors, slips, squares, values, unit, block, blocks, USED: tl.constexpr, FEW: tl.constexpr):
    """Note of a block that was multiplied in float32 that nothing is off in it by more than float32 sums are."""
    few = tl.arange(0, FEW)
    to = (unit * USED + few).to(tl.int64) * blocks + block
    tl.store(errors + to, tl.zeros((FEW,), tl.float32), mask=few < USED)
    tl.store(slips + unit.to(tl.int64) * blocks + block, 0.0)
    tl.store(squares + unit.to(tl.int64) * blocks + block, tl.sum(tl.sum(values * values, axis=1), axis=0))


@triton.jit(do_not_specialize=CHANGING)
def coded_pass(
    query, key_codes, key_scale, key_offset, value_codes, value_scale, value_offset, value_numbers, lengths,
    block_bias, block_bias_batch, block_bias_head, block_bias_row,
    maximum, sums, output, l1, l2, errors, slips, squares, levels,
    blocks, key_room, value_room, span, segments, heads, units, scaling, softcap,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, USED: tl.constexpr, FEW: tl.constexpr,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, FOUR: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, DIGIT: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Every block from its codes. Grid (units, programs), `span` blocks each.

    Args, beside those of `reference.decode_pass`: query `[U, USED, CHANNELS]`, unscaled, in the model's type; codes and so on
        as `BlockStore` holds them, with room for `key_room` and `value_room` blocks a unit; `COUNT` numbers a value block.
        maximum `[U, USED, segments]`, sums `[..., 8]`, output `[U, segments, USED, WIDTH]`, l1, l2, errors `[U, USED, blocks]`,
        slips, squares `[U, blocks]`: float32, as `cpu_pass.Task` has them. levels: int32 `[3, U, blocks]`, of keys, values,
        hot.
    """
    unit, program = tl.program_id(0), tl.program_id(1)
    wide = read_query(query, unit, scaling, USED, CHANNELS, FEW, WIDE)
    bias = block_bias + (unit // heads).to(tl.int64) * block_bias_batch + (unit % heads).to(tl.int64) * block_bias_head
    for block in range(program * span, tl.minimum(program * span + span, blocks)):
        for kind in tl.static_range(3):
            tl.store(levels + (kind * units + unit).to(tl.int64) * blocks + block, 0)
        value_place = unit.to(tl.int64) * value_room + block
        scores = key_scores(
            wide, key_codes, key_scale, key_offset, l1, l2, errors, unit, block, blocks, unit.to(tl.int64) * key_room + block,
            USED, CHANNELS, FEW, WIDE, TOKENS,
        )  # fmt: skip
        steps = read_steps(value_scale, value_place, GROUPS, TOKENS)
        norms = read_lengths(lengths, value_numbers, value_place, TOKENS, COUNT)
        w = settle(
            scores, steps, norms, softcap, bias + block * TOKENS, block_bias_row, TOKENS, maximum, sums, unit, block,
            segments, SOFTCAP, BIAS, USED, FEW, TOKENS,
        )  # fmt: skip
        add_values(
            w, value_codes, value_scale, value_offset, output, slips, squares, norms, unit, block, blocks, segments,
            value_place, USED, WIDTH, FEW, TOKENS, FOUR, GROUPS, GROUP, COLUMNS, CHUNKS, DIGIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def float_pass(
    query, exact_keys, exact_values, exact, exact_key_unit, exact_value_unit, exact_key_row, exact_value_row,
    hot_blocks, hot_keys, hot_values, slots, value_scale,
    block_bias, block_bias_batch, block_bias_head, block_bias_row, exact_bias, exact_bias_batch, exact_bias_head,
    exact_bias_row,
    maximum, sums, output, errors, slips, squares, levels, exact_norms,
    blocks, value_room, segments, heads, units, scaling, softcap,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, HOT: tl.constexpr,
    USED: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr,
    WIDE_VALUES: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Exact tokens, and the blocks in hot slots in place of what `coded_pass` made of them. Grid (units, segments and slots).

    Args: exact_keys, exact_values: `exact` tokens of each unit, `*_unit` numbers from one to the next and `*_row` from token to
        token. hot_blocks: int64 `[U, slots]`, the block in a slot or -1; hot_keys, hot_values `[U, slots, TOKENS, ...]`.
        exact_norms: float64 `[U, segments - blocks, 2]`, the largest norms of keys and values. The others as in `coded_pass`.
    """
    unit, number = tl.program_id(0), tl.program_id(1)
    wide = read_query(query, unit, scaling, USED, CHANNELS, ROWS, WIDE)
    batch, head = (unit // heads).to(tl.int64), (unit % heads).to(tl.int64)
    if number < segments - blocks:
        first = number * TOKENS
        bias = exact_bias + batch * exact_bias_batch + head * exact_bias_head + first
        held = tl.minimum(exact - first, TOKENS)
        from_keys = exact_keys + unit.to(tl.int64) * exact_key_unit + first.to(tl.int64) * exact_key_row
        from_values = exact_values + unit.to(tl.int64) * exact_value_unit + first.to(tl.int64) * exact_value_row
        keys = read_originals(from_keys, exact_key_row, held, CHANNELS, WIDE, TOKENS)
        values = read_originals(from_values, exact_value_row, held, WIDTH, WIDE_VALUES, TOKENS)
        to = exact_norms + (unit.to(tl.int64) * (segments - blocks) + number) * 2
        tl.store(to, largest_norm(keys, CHANNELS))
        tl.store(to + 1, largest_norm(values, WIDTH))
        nothing = tl.zeros((TOKENS,), tl.float32)
        float_segment(
            wide, keys, values, nothing, nothing, softcap, bias, exact_bias_row, held, maximum, sums, output, unit,
            blocks + number, segments, SOFTCAP, BIAS, USED, WIDTH, ROWS, WIDE_VALUES, TOKENS,
        )  # fmt: skip
    elif HOT:
        at = unit.to(tl.int64) * slots + number - (segments - blocks)
        block = tl.load(hot_blocks + at).to(tl.int32)
        if (block >= 0) & (block < blocks):
            for kind in tl.static_range(3):
                tl.store(levels + (kind * units + unit).to(tl.int64) * blocks + block, 2)
            keys = read_originals(hot_keys + at * (TOKENS * CHANNELS), CHANNELS, TOKENS, CHANNELS, WIDE, TOKENS)
            values = read_originals(hot_values + at * (TOKENS * WIDTH), WIDTH, TOKENS, WIDTH, WIDE_VALUES, TOKENS)
            steps = read_steps(value_scale, unit.to(tl.int64) * value_room + block, GROUPS, TOKENS)
            bias = block_bias + batch * block_bias_batch + head * block_bias_head + block * TOKENS
            float_segment(
                wide, keys, values, steps, tl.sum(values * values, axis=1), softcap, bias, block_bias_row, TOKENS,
                maximum, sums, output, unit, block, segments, SOFTCAP, BIAS, USED, WIDTH, ROWS, WIDE_VALUES, TOKENS,
            )  # fmt: skip
            as_exact(errors, slips, squares, values, unit, block, blocks, USED, FEW)
