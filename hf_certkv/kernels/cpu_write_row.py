"""The parts of `cpu_write`: what is done to a token, to the groups of a block and to the matrix of its residuals.

Codes, planes, scales and offsets are those of the torch codecs, bit for bit. The numbers are measured in float64 by the same
formulas. They differ in the order of summation; in a product with 1/S, off by two roundings of 2^-53, where the codec divides;
and in the order of the float32 products of the spectral bound, whose rows are scaled by a power of two, exactly. `SLACK` and
the analysis of `spectral_bound` hold for any order and leave room for that. What is rare is not done here but flagged, and
left to the codec: NaN, infinity, an error where the step is 0, norms that are not between 2^-100 and 2^100.

Nothing in `residuals` may be reassociated. There z + S * position is exact in float64 (z and S are multiples of 2^-24 below
2^16, positions multiples of 2^-5 up to 2^8: at most 53 bits), so that the difference from x has one rounding, relative to
itself. Only `squares` and `square`, which add squares, `extremes` and the float32 products may be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import codecs
from .compiling import kernel

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
SLACK, TINY, MIDDLE, HALF_MAX = codecs.SLACK, codecs.TINY, codecs.MIDDLE, codecs.HALF_MAX
ROUNDER = 1.5 * 2.0**52  # added and subtracted: rounds to the nearest integer, ties to even
EXPONENT = 0x7F800000  # of a float32
SMALLEST, LARGEST = 2.0**-100, 2.0**100  # norms that are dealt with here
TILE = 4  # rows of a product are filled up with zeros to a multiple

exact = kernel(fastmath={"contract"}, error_model="numpy")
inlined = kernel(fastmath={"contract"}, error_model="numpy", forceinline=True)
summing = kernel(fastmath={"contract", "reassoc", "nsz", "nnan"}, error_model="numpy")
summing_inlined = kernel(fastmath={"contract", "reassoc", "nsz", "nnan"}, error_model="numpy", forceinline=True)


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
def quantise(x: Any, offset: Any, divisor: Any, last: float, out: Any) -> None:
    """Twelve- or eight-bit codes of a token."""
    for c in range(len(x)):
        position = (np.float64(x[c]) - offset[c]) / divisor[c] * 16.0
        out[c] = np.int32((min(max(position, 0.0), last) + ROUNDER) - ROUNDER)


@inlined
def residuals(x: Any, codes: Any, coarse: bool, origin: Any, step: Any, inverse: Any, read: Any, shares: Any, row: Any) -> None:
    """The grid's numbers of a token, at level 0 or with all bits, and their errors in steps: float64, and float32."""
    count = len(x)
    if coarse:
        for c in range(count):
            read[c] = origin[c] + step[c] * (np.float64(codes[c] >> 4) + MIDDLE)
    else:
        for c in range(count):
            read[c] = origin[c] + step[c] * (np.float64(codes[c]) * 0.0625)
    for c in range(count):
        shares[c] = (read[c] - np.float64(x[c])) * inverse[c]
    for c in range(count):
        row[c] = np.float32(shares[c])


@inlined
def without_step(x: Any, read: Any, inverse: Any) -> bool:
    """Whether a token has an error where its step is 0."""
    wrong = 0
    for c in range(len(x)):
        wrong += 1 if (inverse[c] == 0.0) & (read[c] != np.float64(x[c])) else 0
    return wrong > 0


@inlined
def raise_to(peak: Any, shares: Any) -> None:
    """Each channel's largest residual so far."""
    for c in range(len(peak)):
        share = abs(shares[c])
        peak[c] = share if share > peak[c] else peak[c]


@summing_inlined
def squares(x: Any) -> Any:
    """The sum of squares of float64 numbers."""
    total = 0.0
    for c in range(len(x)):
        total += x[c] * x[c]
    return total


@summing_inlined
def square(x: Any) -> Any:
    """The sum of squares of float32 numbers, in float64."""
    total = 0.0
    for c in range(len(x)):
        total += np.float64(x[c]) * np.float64(x[c])
    return total


@summing_inlined
def extremes(x: Any) -> Any:
    """Least and largest of a group."""
    low = high = x[0]
    for c in range(len(x)):
        low = x[c] if x[c] < low else low
        high = x[c] if x[c] > high else high
    return low, high


@summing
def _gram(rows: Any, out: Any) -> None:
    """`rows @ rows.T`, four by four products at a time. The number of rows is a multiple of `TILE`."""
    count, depth = rows.shape
    for i in range(0, count, TILE):
        for j in range(i, count, TILE):
            ae = af = ag = ah = be = bf = bg = bh = ce = cf = cg = ch = de = df = dg = dh = np.float32(0.0)
            for k in range(depth):
                a, b, c, d = rows[i, k], rows[i + 1, k], rows[i + 2, k], rows[i + 3, k]
                e, f, g, h = rows[j, k], rows[j + 1, k], rows[j + 2, k], rows[j + 3, k]
                ae += a * e
                af += a * f
                ag += a * g
                ah += a * h
                be += b * e
                bf += b * f
                bg += b * g
                bh += b * h
                ce += c * e
                cf += c * f
                cg += c * g
                ch += c * h
                de += d * e
                df += d * f
                dg += d * g
                dh += d * h
            out[i, j], out[i, j + 1], out[i, j + 2], out[i, j + 3] = ae, af, ag, ah
            out[i + 1, j], out[i + 1, j + 1], out[i + 1, j + 2], out[i + 1, j + 3] = be, bf, bg, bh
            out[i + 2, j], out[i + 2, j + 1], out[i + 2, j + 2], out[i + 2, j + 3] = ce, cf, cg, ch
            out[i + 3, j], out[i + 3, j + 1], out[i + 3, j + 2], out[i + 3, j + 3] = de, df, dg, dh
            for n in range(TILE):
                for m in range(TILE):
                    out[j + m, i + n] = out[i + n, j + m]


@exact
def round_up(x: float) -> Any:
    """`codecs.round_up`."""
    return np.float32(0.0) if x == 0.0 else np.float32(x * SLACK + TINY)


@exact
def spectral(rows: Any, tokens: int, norm: Any, turned: Any, one: Any, two: Any) -> Any:
    """`codecs.spectral_bound` of float32 `[tokens, channels]`, filled up with rows of zeros to a multiple of `TILE`.

    Args: turned: zeros, the filled up transpose, where there are more tokens than channels; one, two: scratch of a product.
    """
    channels = rows.shape[1]
    if norm == 0.0:
        return np.float32(0.0)
    power = math.ldexp(1.0, -math.frexp(np.float64(norm))[1])
    factor = np.float32(power)
    for t in range(tokens):
        row = rows[t]
        for c in range(channels):
            row[c] *= factor
    if tokens <= channels:
        _gram(rows, one)
    else:
        for t in range(tokens):
            for c in range(channels):
                turned[c, t] = rows[t, c]
        _gram(turned, one)
    _gram(one, two)
    _gram(two, one)
    rank, depth = min(tokens, channels), max(tokens, channels)
    rounding = (4 * (depth + 3) * rank + 3 * rank * rank) * 2.0**-24 / 8
    bound = square(one.reshape(-1)) ** 0.0625 * (1 + max(1e-3, 1.1 * rounding)) / power
    return round_up(min(bound, np.float64(norm) * np.sqrt(tokens)))


@exact
def length_codes(squares: Any, radius: float, out: Any) -> None:
    """`codecs.length_codes` of a block whose numbers are finite."""
    factor = codecs.LENGTHS * (1 + 2.0**-30)
    for t in range(len(squares)):
        share = squares[t] / (radius * radius) if radius > 0.0 else 0.0
        out[t] = np.int32(min(np.ceil(share * factor), float(codecs.LENGTHS)))


@inlined
def pack(codes: Any, shift: int, out: Any) -> None:
    """Four bits of each code, from `shift` on, two to a byte: `codecs.pack_nibbles`."""
    channels, half = len(codes), len(out)
    for c in range(channels - half):
        out[c] = ((codes[c] >> shift) & 15) | (((codes[c + half] >> shift) & 15) << 4)
    if 2 * half > channels:
        out[half - 1] = (codes[half - 1] >> shift) & 15
