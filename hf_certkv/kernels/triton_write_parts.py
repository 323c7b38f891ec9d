"""The parts of `triton_write`: grids, codes and what is read of them, and the bound of a spectral norm. Triton functions.

A block is taken in pieces: some tokens `t` by some channels `c`, with `inside` for what is not there. SIZE is the size of a
group of values; of keys, KEYED, each channel is its own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import codecs
from .triton_common import INFINITY, MIDDLE, least

HALF_MAX: Any = tl.constexpr(codecs.HALF_MAX)
SLACK: Any = tl.constexpr(codecs.SLACK)
TINY: Any = tl.constexpr(codecs.TINY)
FINE: Any = tl.constexpr(2.0**codecs.LOW_BITS)  # low codes a cell
FINE_STEP: Any = tl.constexpr(2.0**-codecs.LOW_BITS)
LEAST: Any = tl.constexpr(-0x7FFFFFFF)  # less than all that `ordered` gives
ROUNDER: Any = tl.constexpr(1.5 * 2.0**52)  # added and subtracted: rounds to the nearest integer, ties to even
SMALLEST: Any = tl.constexpr(2.0**-100)  # norm of rows that can be scaled


@triton.jit
def _ordered(x):
    """float32 as int32 in the same order, and NaN above all: maxima of them keep NaN."""
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unordered(bits):
    """Inverse of `ordered`."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def sizes(x):
    """|x| of float64 numbers as int64 in the same order, and NaN above all."""
    return tl.abs(x).to(tl.int64, bitcast=True)


@triton.jit
def largest(found):
    """The number that the largest of `sizes` stands for; NaN if one is."""
    return tl.max(found, 0).to(tl.float64, bitcast=True)


@triton.jit
def round_up(x):
    """`codecs.round_up`."""
    return tl.where(x == 0.0, x, x * SLACK + TINY).to(tl.float32)


@triton.jit
def _half_down(x):
    """`codecs.round_half_down` of float64, as float64. By way of float32, as torch makes a float16 of a float64."""
    clamped = tl.where(x < -HALF_MAX, -HALF_MAX, tl.where(x > HALF_MAX, HALF_MAX, x))
    near = clamped.to(tl.float32).to(tl.float16).to(tl.float64)
    spacing = tl.abs(near) * 0.0009765625  # 2^-10
    below = near - tl.where(spacing < 5.9604644775390625e-08, 5.9604644775390625e-08, spacing)  # 2^-24
    below = tl.where(below < -HALF_MAX, -HALF_MAX, below)
    return tl.where(near > x, below, near).to(tl.float32).to(tl.float16).to(tl.float64)


@triton.jit
def _grid(low, high, cells):
    """Offset and step that `codecs.grid_codes` chooses for groups between two extremes, float64."""
    offset = _half_down(low.to(tl.float64))
    offset = tl.where(offset == 0.0, 0.0, offset)  # which zero is the least of several is left open
    step = (high.to(tl.float64) - offset) / (cells - 0.03125)
    step = -_half_down(-tl.where(step < 0.0, 0.0, step))
    return offset, tl.where(step == 0.0, 0.0, step)


@triton.jit
def _originals(x, t, c, inside, stride_t, stride_c):
    """A piece of a block, float32: 0 outside."""
    place = t.to(tl.int64)[:, None] * stride_t + c.to(tl.int64)[None, :] * stride_c
    number = tl.load(x + place, mask=inside, other=0)
    # int16 are bits of bfloat16, the first ones of a float32.
    bits = number.dtype == tl.int16
    return (number.to(tl.int32) << 16).to(tl.float32, bitcast=True) if bits else number.to(tl.float32)


@triton.jit
def _inverse(step):
    """1 / step, and 0 where there is no step."""
    return tl.where(step > 0.0, 1.0 / tl.where(step > 0.0, step, 1.0), 0.0)


@triton.jit
def extremes(
    x, scale, offset, stride_t, stride_c,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, KEYED: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the offsets and steps of all groups."""
    t = tl.arange(0, T)
    if KEYED:
        for start in range(0, CHANNELS, WIDE):
            c = start + tl.arange(0, WIDE)
            inside = (t < TOKENS)[:, None] & (c < CHANNELS)[None, :]
            number = _originals(x, t, c, inside, stride_t, stride_c)
            high = tl.max(tl.where(inside, _ordered(number), LEAST), 0)
            low = tl.max(tl.where(inside, _ordered(-number), LEAST), 0)
            origin, step = _grid(-_unordered(low), _unordered(high), 256.0)
            tl.store(offset + c, origin.to(tl.float32).to(tl.float16), mask=c < CHANNELS)
            tl.store(scale + c, step.to(tl.float32).to(tl.float16), mask=c < CHANNELS)
    else:
        GROUPS: tl.constexpr = (CHANNELS + SIZE - 1) // SIZE
        for group in range(GROUPS):
            high = t * 0 + LEAST
            low = high
            for start in range(0, SIZE, WIDE):
                c = start + tl.arange(0, WIDE)
                inside = (t < TOKENS)[:, None] & ((c < SIZE) & (group * SIZE + c < CHANNELS))[None, :]
                number = _originals(x, t, group * SIZE + c, inside, stride_t, stride_c)
                high = tl.maximum(high, tl.max(tl.where(inside, _ordered(number), LEAST), 1))
                low = tl.maximum(low, tl.max(tl.where(inside, _ordered(-number), LEAST), 1))
            origin, step = _grid(-_unordered(low), _unordered(high), 16.0)
            tl.store(offset + t * GROUPS + group, origin.to(tl.float32).to(tl.float16), mask=t < TOKENS)
            tl.store(scale + t * GROUPS + group, step.to(tl.float32).to(tl.float16), mask=t < TOKENS)


@triton.jit
def token_steps(scale, t, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr):
    """The L2 norms of the tokens' steps, float64."""
    GROUPS: tl.constexpr = (CHANNELS + SIZE - 1) // SIZE
    squares = t.to(tl.float64) * 0.0
    for group in range(GROUPS):
        step = tl.load(scale + t * GROUPS + group, mask=t < TOKENS, other=0.0).to(tl.float64)
        squares += step * step
    return tl.sqrt(squares)


@triton.jit
def piece(
    x, scale, offset, t, start, c, inside, stride_t, stride_c,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, KEYED: tl.constexpr, SIZE: tl.constexpr, ONE_GROUP: tl.constexpr,
):  # fmt: skip
    """Of a piece of a block whose first channel is `start`: originals, codes of all bits, offsets and steps, all float64.

    Offsets and steps in a shape that broadcasts; of one step for each token where ONE_GROUP says that a group has all channels.
    """
    GROUPS: tl.constexpr = (CHANNELS + SIZE - 1) // SIZE
    if KEYED:
        at, known = c[None, :], (c < CHANNELS)[None, :]
        last = 4095.0
    else:
        last = 255.0
        if ONE_GROUP:
            at, known = (t * GROUPS + start // SIZE)[:, None], (t < TOKENS)[:, None]
        else:
            at, known = t[:, None] * GROUPS + (c // SIZE)[None, :], (t < TOKENS)[:, None] & (c < CHANNELS)[None, :]
    step = tl.load(scale + at, mask=known, other=0.0).to(tl.float64)
    origin = tl.load(offset + at, mask=known, other=0.0).to(tl.float64)
    number = _originals(x, t, c, inside, stride_t, stride_c).to(tl.float64)
    position = ((number - origin) * _inverse(step)) * FINE
    position = tl.where(inside & (position > 0.0), position, 0.0)  # NaN has code 0
    position = tl.where(position < last, position, last)
    return number, (position + ROUNDER) - ROUNDER, origin, step


@triton.jit
def read_level(number, code, origin, step, unit, inside, ALL_BITS: tl.constexpr):
    """What is read at a level, and its error in units: an infinite one where there is an error, but no unit."""
    place = code * FINE_STEP if ALL_BITS else tl.floor(code * FINE_STEP) + MIDDLE
    read = tl.where(inside, origin + step * place, 0.0)
    error = tl.where(inside, read - number, 0.0)
    return read, tl.where(unit > 0.0, error * _inverse(unit), tl.where(error == 0.0, error, error + INFINITY))


@triton.jit
def row_products(
    x, scale, offset, power, stride_t, stride_c,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, KEYED: tl.constexpr, SIZE: tl.constexpr, ONE_GROUP: tl.constexpr,
    ALL_BITS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """E E^T, or E^T E where that is smaller, of a block's errors in units, times `power`: float32 `[N, N]`.

    A piece of K channels, or tokens, is added at a time.
    """
    gram = tl.zeros((N, N), tl.float32)
    if TOKENS <= CHANNELS:
        t = tl.arange(0, N)
        units = t if KEYED else token_steps(scale, t, TOKENS, CHANNELS, SIZE)
        for start in range(0, CHANNELS, K):
            c = start + tl.arange(0, K)
            inside = (t < TOKENS)[:, None] & (c < CHANNELS)[None, :]
            number, code, origin, step = piece(
                x, scale, offset, t, start, c, inside, stride_t, stride_c, TOKENS, CHANNELS, KEYED, SIZE, ONE_GROUP
            )
            unit = step if KEYED else units[:, None]
            _, error = read_level(number, code, origin, step, unit, inside, ALL_BITS)
            rows = (error * power).to(tl.float32)
            gram = tl.dot(rows, tl.trans(rows), gram, input_precision="ieee")
    else:
        c = tl.arange(0, N)
        for first in range(0, TOKENS, K):
            t = first + tl.arange(0, K)
            inside = (t < TOKENS)[:, None] & (c < CHANNELS)[None, :]
            number, code, origin, step = piece(
                x, scale, offset, t, 0, c, inside, stride_t, stride_c, TOKENS, CHANNELS, KEYED, SIZE, ONE_GROUP
            )
            unit = step if KEYED else token_steps(scale, t, TOKENS, CHANNELS, SIZE)[:, None]
            _, error = read_level(number, code, origin, step, unit, inside, ALL_BITS)
            rows = (error * power).to(tl.float32)
            gram = tl.dot(tl.trans(rows), rows, gram, input_precision="ieee")
    return gram


@triton.jit
def _frobenius(x):
    """The Frobenius norm of a float32 matrix, float64."""
    wide = x.to(tl.float64)
    return tl.sqrt(tl.sum(tl.sum(wide * wide, 1), 0))


@triton.jit
def _squared(x, N: tl.constexpr, K: tl.constexpr):
    """X^T X of float32 `[N, N]`, K rows at a time: all at once take more registers than there are."""
    pieces = tl.reshape(x, (N // K, K, N))
    which = tl.arange(0, N // K)[:, None, None]
    product = tl.zeros((N, N), tl.float32)
    for k in range(N // K):
        rows = tl.sum(tl.where(which == k, pieces, 0.0), 0)
        product = tl.dot(tl.trans(rows), rows, product, input_precision="ieee")
    return product


@triton.jit
def spectral(
    gram, norm, power, SQUARINGS: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    GRAM_ROUNDING: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """`codecs.spectral_bound` from the product of rows that were multiplied by `power`, float32 `[N, N]`."""
    i = tl.arange(0, N)
    diagonal = i[:, None] == i[None, :]
    trace = tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), 1).to(tl.float64), 0)
    centre = (trace / RANK).to(tl.float32)
    product = tl.where(diagonal & (i < RANK)[:, None], gram - centre, gram)
    first = _frobenius(product)
    product = _squared(product, N, K)
    second = _frobenius(product)
    root = second
    if SQUARINGS == 2:
        product = _squared(product, N, K)
        root = tl.sqrt(_frobenius(product) + ROUNDING * second * second)
    above = tl.sqrt(root + ROUNDING * first * first)
    bound = tl.sqrt(centre.to(tl.float64) + above + GRAM_ROUNDING * trace) / power
    triangle = norm.to(tl.float64) * TOKENS**0.5
    return round_up(tl.where(norm > SMALLEST, least(bound, triangle), triangle))


@triton.jit
def scale_down(norm):
    """A power of two that makes rows of this norm at most 1, float64: times it nothing is rounded."""
    exponent = (norm.to(tl.int32, bitcast=True) >> 23).to(tl.int64)
    return tl.where(norm > SMALLEST, ((1149 - exponent) << 52).to(tl.float64, bitcast=True), 1.0)
