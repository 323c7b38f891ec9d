"""Bounds of a unit's rows, and the ladder on the GPU: promote, compute again, until every row is within its budget.

One program a unit, and one launch whatever happens: where all rows are within their budgets at once, it has nothing to do. The
choice is that of `ladder.choose`, by a threshold on the gain for a byte that is found by bisection instead of by sorting.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import ladder
from ..codecs import EPSILON, ETA, KAPPA, PER_LEVEL
from .triton_blocks import load_keys, load_values
from .triton_certify import (
    ATOL,
    BOUND,
    CANDIDATE,
    EXACT_MASS,
    FACTS,
    FIXED,
    INFLATE,
    KEY_TOTAL,
    MET,
    NORM,
    OVER,
    PARTIALS,
    RTOL,
    VALUE_NORM,
    VALUE_TOTAL,
    bound,
    max_of,
    merge,
    mix,
    sum_of,
)
from .triton_common import CHANGING, INFINITY, OUTWARD, expm1_64, least, most
from .triton_pass import as_exact, float_segment, read_query, read_steps

AIM: Any = tl.constexpr(ladder.AIM)
DOWN: Any = tl.constexpr(1 - 2.0**-30)  # as in `ladder.head_budget`
HALVINGS: Any = tl.constexpr(16)  # of the range of thresholds, 2^-60 to 1 of the largest: to a thousandth of a factor of two
LOWEST: Any = tl.constexpr(2.0**-60)
# Of a unit: blocks whose keys and values were raised, pages of keys and values and planes of both that were read, rounds,
# dense.
COUNTS: Any = tl.constexpr(8)
_PER_LEVEL, _KAPPA, _EPSILON, _ETA = (tl.constexpr(x) for x in (PER_LEVEL, KAPPA, EPSILON, ETA))


@triton.jit
def total_of(facts, partials, settings, unit, row, chunks, USED: tl.constexpr, FEW: tl.constexpr):
    """A row's bound from its chunks (`bounds.total`), to its facts. Returns whether it is within its budget."""
    place, few = (unit * USED + row).to(tl.int64), tl.arange(0, FEW)
    parts, held, active = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    exact, worst = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for start in range(0, chunks, FEW):
        there = start + few < chunks
        from_ = partials + (place * chunks + start + few) * PARTIALS
        parts += sum_of(tl.load(from_, mask=there, other=0.0))
        held += sum_of(tl.load(from_ + 1, mask=there, other=0.0))
        active += sum_of(tl.load(from_ + 2, mask=there, other=0.0))
        worst = most(worst, max_of(tl.load(from_ + 3, mask=there, other=0.0)))
        exact += sum_of(tl.load(from_ + 4, mask=there, other=0.0))
    fact = facts + place * FACTS
    norm, value_total, fixed = tl.load(fact + NORM), tl.load(fact + VALUE_TOTAL), tl.load(fact + FIXED)
    over = tl.load(fact + INFLATE) * OUTWARD / (tl.load(fact + EXACT_MASS) + exact + held) * OUTWARD
    total = parts * over * OUTWARD
    # `key_error_cap`.
    share, grown = least(active, 1.0), expm1_64(worst)
    away = tl.where(grown < 1e300, grown / (1 + grown), tl.where(grown == grown, 1.0, grown))
    rest = 1 - share * away
    moved = tl.where(rest > 0, share * grown / most(rest, 1e-300), tl.where(rest == rest, INFINITY, rest))
    half = tl.where(worst > 80.0, 1.0, grown / (grown + 2))  # tanh(worst / 2)
    variation = least(least(half * OUTWARD, moved * OUTWARD), 1.0)
    cap = 2 * tl.load(fact + VALUE_NORM) * variation * OUTWARD
    key_total = tl.where(total <= cap, total, cap)
    found = (key_total + value_total + fixed) * OUTWARD
    found = tl.where(norm < INFINITY, found, INFINITY)  # NaN is not below
    budget = (tl.load(settings + ATOL) + tl.load(settings + RTOL) * norm) * DOWN
    met = (found >= 0) & (found <= budget) & (found < INFINITY)
    tl.store(fact + BOUND, found)
    tl.store(fact + KEY_TOTAL, key_total)
    tl.store(fact + OVER, over)
    return met.to(tl.int32)


@triton.jit
def candidates(
    figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, unit, place, block, there, between, over,
    blocks, key_room, value_room, USED: tl.constexpr, KEY_COUNT: tl.constexpr, COUNT: tl.constexpr,
    KEY_PLANE: tl.constexpr, VALUE_PLANE: tl.constexpr,
):  # fmt: skip
    """What raising blocks gains a row: keys to their plane and to originals, values likewise; `ladder.choose`.

    prices: float64 `[4]`, bytes of a block in that order.
    Returns: four gains and four gains for a byte.
    """
    here = unit.to(tl.int64) * blocks + block
    levels = tl.load(key_level + here, mask=there, other=2)
    value_levels = tl.load(value_level + here, mask=there, other=2)
    keys = tl.load(figures + 2 * between + place * blocks + block, mask=there, other=0.0) * over
    values = tl.load(figures + 3 * between + place * blocks + block, mask=there, other=0.0)
    keys = tl.where(keys <= 1e200, keys, 1e200)  # what is not finite counts as very large
    values = tl.where(values <= 1e200, values, 1e200)
    key_first, value_first = tl.zeros_like(keys), tl.zeros_like(values)
    if KEY_PLANE:
        numbers = key_numbers + (unit.to(tl.int64) * key_room + block) * KEY_COUNT
        a = tl.load(l1 + place * blocks + block, mask=there, other=0.0)
        b = tl.sqrt(tl.load(l2 + place * blocks + block, mask=there, other=0.0))
        coarse = tl.minimum(
            tl.load(numbers + _KAPPA, mask=there, other=1.0) * a, tl.load(numbers + _EPSILON, mask=there, other=1.0) * b
        )
        fine = tl.minimum(
            tl.load(numbers + _PER_LEVEL + _KAPPA, mask=there, other=1.0) * a,
            tl.load(numbers + _PER_LEVEL + _EPSILON, mask=there, other=1.0) * b,
        )
        left = tl.minimum(fine / tl.maximum(coarse, 1e-30), 1.0).to(tl.float64)
        key_first = tl.where(levels == 0, keys * (1 - left), 0.0)
    if VALUE_PLANE:
        numbers = value_numbers + (unit.to(tl.int64) * value_room + block) * COUNT
        coarse = tl.load(numbers + _ETA, mask=there, other=1.0)
        fine = tl.load(numbers + _PER_LEVEL + _ETA, mask=there, other=1.0)
        left = tl.minimum(fine / tl.maximum(coarse, 1e-30), 1.0).to(tl.float64)
        value_first = tl.where(value_levels == 0, values * (1 - left), 0.0)
    key_last = tl.where(levels < 2, keys - key_first, 0.0)
    value_last = tl.where(value_levels < 2, values - value_first, 0.0)
    return (
        key_first, key_last, value_first, value_last,
        key_first / tl.load(prices), key_last / tl.load(prices + 1),
        value_first / tl.load(prices + 2), value_last / tl.load(prices + 3),
    )  # fmt: skip


@triton.jit
def gained(ratio, gain, threshold):
    """What the candidates above a threshold gain together."""
    return sum_of(tl.where((ratio >= threshold) & (gain > 0), gain, 0.0))


@triton.jit
def thresholds(
    figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, facts, settings, wanted, unit, blocks,
    key_room, value_room, USED: tl.constexpr, KEY_COUNT: tl.constexpr, COUNT: tl.constexpr, KEY_PLANE: tl.constexpr,
    VALUE_PLANE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """For each failing row, from which gain for a byte on candidates are taken; infinite for the others: to `wanted`.

    Args: wanted: float64 `[U, USED]`.
    Returns: whether a row has no room at all: nothing but the dense rung helps it.
    """
    tile, between = tl.arange(0, TILE), tl.num_programs(0).to(tl.int64) * USED * blocks
    hopeless = 0
    for row in range(USED):
        place = (unit * USED + row).to(tl.int64)
        fact = facts + place * FACTS
        norm, fixed, found, over = (
            tl.load(fact + NORM), tl.load(fact + FIXED), tl.load(fact + BOUND), tl.load(fact + OVER)
        )  # fmt: skip
        budget = (tl.load(settings + ATOL) + tl.load(settings + RTOL) * norm) * DOWN
        met = (found >= 0) & (found <= budget) & (found < INFINITY)
        threshold = tl.full((), INFINITY, tl.float64)
        if met == 0:
            room = budget - fixed
            helps = (room > 0) & (room < INFINITY)
            hopeless = tl.where(helps, hopeless, 1)
            everything, largest = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
            over = tl.where((over >= 0) & (over < INFINITY), over, 1e30)
            for start in range(0, blocks, TILE):
                block = start + tile
                a, b, c, d, e, f, g, h = candidates(
                    figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, unit, place, block,
                    block < blocks, between, over, blocks, key_room, value_room, USED, KEY_COUNT, COUNT, KEY_PLANE, VALUE_PLANE,
                )  # fmt: skip
                everything += sum_of(a + b + c + d)
                largest = tl.maximum(largest, tl.max(tl.maximum(tl.maximum(e, f), tl.maximum(g, h)), axis=0))
            # Contributions of blocks that are originals already are 0, so `everything` is all that there is to lower.
            need = everything - AIM * room
            low, high = largest * LOWEST, largest
            for _ in range(HALVINGS):
                middle = tl.sqrt(low) * tl.sqrt(high)
                gain = tl.zeros((), tl.float64)
                for start in range(0, blocks, TILE):
                    block = start + tile
                    a, b, c, d, e, f, g, h = candidates(
                        figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, unit, place, block,
                        block < blocks, between, over, blocks, key_room, value_room, USED, KEY_COUNT, COUNT, KEY_PLANE,
                        VALUE_PLANE,
                    )  # fmt: skip
                    gain += gained(e, a, middle) + gained(f, b, middle) + gained(g, c, middle) + gained(h, d, middle)
                low, high = tl.where(gain >= need, middle, low), tl.where(gain >= need, high, middle)
            threshold = low
        tl.store(wanted + place, threshold)
    return hopeless


@triton.jit
def raised(
    figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, facts, wanted, unit, start, blocks, key_room,
    value_room, USED: tl.constexpr, KEY_COUNT: tl.constexpr, COUNT: tl.constexpr, KEY_PLANE: tl.constexpr,
    VALUE_PLANE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The levels of keys and values of blocks start.. that the rows' thresholds make of those that they have."""
    block = start + tl.arange(0, TILE)
    there, between = block < blocks, tl.num_programs(0).to(tl.int64) * USED * blocks
    here = unit.to(tl.int64) * blocks + block
    keys, values = tl.load(key_level + here, mask=there, other=2), tl.load(value_level + here, mask=there, other=2)
    for row in range(USED):
        place = (unit * USED + row).to(tl.int64)
        threshold = tl.load(wanted + place)
        if threshold < INFINITY:
            over = tl.load(facts + place * FACTS + OVER)
            over = tl.where((over >= 0) & (over < INFINITY), over, 1e30)
            a, b, c, d, e, f, g, h = candidates(
                figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, unit, place, block, there, between,
                over, blocks, key_room, value_room, USED, KEY_COUNT, COUNT, KEY_PLANE, VALUE_PLANE,
            )  # fmt: skip
            keys = tl.where((e >= threshold) & (a > 0) & (keys < 1), 1, keys)
            keys = tl.where((f >= threshold) & (b > 0), 2, keys)
            values = tl.where((g >= threshold) & (c > 0) & (values < 1), 1, values)
            values = tl.where((h >= threshold) & (d > 0), 2, values)
    return keys, values


@triton.jit(do_not_specialize=CHANGING)
def climb(
    query, key_codes, key_plane, key_scale, key_offset, key_numbers, value_codes, value_plane, value_scale, value_offset,
    value_numbers, slabs, value_pages, page_sums, page_room, key_multipliers, value_multipliers, like,
    block_bias, block_bias_batch, block_bias_head, block_bias_row, sink,
    maximum, sums, output, l1, l2, errors, slips, squares, key_level, value_level, hot_level, exact_norms, tops, mixed, middle,
    result, facts, figures, partials, unit_norms, wanted, chosen, dense, counts, trouble, settings, prices, bias_size,
    blocks, segments, chunks, key_room, value_room, key_plane_room, value_plane_room, rows_per_slab, heads, tokens, chain,
    max_rounds, scaling, softcap,
    CERTIFIED: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SUNK: tl.constexpr,
    USED: tl.constexpr, ROWS: tl.constexpr, FEW_ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr, TOKENS: tl.constexpr, FOUR: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, KEY_COUNT: tl.constexpr, COUNT: tl.constexpr, KEY_PLANE: tl.constexpr, VALUE_PLANE: tl.constexpr,
    ITEM: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Grid (units,). Bounds from the chunks; where a row is above its budget, promotions, at most `max_rounds` times.

    Args, beside those of the kernels before: slabs: int64, addresses of slabs of pages, `rows_per_slab` blocks each, values
        `value_pages` bytes behind; page_sums: int64 `[U, page_room, 2]`; prices: float64 `[5]`, see `candidates`, and the share
        of its originals that a head may move; wanted: float64 `[U, USED]` and chosen: int32 `[U, blocks]`, scratch.
        dense: int32 `[U]`, 1 where some row is not within its budget. counts: float64 `[U, COUNTS]`. trouble: int32
        `[TROUBLE]`.
    """
    unit = tl.program_id(0)
    tile = tl.arange(0, TILE)
    failing = tl.zeros((), tl.int32)
    for row in range(USED):
        met = total_of(facts, partials, settings, unit, row, chunks, USED, FEW)
        fact = facts + (unit * USED + row).to(tl.int64) * FACTS
        tl.store(fact + MET, met.to(tl.float64))
        tl.store(fact + CANDIDATE, tl.load(fact + BOUND))
        failing += 1 - met
    rounds, hopeless = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    key_raised, value_raised = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    key_pages, value_pages_read = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    key_planes, value_planes = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    going = tl.where(CERTIFIED & (failing > 0), 1, 0)
    while going > 0:
        tl.debug_barrier()
        hopeless = thresholds(
            figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, facts, settings, wanted, unit, blocks,
            key_room, value_room, USED, KEY_COUNT, COUNT, KEY_PLANE, VALUE_PLANE, TILE,
        )  # fmt: skip
        tl.debug_barrier()
        # A head whose promotion would move more than a fair share of its originals is cheaper dense.
        moved = tl.zeros((), tl.float64)
        for start in range(0, blocks, TILE):
            there, here = start + tile < blocks, unit.to(tl.int64) * blocks + start + tile
            keys, values = raised(
                figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, facts, wanted, unit, start, blocks,
                key_room, value_room, USED, KEY_COUNT, COUNT, KEY_PLANE, VALUE_PLANE, TILE,
            )  # fmt: skip
            hot = tl.load(hot_level + here, mask=there, other=2) == 2
            moved += sum_of(tl.where((keys == 2) & ~hot, tl.load(prices + 1), 0.0))
            moved += sum_of(tl.where((values == 2) & ~hot, tl.load(prices + 3), 0.0))
        if moved > tl.load(prices + 4) * blocks * (tl.load(prices + 1) + tl.load(prices + 3)):
            hopeless = tl.full((), 1, tl.int32)
        count = tl.zeros((), tl.int32)
        if hopeless == 0:
            for start in range(0, blocks, TILE):
                there, here = start + tile < blocks, unit.to(tl.int64) * blocks + start + tile
                keys, values = raised(
                    figures, key_numbers, value_numbers, key_level, value_level, l1, l2, prices, facts, wanted, unit, start,
                    blocks, key_room, value_room, USED, KEY_COUNT, COUNT, KEY_PLANE, VALUE_PLANE, TILE,
                )  # fmt: skip
                old_keys, old_values = (
                    tl.load(key_level + here, mask=there, other=2),
                    tl.load(value_level + here, mask=there, other=2),
                )
                changed = there & ((keys > old_keys) | (values > old_values))
                place = count + tl.cumsum(changed.to(tl.int32), axis=0) - 1
                tl.store(chosen + unit.to(tl.int64) * blocks + place, start + tile, mask=changed)
                tl.store(key_level + here, keys, mask=there)
                tl.store(value_level + here, values, mask=there)
                key_raised += tl.sum((changed & (keys > 0) & (old_keys == 0)).to(tl.int32), axis=0)
                value_raised += tl.sum((changed & (values > 0) & (old_values == 0)).to(tl.int32), axis=0)
                key_pages += tl.sum((changed & (keys == 2)).to(tl.int32), axis=0)
                value_pages_read += tl.sum((changed & (values == 2)).to(tl.int32), axis=0)
                key_planes += tl.sum((changed & (keys == 1)).to(tl.int32), axis=0)
                value_planes += tl.sum((changed & (values == 1)).to(tl.int32), axis=0)
                count += tl.sum(changed.to(tl.int32), axis=0)
        if count > 0:
            tl.debug_barrier()
            wide = read_query(query, unit, scaling, USED, CHANNELS, ROWS, WIDE)
            bias = block_bias + (unit // heads).to(tl.int64) * block_bias_batch + (unit % heads).to(tl.int64) * block_bias_head
            for i in range(count):
                block = tl.load(chosen + unit.to(tl.int64) * blocks + i)
                here = unit.to(tl.int64) * blocks + block
                keys = load_keys(
                    key_codes, key_plane, key_scale, key_offset, slabs, rows_per_slab, tl.num_programs(0), page_sums,
                    key_multipliers, trouble, like, tl.load(key_level + here), unit, block, page_room, key_room, key_plane_room,
                    CHANNELS, WIDE, TOKENS, KEY_PLANE, ITEM,
                )  # fmt: skip
                values = load_values(
                    value_codes, value_plane, value_scale, value_offset, slabs, rows_per_slab, tl.num_programs(0), value_pages,
                    page_sums, value_multipliers, trouble, like, tl.load(value_level + here), unit, block, page_room,
                    value_room,
                    value_plane_room, WIDTH, WIDE_VALUES, TOKENS, FOUR, GROUPS, GROUP, VALUE_PLANE, ITEM,
                )  # fmt: skip
                steps = read_steps(value_scale, unit.to(tl.int64) * value_room + block, GROUPS, TOKENS)
                float_segment(
                    wide, keys, values, steps, tl.sum(values * values, axis=1), softcap, bias + block * TOKENS, block_bias_row,
                    TOKENS, maximum, sums, output, unit, block, segments, SOFTCAP, BIAS, USED, WIDTH, ROWS, WIDE_VALUES, TOKENS,
                )  # fmt: skip
                as_exact(errors, slips, squares, values, unit, block, blocks, USED, FEW_ROWS)
            tl.debug_barrier()
            for chunk in range(chunks):
                mix(maximum, output, tops, mixed, unit, chunk, segments, chunks, USED, WIDTH, WIDE_VALUES, CHUNK)
            tl.debug_barrier()
            for row in range(USED):
                merge(
                    query, maximum, sums, errors, slips, key_numbers, value_numbers, key_level, value_level, exact_norms, tops,
                    mixed, sink, middle, result, facts, figures, unit_norms, settings, bias_size, unit, row, blocks, segments,
                    chunks,
                    key_room, value_room, tokens, chain, SOFTCAP, SUNK, USED, CHANNELS, WIDE, WIDTH, WIDE_VALUES, KEY_COUNT,
                    COUNT, TILE, FEW,
                )  # fmt: skip
            tl.debug_barrier()
            for chunk in range(chunks):
                bound(
                    maximum, sums, output, l1, l2, slips, squares, key_numbers, value_numbers, key_level, value_level,
                    middle, facts, figures, partials, settings, unit, chunk, blocks, segments, chunks, key_room, value_room,
                    USED, CHANNELS, WIDTH, WIDE_VALUES, TOKENS, KEY_COUNT, COUNT, CHUNK,
                )  # fmt: skip
            tl.debug_barrier()
            failing = tl.zeros((), tl.int32)
            for row in range(USED):
                met = total_of(facts, partials, settings, unit, row, chunks, USED, FEW)
                fact = facts + (unit * USED + row).to(tl.int64) * FACTS
                tl.store(fact + MET, tl.load(fact + MET) * met.to(tl.float64))
                failing += 1 - met
        rounds += 1
        going = tl.where((failing > 0) & (count > 0) & (rounds < max_rounds), 1, 0)
    left = tl.where(CERTIFIED & (failing > 0), 1, 0)
    tl.store(dense + unit, left)
    to = counts + unit * COUNTS
    tl.store(to, key_raised)
    tl.store(to + 1, value_raised)
    tl.store(to + 2, key_pages)
    tl.store(to + 3, value_pages_read)
    tl.store(to + 4, key_planes)
    tl.store(to + 5, value_planes)
    tl.store(to + 6, rounds)
    tl.store(to + 7, left)
