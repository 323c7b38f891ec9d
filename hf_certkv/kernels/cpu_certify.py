"""The certificate of the rows of one KV head, in numba: `reference.combine` and `bounds.total` for one row at a time.

Every line here has its inequality in `hf_certkv/bounds.py`, and is tested against it. Numbers are float64 unless they are
stored otherwise; whatever is not a number stays so: `least` and `most` pass NaN on, as torch's do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .. import bounds
from ..codecs import EPSILON, ETA, KAPPA, KEY_SPECTRAL, PER_LEVEL, VALUE_RMS, VALUE_SPECTRAL
from . import micro
from .compiling import part
from .cpu_pass import BFLOAT16, FLOAT32, Task
from .reference import RESCALINGS

UNIT, OUTWARD, TINY, FLOOR = bounds.UNIT_ROUNDOFF, bounds.OUTWARD, bounds.TINY, bounds.MASS_FLOOR
STEP_FLOOR, EXP_ERROR, TANH_ERROR = bounds.STEP_FLOOR, bounds.EXP_ERROR, bounds.TANH_ERROR
OVERFLOW, SPAN = bounds.OVERFLOW, bounds.SCORE_SPAN
DOWN = 1 - 2.0**-30  # as in `ladder.head_budget`
LARGEST_SCALE = 65504.0
# A segment's eight sums, as in `Task.sums`.
STEPS, SQUARE_STEPS, NORMS, SQUARE_NORMS, TOTAL, SQUARE, CUBE, FOURTH = range(8)


class Claim(NamedTuple):
    """What a certificate is made from, beside the pass, and what is made; arrays by addresses, float64 if nothing is said.

    Attributes:
        raw: float32 `[U, rows, channels]`, the query unscaled; top: float32 `[U, rows]`, its largest magnitude.
        key_numbers, value_numbers: float32, `key_count` or `value_count` a block, with room for `Task.room` blocks a unit.
        key_level, value_level: int64 `[U, N]`, or 0 where no block is raised.
        key_norm, value_norm: `[U]`, the largest norm of keys and values over exact tokens and blocks.
        sink: float32 `[U, used]`, sink logits, or 0.
        tokens, chain, relative, absolute: as `bounds.rounding_error` has them, and `bounds.OUTPUT_ROUNDOFF` of the type.
        result: `[U, used, width]` in the cache's type.
        row_figures: `[7, U, used]`: bound, norm, expected, fixed, key_total, value_total, and 1 where the budget is met.
        block_figures: `[5, U, used, N]`: mass, shift, key_parts, value_parts, mean step.
    """

    raw: int
    top: int
    key_numbers: int
    value_numbers: int
    key_count: int
    value_count: int
    key_level: int
    value_level: int
    key_norm: int
    value_norm: int
    sink: int
    units: int
    tokens: int
    chain: int
    result: int
    row_figures: int
    block_figures: int
    scaling: float
    bias_size: float
    rtol: float
    atol: float
    relative: float
    absolute: float


@part
def least(x: float, y: float) -> float:
    """The smaller of two numbers; NaN if one is."""
    return x if x < y or x != x else y


@part
def most(x: float, y: float) -> float:
    """The larger of two numbers; NaN if one is."""
    return x if x > y or x != x else y


@part
def gamma(n: float) -> float:
    """`bounds.gamma`."""
    product = n * UNIT
    return product / (1 - product) if product < 1 else math.inf


@part
def radii(task: Task, claim: Claim, unit: int, key_norm: float, value_norm: float) -> None:
    """Keep the largest norms of a unit's keys and values: those given, of its exact tokens, or of its blocks."""
    keys = micro.float32s(claim.key_numbers + 4 * unit * task.room * claim.key_count, task.blocks * claim.key_count)
    values = micro.float32s(claim.value_numbers + 4 * unit * task.room * claim.value_count, task.blocks * claim.value_count)
    for number in range(task.blocks):
        key_norm = most(key_norm, np.float64(keys[(number + 1) * claim.key_count - 1]))
        value_norm = most(value_norm, np.float64(values[(number + 1) * claim.value_count - 1]))
    micro.float64s(claim.key_norm, claim.units)[unit] = key_norm
    micro.float64s(claim.value_norm, claim.units)[unit] = value_norm


@part
def certify(task: Task, claim: Claim, unit: int) -> None:
    """Outputs and bounds of one unit's rows."""
    blocks, width, used = task.blocks, task.width, task.used
    segments, first = blocks + 1, unit * task.rows * (blocks + 1)
    key_norm = micro.float64s(claim.key_norm, claim.units)[unit]
    value_norm = micro.float64s(claim.value_norm, claim.units)[unit]
    top = micro.float32s(claim.top + 4 * unit * task.rows, task.rows)
    factors, output, shown = np.empty(segments), np.empty(width, np.float32), np.empty(width, np.float32)
    key_levels, value_levels = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
    if claim.key_level != 0:
        raised_keys = micro.int64s(claim.key_level + 8 * unit * blocks, blocks)
        raised_values = micro.int64s(claim.value_level + 8 * unit * blocks, blocks)
        for number in range(blocks):
            key_levels[number], value_levels[number] = raised_keys[number], raised_values[number]
    keys = micro.float32s(claim.key_numbers + 4 * unit * task.room * claim.key_count, blocks * claim.key_count)
    values = micro.float32s(claim.value_numbers + 4 * unit * task.room * claim.value_count, blocks * claim.value_count)
    squares = micro.float32s(task.squares + 4 * unit * blocks, blocks)
    rows = micro.float64s(claim.row_figures, 7 * claim.units * used)
    for row in range(used):
        start, mine = first + row * segments, unit * used + row
        maximum, sums = micro.float32s(task.maximum + 4 * start, segments), micro.float32s(task.sums + 32 * start, 8 * segments)
        raw = micro.float32s(claim.raw + 4 * (unit * task.rows + row) * task.channels, task.channels)
        slack, rounding = _slack(task, claim, raw, key_norm, value_norm)
        sink = micro.float32s(claim.sink, claim.units * used)[mine] if claim.sink != 0 else -np.float32(np.inf)
        first_output = unit * segments * task.rows * width + row * width
        normaliser, sink_mass = _combine(
            maximum, sums, factors, claim.sink != 0, sink, task.output, first_output, task.rows * width, output
        )
        norm = _round(output, shown, claim.result, mine * width, task.dtype)
        fixed = rounding + (claim.relative * norm + math.sqrt(width) * claim.absolute) * OUTWARD
        inflate = least(math.exp(2 * slack) * (1 + gamma(2 * claim.chain + 8)) * OUTWARD, 1e300)
        places = (unit * task.rows + row) * blocks
        query_l1, query_l2 = (
            micro.float32s(task.query_l1 + 4 * places, blocks),
            micro.float32s(task.query_l2 + 4 * places, blocks),
        )
        key_total, value_total, expected = _parts(
            maximum, sums, squares, factors, normaliser, sink_mass, inflate, norm, rounding, fixed, value_norm, query_l1,
            query_l2, np.float64(top[row]), key_levels, value_levels, keys, claim.key_count, values, claim.value_count, output,
            task.output, first_output, task.rows * width, abs(claim.scaling), task.channels, task.block + width,
            claim.block_figures + 8 * mine * blocks, claim.units * used * blocks,
        )  # fmt: skip
        bound = (key_total + value_total + fixed) * OUTWARD
        if not math.isfinite(norm):
            bound = math.inf
        budget = (claim.atol + claim.rtol * norm) * DOWN
        met = math.isfinite(bound) and bound >= 0 and bound <= budget
        apart = claim.units * used
        rows[mine], rows[apart + mine], rows[2 * apart + mine], rows[3 * apart + mine] = bound, norm, expected, fixed
        rows[4 * apart + mine], rows[5 * apart + mine], rows[6 * apart + mine] = key_total, value_total, 1.0 if met else 0.0


@part
def _slack(task: Task, claim: Claim, raw: np.ndarray, key: float, value: float) -> tuple[float, float]:
    """`score_rounding`, then `weight_slack` and `rounding_error`."""
    square = 0.0
    for c in range(len(raw)):
        square += np.float64(raw[c]) * np.float64(raw[c])
    query, scaling, channels = math.sqrt(square), abs(claim.scaling), len(raw)
    size = scaling * query * key
    error = gamma(channels + 4) * size
    scale = query * key if scaling < TINY else 0.0
    error += 2 * TINY * (channels + scale + math.sqrt(channels) * ((1 + scaling) * key + scaling * query))
    if not (scaling * query < OVERFLOW and scaling < OVERFLOW):
        error = math.inf
    if task.softcap != 0:
        error += abs(task.softcap) * TANH_ERROR + gamma(4) * size
    error = (error + 2 * UNIT * (size + claim.bias_size) * 1.01) * OUTWARD
    slack = error + UNIT * SPAN + (RESCALINGS + 1) * EXP_ERROR * 1.01 + 2 * RESCALINGS * UNIT
    flushed = 4 * claim.tokens * TINY * (value + math.sqrt(task.width))
    moved = 2 * value * math.tanh(slack / 2) + gamma(2 * (claim.chain + RESCALINGS + 1) + 1) * value
    return slack, (moved + flushed) * OUTWARD


@part
def _combine(
    maximum: np.ndarray, sums: np.ndarray, factors: np.ndarray, sunk: bool, sink: float, outputs: int, start: int, apart: int,
    output: np.ndarray,
) -> tuple[float, float]:  # fmt: skip
    """Softmax over the segments: each segment's factor, the float32 output; the normaliser, and the sink's share."""
    highest = maximum[0]
    for number in range(1, len(maximum)):
        highest = most(highest, maximum[number])
    if sunk:
        highest = most(highest, sink)
    normaliser, top = 0.0, np.float64(highest)
    for number in range(len(maximum)):
        # Of a masked segment's sums, which are 0, or NaN where scores were: then everything is to be NaN.
        factors[number] = math.exp(np.float64(maximum[number]) - top) if maximum[number] != -np.inf else 0.0
        normaliser += factors[number] * np.float64(sums[number * 8 + TOTAL])
    share = 0.0
    if sunk:
        share = math.exp(np.float64(sink) - top)
        normaliser += share
    for c in range(len(output)):
        output[c] = 0
    for number in range(len(maximum)):
        scale = np.float32(factors[number] / normaliser)
        added = micro.float32s(outputs + 4 * (start + number * apart), len(output))
        for c in range(len(output)):
            output[c] += scale * added[c]
    return normaliser, share / normaliser


@part
def _parts(
    maximum: np.ndarray, sums: np.ndarray, squares: np.ndarray, factors: np.ndarray, normaliser: float,
    sink_mass: float, inflate: float, norm: float, rounding: float, fixed: float, value_norm: float, query_l1: np.ndarray,
    query_l2: np.ndarray, top: float, key_levels: np.ndarray, value_levels: np.ndarray, keys: np.ndarray, key_count: int,
    values: np.ndarray, value_count: int, output: np.ndarray, outputs: int, start: int, apart: int, scaling: float,
    channels: int, terms: int, figures: int, between: int,
) -> tuple[float, float, float]:  # fmt: skip
    """`total`: what keys and values contribute, and the expected error; a block's share of each at `figures`."""
    blocks = len(maximum) - 1
    masses, shifts = micro.float64s(figures, blocks), micro.float64s(figures + 8 * between, blocks)
    key_parts, value_parts = micro.float64s(figures + 16 * between, blocks), micro.float64s(figures + 24 * between, blocks)
    steps = micro.float64s(figures + 32 * between, blocks)
    value_total, expected = 0.0, 0.0
    for number in range(blocks):
        place = number * 8
        total, square = np.float64(sums[place + TOTAL]), np.float64(sums[place + SQUARE])
        mass = factors[number] * total / normaliser
        root = factors[number] / normaliser * math.sqrt(square)
        step = np.float64(sums[place + STEPS]) / most(total, TINY)
        root_step = math.sqrt(np.float64(sums[place + SQUARE_STEPS]) / most(square, TINY))
        level, at = value_levels[number], number * value_count
        at += PER_LEVEL if level == 1 else 0
        part = 0.0
        if level < 2:
            guess = root * root_step * np.float64(values[at + VALUE_RMS])
            expected += guess * guess
            if maximum[number] > -np.inf:
                mass_up, root_up = most(mass * inflate, FLOOR), most(root * inflate, FLOOR)
                eta, spectral = np.float64(values[at + ETA]), np.float64(values[at + VALUE_SPECTRAL])
                part = least(mass_up * (step + STEP_FLOOR) * eta, root_up * (root_step + STEP_FLOOR) * spectral) * OUTWARD
        masses[number], steps[number], value_parts[number] = mass, step, part
        value_total += part
    value_total *= OUTWARD

    size = 0.0
    for c in range(len(output)):
        size += np.float64(output[c]) * np.float64(output[c])
    centre, away = norm + value_total + fixed, value_total + rounding
    # `score_weights`: products of sizes, at most 1, and steps lose at most 2^-126 to underflow, as do their squares; a channel
    # of the query that is subnormal may be flushed.
    up, root_channels = 1 + (channels + 8) * 2.0**-23, math.sqrt(channels)
    hidden = 2 * TINY * LARGEST_SCALE * (1 + top)
    exact = factors[blocks] * np.float64(sums[blocks * 8 + TOTAL]) / normaliser + sink_mass
    active_up, held, worst = 0.0, 0.0, 0.0
    for number in range(blocks):
        mass, level, part, shift = masses[number], key_levels[number], 0.0, 0.0
        if level == 2 or not maximum[number] > -np.inf:
            exact += mass
        else:
            at = number * key_count + (PER_LEVEL if level == 1 else 0)
            l1 = (np.float64(query_l1[number]) + channels * TINY) * up * top + channels * hidden
            l2 = (math.sqrt(np.float64(query_l2[number])) + root_channels * 2.0**-60) * up * top + root_channels * hidden
            shift = scaling * least(np.float64(keys[at + KAPPA]) * l1, np.float64(keys[at + EPSILON]) * l2) * OUTWARD
            shift_l2 = scaling * np.float64(keys[at + KEY_SPECTRAL]) * l2 * OUTWARD
            shift = most(shift, 0.0)
            added = outputs + 4 * (start + number * apart)
            inner = np.float64(micro.dot(output.ctypes.data, 0, added, 0, len(output)))
            level_at = number * value_count + (PER_LEVEL if value_levels[number] == 1 else 0) + ETA
            eta = 0.0 if value_levels[number] == 2 else np.float64(values[level_at])
            near, square_near = _radii_of(
                sums, number * 8, np.float64(squares[number]), inner, size, eta,
                np.float64(values[(number + 1) * value_count - 1]) + centre, away, terms,
            )  # fmt: skip
            rise = math.expm1(shift) * OUTWARD
            slope = rise / most(shift, 1e-300) * OUTWARD if shift > 0 else OUTWARD
            slope = most(slope, 1 + shift / 2)
            mass_up = most(mass * inflate, FLOOR)
            root_up = most(factors[number] / normaliser * math.sqrt(np.float64(sums[number * 8 + SQUARE])) * inflate, FLOOR)
            part = least(mass_up * near * rise, root_up * square_near * shift_l2 * slope) * OUTWARD
            active_up += mass_up
            held += mass * math.exp(-shift)
            worst = most(worst, shift)
        key_parts[number], shifts[number] = part, shift
    held = (exact + held) / (inflate * OUTWARD)
    key_total = 0.0
    for number in range(blocks):
        key_parts[number] = key_parts[number] / held * OUTWARD
        key_total += key_parts[number]
    key_total *= OUTWARD
    cap = _cap(active_up, worst, value_norm)
    return (key_total if key_total <= cap else cap), value_total, math.sqrt(expected)


@part
def _radii_of(
    sums: np.ndarray, at: int, squares: float, inner: float, size: float, eta: float, reach: float, away: float, terms: int,
) -> tuple[float, float]:  # fmt: skip
    """`mean_radius` of a block by weights; by squared weights the better of two bounds (`bounds.square_moment_bound`)."""
    total, square = np.float64(sums[at + TOTAL]), np.float64(sums[at + SQUARE])
    cube, fourth = np.float64(sums[at + CUBE]), np.float64(sums[at + FOURTH])
    over, over_square = most(total, TINY), most(square, TINY)
    off = 1.01 * gamma(terms + 8) * reach * reach + 8 * TINY * terms * terms * (1 + reach)
    read = 2 * UNIT * reach + TINY * terms
    near, square_near = reach, reach
    moment = (np.float64(sums[at + NORMS]) - 2 * inner + size * total) / over
    if math.isfinite(moment):
        mean_step = np.float64(sums[at + STEPS]) / over + STEP_FLOOR
        first = (math.sqrt(most(moment, 0.0) + off) + read + eta * mean_step + away) * OUTWARD
        near = first if first < reach else reach
        around = read + eta * (math.sqrt(np.float64(sums[at + SQUARE_STEPS]) / over_square) + STEP_FLOOR) + away
        # No weight is above 1.
        spread = total / over_square * (1 + 4 * gamma(terms + 8))
        held = (most(moment, 0.0) + off) * spread
        # Squared weights as a multiple of the weights, and the rest by Cauchy-Schwarz.
        fit = cube / over_square
        apart = most(fourth - cube * fit, 0.0) + 4.04 * gamma(terms + 16) * fourth + 1e-30
        # Squares of small numbers may have been flushed: tokens times channels of them.
        lengths = squares * (1 + 4 * gamma(2 * terms)) + terms * terms * TINY
        rest = 2 * math.sqrt(apart * size * lengths) * OUTWARD
        fitted = (np.float64(sums[at + SQUARE_NORMS]) - 2 * fit * inner + size * square + rest) / over_square
        fitted = most(fitted, 0.0) + off * (1 + fit * total / over_square * (1 + 4 * gamma(terms + 8)))
        if math.isfinite(fitted) and fitted < held:
            held = fitted
        second = (math.sqrt(held) + around) * OUTWARD
        square_near = second if second < reach else reach
    return near, square_near


@part
def _cap(active_up: float, worst: float, value_norm: float) -> float:
    """`key_error_cap`."""
    share = least(active_up, 1.0)
    held = 1 - share * -math.expm1(-worst)
    moved = share * math.expm1(worst) / most(held, 1e-300) if held > 0 else math.inf
    variation = least(least(math.tanh(worst / 2) * OUTWARD, moved * OUTWARD), 1.0)
    return 2 * value_norm * variation * OUTWARD


@part
def _round(output: np.ndarray, shown: np.ndarray, result: int, start: int, dtype: int) -> float:
    """Write an output in the cache's type, rounded to nearest even; the L2 norm of what was written."""
    count, total = len(output), 0.0
    bits, shown_bits = micro.uint32s(output.ctypes.data, count), micro.uint32s(shown.ctypes.data, count)
    if dtype == FLOAT32:
        numbers = micro.float32s(result + 4 * start, count)
        for c in range(count):
            shown[c] = numbers[c] = output[c]
    elif dtype == BFLOAT16:
        halves = micro.uint16s(result + 2 * start, count)
        for c in range(count):
            upper = np.uint32(bits[c] + np.uint32(0x7FFF) + ((bits[c] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            if output[c] != output[c]:
                upper = np.uint32(0x7FC0)
            halves[c] = upper
            shown_bits[c] = upper << np.uint32(16)
    else:
        halves = micro.uint16s(result + 2 * start, count)
        for c in range(count):
            shown[c] = _float16(np.float64(output[c]), halves, c)
    for c in range(count):
        total += np.float64(shown[c]) * np.float64(shown[c])
    return math.sqrt(total)


@part
def _float16(x: float, halves: np.ndarray, place: int) -> float:
    """A float64 number that is a float32 one, rounded to nearest even; its magnitude then."""
    sign, size = (0x8000 if math.copysign(1.0, x) < 0 else 0), abs(x)
    if x != x:
        halves[place] = 0x7E00
        return x
    if size >= 65520.0:
        halves[place] = sign | 0x7C00
        return math.inf
    if size == 0:  # whose exponent is 0 by `frexp`
        halves[place] = sign
        return 0.0
    _, exponent = math.frexp(size)  # size = m * 2^exponent with 0.5 <= m < 1
    exponent = max(exponent, -13)
    unit = math.ldexp(1.0, exponent - 11)
    whole = np.rint(size / unit)  # exact but for the rounding that is meant
    size = whole * unit
    code = np.int64(whole) if exponent == -13 else np.int64(whole) + ((exponent + 13) << 10)
    halves[place] = sign | code
    return size
