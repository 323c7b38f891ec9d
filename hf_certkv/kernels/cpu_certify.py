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
from . import memory, micro_combine
from .compiling import part, swift, unrolled
from .cpu_pass import Task
from .cpu_round import rounded
from .reference import RESCALINGS

UNIT, OUTWARD, TINY, FLOOR = bounds.UNIT_ROUNDOFF, bounds.OUTWARD, bounds.TINY, bounds.MASS_FLOOR
STEP_FLOOR, EXP_ERROR, TANH_ERROR = bounds.STEP_FLOOR, bounds.EXP_ERROR, bounds.TANH_ERROR
OVERFLOW, SPAN = bounds.OVERFLOW, bounds.SCORE_SPAN
DOWN = 1 - 2.0**-30  # as in `ladder.head_budget`
LARGEST_SCALE = 65504.0
KNOWN = 1e300  # a moment beyond is taken for infinite; comparing with infinity itself would keep loops from being vectorised
# A segment's eight sums, as in `Task.sums`.
STEPS, SQUARE_STEPS, NORMS, SQUARE_NORMS, TOTAL, SQUARE, CUBE, FOURTH = range(8)
# What is stored of a block, as `_numbers` puts it side by side.
NUMBERS = 8
BLOCK_RADIUS, APPROXIMATE, KEY_KAPPA, KEY_EPSILON, KEY_SIGMA, VALUE_ETA, VALUE_SIGMA, VALUE_MEAN = range(NUMBERS)


class Claim(NamedTuple):
    """What a certificate is made from, beside the pass, and what is made; arrays by addresses, float64 if nothing is said.

    Attributes:
        raw: float32 `[U, rows, channels]`, the query unscaled; top: float32 `[U, rows]`, its largest magnitude.
        key_numbers, value_numbers: float32, `key_count` or `value_count` a block, with room for `Task.room` blocks a unit.
        key_level, value_level: int64 `[U, N]`, or 0 where no block is raised.
        key_norm, value_norm: `[U]`, the largest norm of keys and values over exact tokens and blocks; exact_norm: `[U]`, of
            the exact tokens' keys alone.
        sink: float32 `[U, used]`, sink logits, or 0.
        step_slip: `bounds.step_slip` where codes are multiplied as integers, or 0.
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
    exact_norm: int
    sink: int
    units: int
    tokens: int
    chain: int
    result: int
    row_figures: int
    block_figures: int
    scaling: float
    bias_size: float
    step_slip: float
    rtol: float
    atol: float
    relative: float
    absolute: float


CLAIM = memory.record(Claim)


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
    memory.float64s(claim.exact_norm, claim.units)[unit] = key_norm
    keys = memory.float32s(claim.key_numbers + 4 * unit * task.room * claim.key_count, task.blocks * claim.key_count)
    values = memory.float32s(claim.value_numbers + 4 * unit * task.room * claim.value_count, task.blocks * claim.value_count)
    for number in range(task.blocks):
        key_norm = most(key_norm, np.float64(keys[(number + 1) * claim.key_count - 1]))
        value_norm = most(value_norm, np.float64(values[(number + 1) * claim.value_count - 1]))
    memory.float64s(claim.key_norm, claim.units)[unit] = key_norm
    memory.float64s(claim.value_norm, claim.units)[unit] = value_norm


@part
def certify(task: Task, claim: Claim, unit: int) -> None:
    """Outputs and bounds of one unit's rows."""
    blocks, width, used = task.blocks, task.width, task.used
    segments, first = blocks + 1, unit * task.rows * (blocks + 1)
    key_norm = memory.float64s(claim.key_norm, claim.units)[unit]
    value_norm = memory.float64s(claim.value_norm, claim.units)[unit]
    top = memory.float32s(claim.top + 4 * unit * task.rows, task.rows)
    factors, weights, inner = np.empty(segments), np.empty(segments, np.float32), np.empty(segments, np.float32)
    output, shown = np.empty(width, np.float32), np.empty(width, np.float32)
    numbers = np.empty((NUMBERS, blocks))
    _numbers(task, claim, unit, numbers)
    squares = memory.float32s(task.squares + 4 * unit * blocks, blocks)
    slips, per_step = memory.float32s(task.slips + 4 * unit * blocks, blocks), claim.step_slip
    # Blocks that were raised are computed in float32.
    float_norm = (
        key_norm if task.integers == 0 or claim.key_level != 0 else memory.float64s(claim.exact_norm, claim.units)[unit]
    )
    rows = memory.float64s(claim.row_figures, 7 * claim.units * used)
    for row in range(used):
        start, mine = first + row * segments, unit * used + row
        maximum = memory.float32s(task.maximum + 4 * start, segments)
        sums = memory.float32s(task.sums + 32 * start, 8 * segments)
        raw = memory.float32s(claim.raw + 4 * (unit * task.rows + row) * task.channels, task.channels)
        coded = memory.float32s(task.errors + 4 * (unit * task.rows + row) * blocks, blocks)
        slack, rounding = _slack(task, claim, raw, key_norm, float_norm, coded, value_norm)
        sink = memory.float32s(claim.sink, claim.units * used)[mine] if claim.sink != 0 else -np.float32(np.inf)
        normaliser, sink_mass = _factors(maximum, sums, factors, weights, claim.sink != 0, sink)
        first_output, apart = unit * segments * task.rows * width + row * width, task.rows * width
        micro_combine.mix(task.output, first_output, apart, weights.ctypes.data, segments, output.ctypes.data, width)
        micro_combine.inners(task.output, first_output, apart, output.ctypes.data, width, blocks, inner.ctypes.data)
        norm = rounded(output, shown, claim.result, mine * width, task.dtype)
        fixed = (claim.relative * norm + math.sqrt(width) * claim.absolute) * OUTWARD
        inflate = least(math.exp(2 * slack) * (1 + gamma(2 * claim.chain + 8)) * OUTWARD, 1e300)
        exact_mass = factors[blocks] * np.float64(sums[blocks * 8 + TOTAL]) / normaliser + sink_mass
        figures, between = claim.block_figures + 8 * mine * blocks, 8 * claim.units * used * blocks
        value_total, expected, slip = _values(
            maximum, sums, factors, normaliser, inflate, numbers, slips, per_step, figures, between
        )
        rounding += slip
        fixed += rounding
        places = (unit * task.rows + row) * blocks
        l1, l2 = memory.float32s(task.query_l1 + 4 * places, blocks), memory.float32s(task.query_l2 + 4 * places, blocks)
        key_total = _keys(
            maximum, sums, squares, factors, normaliser, inflate, numbers, l1, l2, np.float64(top[row]), inner, slips, per_step,
            output, exact_mass, norm + value_total + fixed, value_total + rounding, value_norm, abs(claim.scaling),
            task.channels, task.block + width, figures, between,
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
def merge(task: Task, claim: Claim, unit: int) -> None:
    """Outputs of one unit's rows, without their bounds."""
    width, segments, apart = task.width, task.blocks + 1, task.rows * task.width
    factors, weights = np.empty(segments), np.empty(segments, np.float32)
    output, shown = np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(task.used):
        start, mine = (unit * task.rows + row) * segments, unit * task.used + row
        maximum = memory.float32s(task.maximum + 4 * start, segments)
        sums = memory.float32s(task.sums + 32 * start, 8 * segments)
        sink = memory.float32s(claim.sink, claim.units * task.used)[mine] if claim.sink != 0 else -np.float32(np.inf)
        _factors(maximum, sums, factors, weights, claim.sink != 0, sink)
        first = unit * segments * apart + row * width
        micro_combine.mix(task.output, first, apart, weights.ctypes.data, segments, output.ctypes.data, width)
        rounded(output, shown, claim.result, mine * width, task.dtype)


@part
def _numbers(task: Task, claim: Claim, unit: int, numbers: np.ndarray) -> None:
    """What is stored of a unit's blocks at their levels: a row of `numbers` each. Values at the originals have no error."""
    blocks = task.blocks
    keys = memory.float32s(claim.key_numbers + 4 * unit * task.room * claim.key_count, blocks * claim.key_count)
    values = memory.float32s(claim.value_numbers + 4 * unit * task.room * claim.value_count, blocks * claim.value_count)
    for block in range(blocks):
        key_level = value_level = 0
        if claim.key_level != 0:
            key_level = memory.int64s(claim.key_level + 8 * unit * blocks, blocks)[block]
            value_level = memory.int64s(claim.value_level + 8 * unit * blocks, blocks)[block]
        key, value = block * claim.key_count, block * claim.value_count
        key += PER_LEVEL if key_level == 1 else 0
        value += PER_LEVEL if value_level == 1 else 0
        numbers[BLOCK_RADIUS, block] = np.float64(values[(block + 1) * claim.value_count - 1])
        numbers[APPROXIMATE, block] = 0.0 if key_level == 2 else 1.0
        numbers[KEY_KAPPA, block] = np.float64(keys[key + KAPPA])
        numbers[KEY_EPSILON, block] = np.float64(keys[key + EPSILON])
        numbers[KEY_SIGMA, block] = np.float64(keys[key + KEY_SPECTRAL])
        numbers[VALUE_ETA, block] = 0.0 if value_level == 2 else np.float64(values[value + ETA])
        numbers[VALUE_SIGMA, block] = 0.0 if value_level == 2 else np.float64(values[value + VALUE_SPECTRAL])
        numbers[VALUE_MEAN, block] = 0.0 if value_level == 2 else np.float64(values[value + VALUE_RMS])


@part
def _slack(
    task: Task, claim: Claim, raw: np.ndarray, key: float, float_key: float, coded: np.ndarray, value: float
) -> tuple[float, float]:
    """`score_rounding`, then `weight_slack` and `rounding_error`."""
    square = 0.0
    for c in range(len(raw)):
        square += np.float64(raw[c]) * np.float64(raw[c])
    query, scaling, channels = math.sqrt(square), abs(claim.scaling), len(raw)
    size = scaling * query * key
    error = gamma(channels + 4) * scaling * query * float_key
    if task.integers != 0:
        for block in range(len(coded)):
            error = most(error, np.float64(coded[block]))
        error += channels * 2.0**-100 * (1 + scaling)
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
def _factors(
    maximum: np.ndarray, sums: np.ndarray, factors: np.ndarray, weights: np.ndarray, sunk: bool, sink: float
) -> tuple[float, float]:
    """Each segment's factor, and over the normaliser in float32; the normaliser, and the sink's share."""
    highest = maximum[0]
    for segment in range(1, len(maximum)):
        highest = most(highest, maximum[segment])
    if sunk:
        highest = most(highest, sink)
    normaliser, top = 0.0, np.float64(highest)
    for segment in range(len(maximum)):
        # Of a masked segment's sums, which are 0, or NaN where scores were: then everything is to be NaN.
        factors[segment] = math.exp(np.float64(maximum[segment]) - top) if maximum[segment] != -np.inf else 0.0
        normaliser += factors[segment] * np.float64(sums[segment * 8 + TOTAL])
    share = 0.0
    if sunk:
        share = math.exp(np.float64(sink) - top)
        normaliser += share
    for segment in range(len(maximum)):
        weights[segment] = np.float32(factors[segment] / normaliser)
    return normaliser, share / normaliser


@swift
def _values(
    maximum: np.ndarray, sums: np.ndarray, factors: np.ndarray, normaliser: float, inflate: float, numbers: np.ndarray,
    slips: np.ndarray, per_step: float, figures: int, between: int,
) -> tuple[float, float, float]:  # fmt: skip
    """`value_error` of the blocks, added up, the expected error, and what integers round; more at `figures`."""
    blocks = len(maximum) - 1
    masses, parts = memory.float64s(figures, blocks), memory.float64s(figures + 3 * between, blocks)
    steps = memory.float64s(figures + 4 * between, blocks)
    eta, sigma, rms = numbers[VALUE_ETA], numbers[VALUE_SIGMA], numbers[VALUE_MEAN]
    total_error, expected, slip, inverse = 0.0, 0.0, 0.0, 1 / normaliser
    for block in range(blocks):
        total, square = np.float64(sums[block * 8 + TOTAL]), np.float64(sums[block * 8 + SQUARE])
        weight = factors[block] * inverse
        mass, root = weight * total, weight * math.sqrt(square)
        step = np.float64(sums[block * 8 + STEPS]) / most(total, TINY)
        root_step = math.sqrt(np.float64(sums[block * 8 + SQUARE_STEPS]) / most(square, TINY))
        guess = root * root_step * rms[block]
        mass_up, root_up = most(mass * inflate, FLOOR), most(root * inflate, FLOOR)
        part = least(mass_up * (step + STEP_FLOOR) * eta[block], root_up * (root_step + STEP_FLOOR) * sigma[block]) * OUTWARD
        part = part if maximum[block] > -np.inf else 0.0
        masses[block], steps[block], parts[block] = mass, step, part
        total_error += part
        expected += guess * guess
        slip += weight * (np.float64(slips[block]) + per_step * np.float64(sums[block * 8 + STEPS]))
    return total_error * OUTWARD, math.sqrt(expected), slip * inflate * OUTWARD


@swift
def _keys(
    maximum: np.ndarray, sums: np.ndarray, squares: np.ndarray, factors: np.ndarray, normaliser: float, inflate: float,
    numbers: np.ndarray, l1: np.ndarray, l2: np.ndarray, top: float, inner: np.ndarray, slips: np.ndarray, per_step: float,
    output: np.ndarray, exact_mass: float, centre: float, away: float, value_norm: float, scaling: float, channels: int,
    terms: int, figures: int, between: int,
) -> float:  # fmt: skip
    """`key_error` of the blocks over the least normaliser, added up, or its cap; shifts and parts at `figures`."""
    blocks = len(maximum) - 1
    masses, shifts = memory.float64s(figures, blocks), memory.float64s(figures + between, blocks)
    parts = memory.float64s(figures + 2 * between, blocks)
    radius, eta, approximate = numbers[BLOCK_RADIUS], numbers[VALUE_ETA], numbers[APPROXIMATE]
    kappa, epsilon, sigma = numbers[KEY_KAPPA], numbers[KEY_EPSILON], numbers[KEY_SIGMA]
    size, inverse = 0.0, 1 / normaliser
    for c in range(len(output)):
        size += np.float64(output[c]) * np.float64(output[c])
    norm = math.sqrt(size)
    # `score_weights`: products of sizes, at most 1, and steps lose at most 2^-126 to underflow, as do their squares; a channel
    # of the query that is subnormal may be flushed.
    up, root_channels = (1 + (channels + 8) * 2.0**-23) * top, math.sqrt(channels)
    hidden = 2 * TINY * LARGEST_SCALE * (1 + top)
    active_up, held, worst = 0.0, 0.0, 0.0
    for block in range(blocks):
        mass = masses[block]
        query_l1 = (np.float64(l1[block]) + channels * TINY) * up + channels * hidden
        query_l2 = (math.sqrt(np.float64(l2[block])) + root_channels * 2.0**-60) * up + root_channels * hidden
        shift = most(scaling * least(kappa[block] * query_l1, epsilon[block] * query_l2) * OUTWARD, 0.0)
        # What integers round of a block's values moves its product with the output, at most so far.
        slip = 1.01 * norm * (np.float64(slips[block]) + per_step * np.float64(sums[block * 8 + STEPS]))
        near, square_near = _radii_of(
            sums, block * 8, np.float64(squares[block]), np.float64(inner[block]) - slip, size, eta[block],
            radius[block] + centre, away, terms,
        )  # fmt: skip
        growth = _expm1(shift)
        rise = growth * OUTWARD
        slope = most(rise / most(shift, 1e-300) * OUTWARD if shift > 0 else OUTWARD, 1 + shift / 2)
        mass_up = most(mass * inflate, FLOOR)
        root_up = most(factors[block] * inverse * math.sqrt(np.float64(sums[block * 8 + SQUARE])) * inflate, FLOOR)
        lean = scaling * sigma[block] * query_l2 * OUTWARD
        part = least(mass_up * near * rise, root_up * square_near * lean * slope) * OUTWARD
        active = approximate[block] > 0 and maximum[block] > -np.inf
        parts[block], shifts[block] = part if active else 0.0, shift if active else 0.0
        exact_mass += 0.0 if active else mass
        active_up += mass_up if active else 0.0
        held += mass / (1 + growth) if active else 0.0
    for block in range(blocks):
        worst = most(worst, shifts[block])
    over = inflate * OUTWARD / (exact_mass + held) * OUTWARD
    total = 0.0
    for block in range(blocks):
        parts[block] *= over
        total += parts[block]
    total *= OUTWARD
    cap = _cap(active_up, worst, value_norm)
    return total if total <= cap else cap


@unrolled
def _expm1(x: float) -> float:
    """exp(x) - 1 for x >= 0, relative error below 2^-48; infinite from 700 on; NaN stays NaN.

    x = n log 2 + r: 2^n (exp(r) - 1) + (2^n - 1), with 15 terms of the series for |r| <= log(2) / 2.
    """
    n = np.rint(least(x, 700.0) * 1.4426950408889634)
    n = n if n == n else 0.0
    r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    p = micro_combine.series(r)
    power = micro_combine.power_of_two(n)
    grown = power * (r * p) + (power - 1.0)
    return math.inf if x > 700.0 else grown


@unrolled
def _radii_of(
    sums: np.ndarray, at: int, squares: float, inner: float, size: float, eta: float, reach: float, away: float, terms: int
) -> tuple[float, float]:
    """`mean_radius` of a block by weights; by squared weights the better of two bounds (`bounds.square_moment_bound`)."""
    total, square = np.float64(sums[at + TOTAL]), np.float64(sums[at + SQUARE])
    cube, fourth = np.float64(sums[at + CUBE]), np.float64(sums[at + FOURTH])
    over, over_square = most(total, TINY), most(square, TINY)
    off = 1.01 * gamma(terms + 8) * reach * reach + 8 * TINY * terms * terms * (1 + reach)
    read = 2 * UNIT * reach + TINY * terms
    moment = (np.float64(sums[at + NORMS]) - 2 * inner + size * total) / over
    known = abs(moment) <= KNOWN
    mean_step = np.float64(sums[at + STEPS]) / over + STEP_FLOOR
    first = (math.sqrt(most(moment, 0.0) + off) + read + eta * mean_step + away) * OUTWARD
    near = first if known and first < reach else reach
    around = read + eta * (math.sqrt(np.float64(sums[at + SQUARE_STEPS]) / over_square) + STEP_FLOOR) + away
    # No weight is above 1.
    more = 1 + 4 * gamma(terms + 8)
    held = (most(moment, 0.0) + off) * (total / over_square * more)
    # Squared weights as a multiple of the weights, and the rest by Cauchy-Schwarz.
    fit = cube / over_square
    apart = most(fourth - cube * fit, 0.0) + 4.04 * gamma(terms + 16) * fourth + 1e-30
    # Squares of small numbers may have been flushed: tokens times channels of them.
    lengths = squares * (1 + 4 * gamma(2 * terms)) + terms * terms * TINY
    rest = 2 * math.sqrt(apart * size * lengths) * OUTWARD
    fitted = (np.float64(sums[at + SQUARE_NORMS]) - 2 * fit * inner + size * square + rest) / over_square
    fitted = most(fitted, 0.0) + off * (1 + fit * total / over_square * more)
    held = fitted if fitted <= KNOWN and fitted < held else held
    second = (math.sqrt(held) + around) * OUTWARD
    square_near = second if known and second < reach else reach
    return near, square_near


@part
def _cap(active_up: float, worst: float, value_norm: float) -> float:
    """`key_error_cap`."""
    share = least(active_up, 1.0)
    held = 1 - share * -math.expm1(-worst)
    moved = share * math.expm1(worst) / most(held, 1e-300) if held > 0 else math.inf
    variation = least(least(math.tanh(worst / 2) * OUTWARD, moved * OUTWARD), 1.0)
    return 2 * value_norm * variation * OUTWARD
