"""The parts of `cpu_write`: what is done to a token, to the groups of a block and to the matrix of its residuals.

Codes, planes, scales and offsets are those of the torch codecs, bit for bit. The numbers are measured in float64 by the same
formulas. They differ in the order of summation; in a product with 1/S, off by two roundings of 2^-53, where the codec divides;
and in the products of the spectral bound: the order of their sums, rows scaled by a power of two, exactly, or a first product
of bytes, which has bounds of its own. `SLACK` and the analysis of `spectral_bound` hold for any order and leave room for that.
What is rare is not done here but flagged, and left to the codec: NaN, infinity, an error where the step is 0, norms that are
not between 2^-100 and 2^100.

Nothing that makes a residual (`residual.py`) may be reassociated. There z + S * position is exact in float64 (z and S are
multiples of 2^-24 below 2^16, positions multiples of 2^-5 up to 2^8: at most 53 bits), so that the difference from x has one
rounding, relative to itself. Only sums of squares, `extremes` and the float32 products may be.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from .. import codecs
from .compiling import part
from .products import gram, gram_bytes, largest, narrow, turn, turn_words
from .residual import EXPONENT
from .vectors import LANES

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
SLACK, TINY, HALF_MAX = codecs.SLACK, codecs.TINY, codecs.HALF_MAX
SMALLEST, LARGEST = 2.0**-100, 2.0**100  # norms that are dealt with here

EXACT, SUMMING = {"contract"}, {"contract", "reassoc", "nsz", "nnan"}  # what LLVM may do to floats
exact, inlined = partial(part, fastmath=EXACT), partial(part, fastmath=EXACT, forceinline=True)
summing = partial(part, fastmath=SUMMING, forceinline=True)


@inlined
def load(bits16: Any, bits32: Any, form: int, base: int, row: Any, row_bits: Any) -> bool:
    """Originals as float32, exactly. Returns whether all of them are finite."""
    count = len(row)
    if form == FLOAT32:
        words = bits32[base : base + count]
        for i in range(count):
            row_bits[i] = words[i]
    else:
        halves = bits16[base : base + count]
        if form == BFLOAT16:
            for i in range(count):
                row_bits[i] = np.int32(halves[i]) << 16
        else:
            for i in range(count):
                half = np.int32(halves[i])
                exponent = (112 if (half & 0x7C00) != 0x7C00 else 224) << 23
                row_bits[i] = (((half & 0x7FFF) << 13) + exponent) | ((half >> 15) << 31)
            for i in range(count):
                half = np.int32(halves[i])
                if (half & 0x7C00) == 0:  # subnormal: by arithmetic, for a float32 of these bits might be flushed
                    size = np.float32(half & 0x3FF) * np.float32(2.0**-24)
                    row[i] = -size if half < 0 else size
    wrong = 0
    for i in range(count):
        wrong += 1 if (row_bits[i] & EXPONENT) == EXPONENT else 0
    return wrong == 0


@exact
def _nearest_half(x: Any, bits: Any, magic: Any, magic_bits: Any, count: int) -> None:
    """float32 numbers of at most 65504, rounded in place to the nearest float16, ties to even."""
    for i in range(count):  # 3 * 2^12 times the power of two at x: adding it leaves the bits of a float16
        magic_bits[i] = (max(bits[i] & EXPONENT, 113 << 23) + (13 << 23)) | 0x400000
    for i in range(count):
        x[i] = (x[i] + magic[i]) - magic[i]


@exact
def _half_down(x: Any, near: Any, bits: Any, magic: Any, magic_bits: Any, count: int) -> None:
    """`codecs.round_half_down` of float64 numbers, in place."""
    for i in range(count):
        near[i] = np.float32(min(max(x[i], -HALF_MAX), HALF_MAX))
    _nearest_half(near, bits, magic, magic_bits, count)
    for i in range(count):
        number = np.float64(near[i])
        below = max(number - max(abs(number) * 2.0**-10, 2.0**-24), -HALF_MAX)
        near[i] = np.float32(below) if number > x[i] else near[i]
    _nearest_half(near, bits, magic, magic_bits, count)
    for i in range(count):
        x[i] = np.float64(near[i])


@exact
def half_bits(x: Any, near: Any, bits: Any, out: Any) -> None:
    """Bits of numbers that float16 holds."""
    count = len(x)
    for i in range(count):
        near[i] = np.float32(x[i])
    for i in range(count):
        size = bits[i] & 0x7FFFFFFF
        small = np.int32(abs(x[i]) * 2.0**24) if size < (113 << 23) else 0
        normal = (size >> 13) - (112 << 10)
        out[i] = (normal if size >= (113 << 23) else small) | ((bits[i] >> 16) & 0x8000)


@exact
def grid(low: Any, high: Any, cells: float, near: Any, bits: Any, magic: Any, magic_bits: Any) -> None:
    """Offsets and scales of a block's groups as `codecs.grid_codes` chooses them: over the lows and over the highs."""
    count = len(low)
    for i in range(count):
        low[i] = low[i] + 0.0
    _half_down(low, near, bits, magic, magic_bits, count)
    for i in range(count):
        high[i] = -max((high[i] - low[i]) / (cells - 0.5 / 16), 0.0)
    _half_down(high, near, bits, magic, magic_bits, count)
    for i in range(count):
        high[i] = 0.0 - high[i]


@inlined
def without_step(x: Any, origin: Any, inverse: Any) -> bool:
    """Whether a token has an error where its step is 0: there the origin is what is read."""
    wrong = 0
    for c in range(len(x)):
        wrong += 1 if (inverse[c] == 0.0) & (origin[c] != np.float64(x[c])) else 0
    return wrong > 0


@summing
def square(x: Any) -> Any:
    """The sum of squares of float32 numbers, in float64."""
    total = 0.0
    for c in range(len(x)):
        total += np.float64(x[c]) * np.float64(x[c])
    return total


@summing
def extremes(x: Any) -> Any:
    """Least and largest of a group."""
    low = high = x[0]
    for c in range(len(x)):
        low = x[c] if x[c] < low else low
        high = x[c] if x[c] > high else high
    return low, high


@exact
def round_up(x: float) -> Any:
    """`codecs.round_up`."""
    return np.float32(0.0) if x == 0.0 else np.float32(x * SLACK + TINY)


product_rounding = part(codecs.product_rounding)
MOST_CHANNELS = 1024  # whose sums of bytes float32 holds exactly
BYTE_UNIT = 2.0**-24  # what such a sum counts, so that no product overflows


@exact
def _gram_of_bytes(rows: Any, narrowed: Any, sums: Any, turned: Any, one: Any) -> Any:
    """E E^T of rows brought to bytes. Returns what the rows were multiplied with for that, and the norm of what was lost."""
    (count, width), pitch = rows.shape, narrowed.shape[1]
    factor = np.float32(126.99) / largest(rows.ctypes.data, count * width)
    lost = narrow(rows.ctypes.data, count, width, factor, pitch, narrowed.ctypes.data)
    turn_words(narrowed.ctypes.data, count, pitch // 4, turned.ctypes.data)
    gram_bytes(turned.ctypes.data, pitch // 4, count, np.float32(BYTE_UNIT), sums.ctypes.data, one.ctypes.data)
    # The sum of squares has its rounding, each product with `factor`, up to 127, another.
    numbers = count * width
    return factor, np.sqrt(lost * (1 + product_rounding(numbers // LANES + LANES))) + np.sqrt(numbers) * 2.0**-16


@exact
def _gram_of_floats(rows: Any, tokens: int, channels: int, norm: Any, turned: Any, one: Any) -> Any:
    """E E^T, or E^T E where that is smaller, of the rows times a power of two. Returns that."""
    power = math.ldexp(1.0, -math.frexp(np.float64(norm))[1])
    count, width = rows.shape
    if tokens <= channels:
        turn(rows.ctypes.data, count, width, np.float32(power), turned.ctypes.data)
        gram(turned.ctypes.data, width, count, one.ctypes.data)
    else:
        flat, scaled, factor = rows.reshape(-1), turned.reshape(-1), np.float32(power)
        for i in range(len(flat)):
            scaled[i] = flat[i] * factor
        gram(turned.ctypes.data, count, width, one.ctypes.data)
    return power


@exact
def spectral(
    rows: Any, tokens: int, channels: int, norm: Any, squarings: int, integers: bool,
    narrowed: Any, sums: Any, turned: Any, one: Any, two: Any,
) -> Any:  # fmt: skip
    """`codecs.spectral_bound` of float32 `[tokens, channels]`, filled up with zeros in both directions.

    With `integers` the first product is one of the rows as bytes, D: ||E||_2 <= ||D||_2 + ||E - D||_F.

    Scratch is the caller's, for numba frees an array behind its last use, which an address is not.
    Args: narrowed: int8, the rows as bytes, of a multiple of CHUNK channels, those beyond the rows' 0; sums: int32 `[rows]`;
        turned: the rows or their transpose, whichever is narrower; one, two: the products.
    """
    if norm == 0.0:
        return np.float32(0.0)
    rank, depth = min(tokens, channels), max(tokens, channels)
    if integers and rank == tokens and depth <= MOST_CHANNELS:
        factor, lost = _gram_of_bytes(rows, narrowed, sums, turned, one)
        units, rounding = np.sqrt(BYTE_UNIT) * np.float64(factor), 2 * codecs.UNIT_ROUNDOFF
        lost *= np.sqrt(BYTE_UNIT)
    else:
        units, lost = _gram_of_floats(rows, tokens, channels, norm, turned, one), 0.0
        rounding = product_rounding(depth) + 2 * codecs.UNIT_ROUNDOFF
    trace = 0.0
    for i in range(rank):
        trace += np.float64(one[i, i])
    centre = np.float32(trace / rank)
    for i in range(rank):
        one[i, i] -= centre
    again = product_rounding(rank)
    first = square(one.reshape(-1))
    gram(one.ctypes.data, len(one), len(one), two.ctypes.data)
    second = square(two.reshape(-1))
    root = np.sqrt(second)
    if squarings == 2:
        gram(two.ctypes.data, len(two), len(two), one.ctypes.data)
        root = np.sqrt(np.sqrt(square(one.reshape(-1))) + again * second)
    above = np.float64(centre) + np.sqrt(root + again * first)
    bound = (np.sqrt(above + rounding * trace) + lost) / units
    return round_up(min(bound, np.float64(norm) * np.sqrt(tokens)))


@exact
def length_codes(squares: Any, radius: float, out: Any) -> None:
    """`codecs.length_codes` of a block whose numbers are finite."""
    factor = codecs.LENGTHS * (1 + 2.0**-30)
    for t in range(len(squares)):
        share = squares[t] / (radius * radius) if radius > 0.0 else 0.0
        out[t] = np.int32(min(np.ceil(share * factor), float(codecs.LENGTHS)))


@inlined
def copy(source: Any, out: Any) -> None:
    """The first bytes."""
    for c in range(len(out)):
        out[c] = source[c]


@inlined
def spread(x: float, out: Any) -> None:
    """One number for all channels of a group."""
    for c in range(len(out)):
        out[c] = x
