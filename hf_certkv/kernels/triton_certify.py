"""The certificate on a GPU: `reference.combine` and `bounds.total` by chunks of segments, in float64.

Three stages, each a function of one unit and a kernel over all: `mix` (a chunk's outputs by their weights), `merge` (a row:
output, norm, rounding, value error), `bound` (a chunk: key errors). What is left, adding up the chunks, is `total_of` in
triton_climb.py. Every line has its inequality in `hf_certkv/bounds.py`; float64 sums are in any order, which `OUTWARD` covers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import bounds
from ..codecs import EPSILON, ETA, KAPPA, KEY_SPECTRAL, PER_LEVEL, VALUE_RMS, VALUE_SPECTRAL
from .triton_common import FLOOR, INFINITY, OUTWARD, TINY, UNIT, exp64, expm1_64, gamma, least, most, rounded

# Of a row, float64: what `DeviceStep.row_figure` names, and what the stages hand on.
FACTS: Any = tl.constexpr(16)
BOUND, NORM, EXPECTED, FIXED, KEY_TOTAL, VALUE_TOTAL, MET, CANDIDATE = (tl.constexpr(i) for i in range(8))
NORMALISER, TOP, INFLATE, ROUNDING, EXACT_MASS, VALUE_NORM, QUERY_NORM = (tl.constexpr(i) for i in range(8, 15))
OVER: Any = tl.constexpr(15)  # what key parts are multiplied by
# What a call is certified with, float64: a kernel's own arguments would be rounded to float32.
SETTINGS: Any = tl.constexpr(7)
SCALING, SOFTCAP_AT, PER_STEP, RELATIVE, ABSOLUTE, RTOL, ATOL = (tl.constexpr(i) for i in range(7))
# Of a row and block, float64: masses, shifts, key parts (before the division by the least normaliser), value parts, mean steps.
FIGURES: Any = tl.constexpr(5)
# Of a row and chunk, float64: key parts, masses that the worst shifts leave, those that count as approximate, the largest
# shift,
# masses of blocks with exact keys.
PARTIALS: Any = tl.constexpr(5)

_PER_LEVEL: Any = tl.constexpr(PER_LEVEL)
_KAPPA, _EPSILON, _KEY_SPECTRAL = tl.constexpr(KAPPA), tl.constexpr(EPSILON), tl.constexpr(KEY_SPECTRAL)
_ETA, _VALUE_SPECTRAL, _VALUE_RMS = tl.constexpr(ETA), tl.constexpr(VALUE_SPECTRAL), tl.constexpr(VALUE_RMS)
EXP_ERROR, TANH_ERROR, SPAN = tl.constexpr(bounds.EXP_ERROR), tl.constexpr(bounds.TANH_ERROR), tl.constexpr(bounds.SCORE_SPAN)
OVERFLOW, STEP_FLOOR = tl.constexpr(bounds.OVERFLOW), tl.constexpr(bounds.STEP_FLOOR)
RESCALINGS: Any = tl.constexpr(1)
LARGEST_SCALE: Any = tl.constexpr(65504.0)
KNOWN: Any = tl.constexpr(1e300)  # a moment beyond is taken for infinite, as is NaN


@triton.jit
def sum_of(x):
    """All of a vector, NaN if one is."""
    return tl.sum(x, axis=0)


@triton.jit
def max_of(x):
    """The largest of a vector of float64, NaN if one is: a GPU's own maximum passes NaN over."""
    odd = tl.sum((x != x).to(tl.int32), axis=0)
    largest = tl.max(tl.where(x == x, x, -INFINITY), axis=0)
    return tl.where(odd > 0, INFINITY - INFINITY, largest)


@triton.jit
def factor_of(maximum, top):
    """exp(maximum - top) of a segment's maximum: 0 where it is masked throughout, NaN where it is NaN."""
    return tl.where(maximum == -INFINITY, 0.0, exp64(tl.where(maximum == -INFINITY, 0.0, maximum - top)))


@triton.jit
def mix(
    maximum, output, tops, mixed, unit, chunk, segments, chunks,
    USED: tl.constexpr, WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The outputs of a chunk's segments, weighed relative to the chunk's largest score: float64.

    Args: tops: `[U, USED, chunks]`; mixed: `[U, chunks, USED, WIDTH]`.
    """
    segment, channel = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, WIDE_VALUES)
    there, inside = segment < segments, channel < WIDTH
    for row in range(USED):
        place = (unit * USED + row).to(tl.int64)
        found = tl.load(maximum + place * segments + segment, mask=there, other=-INFINITY).to(tl.float64)
        top = max_of(found)
        factor = factor_of(found, top)
        from_ = output + ((unit.to(tl.int64) * segments + segment)[:, None] * USED + row) * WIDTH + channel[None, :]
        parts = tl.load(from_, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float64)
        tl.store(tops + place * chunks + chunk, top)
        to = mixed + ((unit.to(tl.int64) * chunks + chunk) * USED + row) * WIDTH + channel
        tl.store(to, tl.sum(parts * factor[:, None], axis=0), mask=inside)


@triton.jit
def slack_of(
    query_norm, key_norm, float_norm, coded, value_norm, bias_size, softcap, scaling, tokens, chain,
    SOFTCAP: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`score_rounding`, then `weight_slack` and `rounding_error`: lambda and E_fp."""
    size = scaling * query_norm * key_norm
    chain_of_score: tl.constexpr = (CHANNELS + 4.0) * UNIT / (1.0 - (CHANNELS + 4.0) * UNIT)  # gamma of d + 4
    error = chain_of_score * scaling * query_norm * float_norm
    error = most(error, coded) + CHANNELS * 2.0**-100 * (1 + scaling)
    scale = tl.where(scaling < TINY, query_norm * key_norm, 0.0)
    root = CHANNELS**0.5
    error += 2 * TINY * (CHANNELS + scale + root * ((1 + scaling) * key_norm + scaling * query_norm))
    fits = (scaling * query_norm < OVERFLOW) & (scaling < OVERFLOW)
    error = tl.where(fits, error, INFINITY)
    if SOFTCAP:
        gamma_4: tl.constexpr = 4.0 * UNIT / (1.0 - 4.0 * UNIT)
        error += tl.abs(softcap) * TANH_ERROR + gamma_4 * size
    error = (error + 2 * UNIT * (size + bias_size) * 1.01) * OUTWARD
    slack = error + UNIT * SPAN + (RESCALINGS + 1) * EXP_ERROR * 1.01 + 2 * RESCALINGS * UNIT
    flushed = 4 * tokens * TINY * (value_norm + WIDTH**0.5)
    grown = expm1_64(slack)
    half = tl.where(slack > 80.0, 1.0, grown / (grown + 2)) * OUTWARD  # tanh(slack / 2)
    moved = 2 * value_norm * half + gamma(2 * (chain + RESCALINGS + 1) + 1) * value_norm
    return slack, (moved + flushed) * OUTWARD


@triton.jit
def merge(
    query, maximum, sums, errors, slips, key_numbers, value_numbers, key_level, value_level, exact_norms, tops, mixed, sink,
    middle, result, facts, figures, unit_norms, settings, bias_size, unit, row, blocks, segments, chunks, key_room,
    value_room, tokens,
    chain, SOFTCAP: tl.constexpr, SUNK: tl.constexpr, USED: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr, KEY_COUNT: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
    FEW: tl.constexpr,
):  # fmt: skip
    """A row's output, its norm, lambda and E_fp, and the value errors of its blocks; to `middle`, `result`, `facts`, `figures`.

    Args: middle: float32 `[U, USED, WIDTH]`, the output before it is rounded to the model's type, which `result` has.
        figures: float64 `[FIGURES, U, USED, blocks]`; unit_norms: float64 `[2, U]`, the largest norms of keys and values;
        sink: float32 `[U, USED]`; settings: see SETTINGS; bias_size: float64, one
        number; TILE, FEW: blocks and chunks at a time.
    """
    scaling, softcap, per_step = tl.load(settings + SCALING), tl.load(settings + SOFTCAP_AT), tl.load(settings + PER_STEP)
    relative, absolute = tl.load(settings + RELATIVE), tl.load(settings + ABSOLUTE)
    place, mine = (unit * USED + row).to(tl.int64), tl.arange(0, TILE)
    channel, inside = tl.arange(0, WIDE_VALUES), tl.arange(0, WIDE_VALUES) < WIDTH
    # The largest score of all.
    few = tl.arange(0, FEW)
    top = tl.full((), -INFINITY, tl.float64)
    for start in range(0, chunks, FEW):
        found = tl.load(tops + place * chunks + start + few, mask=start + few < chunks, other=-INFINITY)
        top = most(top, max_of(found))
    share = tl.zeros((), tl.float64)
    if SUNK:
        logit = tl.load(sink + place).to(tl.float64)
        top = most(top, logit)
        share = factor_of(logit, top)
    added = tl.zeros((WIDE_VALUES,), tl.float64)
    for start in range(0, chunks, FEW):
        there = start + few < chunks
        factor = factor_of(tl.load(tops + place * chunks + start + few, mask=there, other=-INFINITY), top)
        from_ = mixed + ((unit.to(tl.int64) * chunks + start + few)[:, None] * USED + row) * WIDTH + channel[None, :]
        parts = tl.load(from_, mask=there[:, None] & inside[None, :], other=0.0)
        added += tl.sum(parts * factor[:, None], axis=0)
    # What all weigh together, and exact tokens by themselves.
    normaliser, exact_mass = share, share
    for start in range(0, segments, TILE):
        there = start + mine < segments
        factor = factor_of(tl.load(maximum + place * segments + start + mine, mask=there, other=-INFINITY).to(tl.float64), top)
        weight = factor * tl.load(sums + (place * segments + start + mine) * 8 + 4, mask=there, other=0.0).to(tl.float64)
        normaliser += sum_of(weight)
        exact_mass += sum_of(tl.where(start + mine >= blocks, weight, 0.0))
    made = (added / normaliser).to(tl.float32)
    tl.store(middle + place * WIDTH + channel, made, mask=inside)
    shown = rounded(made, result.dtype.element_ty)
    tl.store(result + place * WIDTH + channel, shown, mask=inside)
    shown = tl.where(inside, shown.to(tl.float64), 0.0)
    norm = tl.sqrt(sum_of(shown * shown))
    # The largest norms, of everything held and of what is multiplied in float32.
    key_norm, value_norm, float_norm = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    coded = tl.zeros((), tl.float64)
    for start in range(0, segments - blocks, FEW):
        there = start + few < segments - blocks
        from_ = exact_norms + (unit.to(tl.int64) * (segments - blocks) + start + few) * 2
        key_norm = most(key_norm, max_of(tl.load(from_, mask=there, other=0.0)))
        value_norm = most(value_norm, max_of(tl.load(from_ + 1, mask=there, other=0.0)))
    float_norm = key_norm
    for start in range(0, blocks, TILE):
        block = start + mine
        there = block < blocks
        levels = unit.to(tl.int64) * blocks + block
        raised = tl.load(key_level + levels, mask=there, other=0) + tl.load(value_level + levels, mask=there, other=0) > 0
        keys = tl.load(
            key_numbers + (unit.to(tl.int64) * key_room + block) * KEY_COUNT + KEY_COUNT - 1, mask=there, other=0.0
        ).to(tl.float64)
        values = tl.load(
            value_numbers + (unit.to(tl.int64) * value_room + block) * COUNT + COUNT - 1, mask=there, other=0.0
        ).to(tl.float64)
        key_norm, value_norm = most(key_norm, max_of(keys)), most(value_norm, max_of(values))
        float_norm = most(float_norm, max_of(tl.where(raised, keys, 0.0)))
        coded = most(coded, max_of(tl.load(errors + place * blocks + block, mask=there, other=0.0).to(tl.float64)))
    wide = tl.arange(0, WIDE)
    raw = tl.load(query + place * CHANNELS + wide, mask=wide < CHANNELS, other=0.0).to(tl.float64)
    query_norm = tl.sqrt(sum_of(raw * raw))
    slack, rounding = slack_of(
        query_norm, key_norm, float_norm, coded, value_norm, tl.load(bias_size), softcap, tl.abs(scaling),
        tokens.to(tl.float64), chain.to(tl.float64), SOFTCAP, CHANNELS, WIDTH,
    )  # fmt: skip
    grown = expm1_64(2 * slack) + 1.0
    inflate = least(grown * (1 + gamma(2 * chain.to(tl.float64) + 8)) * OUTWARD, 1e300)
    # Value errors.
    value_total, expected, slip = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    between = tl.num_programs(0).to(tl.int64) * USED * blocks
    for start in range(0, blocks, TILE):
        block = start + mine
        there = block < blocks
        found = tl.load(maximum + place * segments + block, mask=there, other=-INFINITY).to(tl.float64)
        weight = factor_of(found, top) / normaliser
        from_ = sums + (place * segments + block) * 8
        steps = tl.load(from_, mask=there, other=0.0).to(tl.float64)
        square_steps = tl.load(from_ + 1, mask=there, other=0.0).to(tl.float64)
        total = tl.load(from_ + 4, mask=there, other=0.0).to(tl.float64)
        square = tl.load(from_ + 5, mask=there, other=0.0).to(tl.float64)
        level = tl.load(value_level + unit.to(tl.int64) * blocks + block, mask=there, other=0)
        numbers = value_numbers + (unit.to(tl.int64) * value_room + block) * COUNT + tl.where(level == 1, _PER_LEVEL, 0)
        coarse = there & (level < 2)
        eta = tl.load(numbers + _ETA, mask=coarse, other=0.0).to(tl.float64)
        spectral = tl.load(numbers + _VALUE_SPECTRAL, mask=coarse, other=0.0).to(tl.float64)
        rms = tl.load(numbers + _VALUE_RMS, mask=coarse, other=0.0).to(tl.float64)
        mass, root = weight * total, weight * tl.sqrt(square)
        step, root_step = steps / most(total, TINY), tl.sqrt(square_steps / most(square, TINY))
        guess = root * root_step * rms
        mass_up, root_up = most(mass * inflate, FLOOR), most(root * inflate, FLOOR)
        part = least(mass_up * (step + STEP_FLOOR) * eta, root_up * (root_step + STEP_FLOOR) * spectral) * OUTWARD
        part = tl.where(there & (found != -INFINITY), part, 0.0)
        to = figures + place * blocks + block
        tl.store(to, mass, mask=there)
        tl.store(to + 3 * between, part, mask=there)
        tl.store(to + 4 * between, step, mask=there)
        off = tl.load(slips + unit.to(tl.int64) * blocks + block, mask=there, other=0.0).to(tl.float64)
        value_total += sum_of(part)
        expected += sum_of(guess * guess)
        slip += sum_of(weight * (off + per_step * steps))
    value_total *= OUTWARD
    rounding += slip * inflate * OUTWARD
    fixed = (relative * norm + WIDTH**0.5 * absolute) * OUTWARD + rounding
    to = facts + place * FACTS
    tl.store(to + NORM, norm)
    tl.store(to + EXPECTED, tl.sqrt(expected))
    tl.store(to + FIXED, fixed)
    tl.store(to + VALUE_TOTAL, value_total)
    tl.store(to + NORMALISER, normaliser)
    tl.store(to + TOP, top)
    tl.store(to + INFLATE, inflate)
    tl.store(to + ROUNDING, rounding)
    tl.store(to + EXACT_MASS, exact_mass / normaliser)
    tl.store(to + VALUE_NORM, value_norm)
    tl.store(to + QUERY_NORM, query_norm)
    if row == 0:
        tl.store(unit_norms + unit, key_norm)
        tl.store(unit_norms + tl.num_programs(0) + unit, value_norm)


@triton.jit
def radii_of(
    norms, square_norms, steps, square_steps, total, square, cube, fourth, squares, inner, size, eta, reach, away,
    TERMS: tl.constexpr,
):  # fmt: skip
    """`mean_radius` of blocks by weights; by squared weights the better of two bounds (`bounds.square_moment_bound`)."""
    over, over_square = most(total, TINY), most(square, TINY)
    gamma_8: tl.constexpr = (TERMS + 8.0) * UNIT / (1.0 - (TERMS + 8.0) * UNIT)
    gamma_16: tl.constexpr = (TERMS + 16.0) * UNIT / (1.0 - (TERMS + 16.0) * UNIT)
    gamma_twice: tl.constexpr = 2.0 * TERMS * UNIT / (1.0 - 2.0 * TERMS * UNIT)
    off = 1.01 * gamma_8 * reach * reach + 8 * TINY * TERMS * TERMS * (1 + reach)
    read = 2 * UNIT * reach + TINY * TERMS
    moment = (norms - 2 * inner + size * total) / over
    known = tl.abs(moment) <= KNOWN
    mean_step = steps / over + STEP_FLOOR
    first = (tl.sqrt(most(moment, 0.0) + off) + read + eta * mean_step + away) * OUTWARD
    near = tl.where(known & (first < reach), first, reach)
    around = read + eta * (tl.sqrt(square_steps / over_square) + STEP_FLOOR) + away
    # No weight is above 1.
    more: tl.constexpr = 1.0 + 4.0 * gamma_8
    held = (most(moment, 0.0) + off) * (total / over_square * more)
    # Squared weights as a multiple of the weights, and the rest by Cauchy-Schwarz.
    fit = cube / over_square
    apart = most(fourth - cube * fit, 0.0) + 4.04 * gamma_16 * fourth + 1e-30
    lengths = squares * (1.0 + 4.0 * gamma_twice) + TERMS * TERMS * TINY
    rest = 2 * tl.sqrt(apart * size * lengths) * OUTWARD
    fitted = (square_norms - 2 * fit * inner + size * square + rest) / over_square
    fitted = most(fitted, 0.0) + off * (1 + fit * total / over_square * more)
    held = tl.where((fitted <= KNOWN) & (fitted < held), fitted, held)
    second = (tl.sqrt(held) + around) * OUTWARD
    square_near = tl.where(known & (second < reach), second, reach)
    return near, square_near


@triton.jit
def bound(
    maximum, sums, output, l1, l2, slips, squares, key_numbers, value_numbers, key_level, value_level, middle, facts,
    figures, partials, settings, unit, chunk, blocks, segments, chunks, key_room, value_room,
    USED: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr,
    TOKENS: tl.constexpr, KEY_COUNT: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`key_error` of a chunk's blocks, before the division by the least normaliser: to `figures` and `partials`.

    Args: partials: float64 `[U, USED, chunks, PARTIALS]`.
    """
    scaling, per_step = tl.load(settings + SCALING), tl.load(settings + PER_STEP)
    block, channel = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, WIDE_VALUES)
    there, inside = block < blocks, channel < WIDTH
    here = unit.to(tl.int64) * blocks + block
    levels = tl.load(key_level + here, mask=there, other=0)
    value_levels = tl.load(value_level + here, mask=there, other=0)
    keys = key_numbers + (unit.to(tl.int64) * key_room + block) * KEY_COUNT + tl.where(levels == 1, _PER_LEVEL, 0)
    values = value_numbers + (unit.to(tl.int64) * value_room + block) * COUNT
    kappa = tl.load(keys + _KAPPA, mask=there, other=0.0).to(tl.float64)
    epsilon = tl.load(keys + _EPSILON, mask=there, other=0.0).to(tl.float64)
    sigma = tl.load(keys + _KEY_SPECTRAL, mask=there, other=0.0).to(tl.float64)
    eta = tl.load(values + tl.where(value_levels == 1, _PER_LEVEL, 0) + _ETA, mask=there & (value_levels < 2), other=0.0).to(
        tl.float64
    )
    radius = tl.load(values + COUNT - 1, mask=there, other=0.0).to(tl.float64)
    slip_of = tl.load(slips + here, mask=there, other=0.0).to(tl.float64)
    lengths = tl.load(squares + here, mask=there, other=0.0).to(tl.float64)
    between = tl.num_programs(0).to(tl.int64) * USED * blocks
    for row in range(USED):
        place = (unit * USED + row).to(tl.int64)
        fact = facts + place * FACTS
        inflate, rounding = tl.load(fact + INFLATE), tl.load(fact + ROUNDING)
        value_total = tl.load(fact + VALUE_TOTAL)
        centre = tl.load(fact + NORM) + value_total + tl.load(fact + FIXED)
        away = value_total + rounding
        made = tl.load(middle + place * WIDTH + channel, mask=inside, other=0.0).to(tl.float64)
        size = sum_of(made * made)
        from_ = output + ((unit.to(tl.int64) * segments + block)[:, None] * USED + row) * WIDTH + channel[None, :]
        parts = tl.load(from_, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float64)
        inner = tl.sum(parts * made[None, :], axis=1)
        # sum |q_c| S_c and ||q * S||_2 times the softmax scale, from what the pass made of the scaled query. Products, and
        # their
        # squares, lose at most 2^-126 to underflow; so does a channel of the query, scaled and before, and the scale itself.
        lean = tl.abs(scaling)
        up: tl.constexpr = 1.0 + (CHANNELS + 8) * 2.0**-23
        hidden = 2 * TINY * LARGEST_SCALE * (2 + lean + tl.where(lean < TINY, tl.load(fact + QUERY_NORM), 0.0))
        sum_l1 = tl.load(l1 + place * blocks + block, mask=there, other=0.0).to(tl.float64)
        sum_l2 = tl.load(l2 + place * blocks + block, mask=there, other=0.0).to(tl.float64)
        query_l1 = sum_l1 * up + CHANNELS * hidden
        query_l2 = (tl.sqrt(sum_l2) + CHANNELS**0.5 * 2.0**-60) * up + CHANNELS**0.5 * hidden
        shift = most(least(kappa * query_l1, epsilon * query_l2) * OUTWARD, 0.0)
        found = tl.load(maximum + place * segments + block, mask=there, other=-INFINITY).to(tl.float64)
        weight = factor_of(found, tl.load(fact + TOP)) / tl.load(fact + NORMALISER)
        sum_at = sums + (place * segments + block) * 8
        steps = tl.load(sum_at, mask=there, other=0.0).to(tl.float64)
        square_steps = tl.load(sum_at + 1, mask=there, other=0.0).to(tl.float64)
        norms = tl.load(sum_at + 2, mask=there, other=0.0).to(tl.float64)
        square_norms = tl.load(sum_at + 3, mask=there, other=0.0).to(tl.float64)
        total = tl.load(sum_at + 4, mask=there, other=0.0).to(tl.float64)
        square = tl.load(sum_at + 5, mask=there, other=0.0).to(tl.float64)
        cube = tl.load(sum_at + 6, mask=there, other=0.0).to(tl.float64)
        fourth = tl.load(sum_at + 7, mask=there, other=0.0).to(tl.float64)
        # What integers round of a block's values moves its product with the output, at most so far.
        inner -= 1.01 * tl.sqrt(size) * (slip_of + per_step * steps)
        near, square_near = radii_of(
            norms, square_norms, steps, square_steps, total, square, cube, fourth, lengths, inner, size, eta, radius + centre,
            away, TOKENS + WIDTH,
        )  # fmt: skip
        mass = weight * total
        growth = expm1_64(shift)
        rise = growth * OUTWARD
        slope = most(tl.where(shift > 0, rise / most(shift, 1e-300), 1.0) * OUTWARD, 1 + shift / 2)
        mass_up, root_up = most(mass * inflate, FLOOR), most(weight * tl.sqrt(square) * inflate, FLOOR)
        spread = sigma * query_l2 * OUTWARD
        part = least(mass_up * near * rise, root_up * square_near * spread * slope) * OUTWARD
        active = there & (levels < 2) & (found != -INFINITY)
        part, shift = tl.where(active, part, 0.0), tl.where(active, shift, 0.0)
        to = figures + place * blocks + block
        tl.store(to + between, shift, mask=there)
        tl.store(to + 2 * between, part, mask=there)
        to = partials + (place * chunks + chunk) * PARTIALS
        tl.store(to, sum_of(part))
        tl.store(to + 1, sum_of(tl.where(active, mass / (1 + growth), 0.0)))
        tl.store(to + 2, sum_of(tl.where(active, mass_up, 0.0)))
        tl.store(to + 3, max_of(shift))
        tl.store(to + 4, sum_of(tl.where(active | ~there, 0.0, mass)))
