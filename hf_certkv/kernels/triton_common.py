"""What the Triton kernels share: whether they can run, and elementary functions whose error is known.

Under `TRITON_INTERPRET=1` (set before triton is imported) the same kernels run on CPU tensors, one program after the other:
how they are tested where there is no GPU.

NaN must stay NaN in a certificate, so maxima and minima of what is certified are `most` and `least`, never `tl.maximum`.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

from .. import bounds
from ..codecs import MIDDLE as CELL_MIDDLE

# Arguments that change as a cache grows, or from call to call: no kernel is compiled anew because one of them is 1, or a
# multiple of 16.
CHANGING = (
    "blocks", "segments", "chunks", "key_room", "value_room", "page_room", "key_plane_room", "value_plane_room",
    "rows_per_slab",
    "value_pages", "span", "heads", "units", "tokens", "chain", "max_rounds", "exact", "slots", "block_bias_batch",
    "block_bias_head", "block_bias_row", "exact_bias_batch", "exact_bias_head", "exact_bias_row",
)  # fmt: skip


MIDDLE: Any = tl.constexpr(CELL_MIDDLE)
INFINITY: Any = tl.constexpr(float("inf"))
OUTWARD: Any = tl.constexpr(bounds.OUTWARD)
TINY: Any = tl.constexpr(bounds.TINY)
FLOOR: Any = tl.constexpr(bounds.MASS_FLOOR)
UNIT: Any = tl.constexpr(bounds.UNIT_ROUNDOFF)

# exp of float32: Cephes' polynomial, as the CPU kernel has it (docs/certificate.md, section 5).
LOG2_E: Any = tl.constexpr(1.44269504088896341)
LOG_2_HIGH: Any = tl.constexpr(0.693359375)
LOG_2_LOW: Any = tl.constexpr(-2.12194440e-4)
LEAST_EXPONENT: Any = tl.constexpr(-87.3365478515625)  # exp of less is below 2^-126, and 0 here
# exp of float64, log 2 in two parts, the first with zeros at its end.
WIDE_LOG_2_HIGH: Any = tl.constexpr(0.6931471803691238)
WIDE_LOG_2_LOW: Any = tl.constexpr(1.9082149292705877e-10)


def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def power_of_two(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << max(0, x - 1).bit_length()


@triton.jit
def least(x, y):
    """The smaller of two numbers; NaN if one is."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def most(x, y):
    """The larger of two numbers; NaN if one is."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def whole(x):
    """float32 to the nearest whole number, for |x| below 2^22: by an addition that leaves no room for more."""
    magic = 12582912.0  # 1.5 * 2^23
    return (x + magic) - magic


@triton.jit
def exp32(x):
    """exp of float32 x <= 0: within 4u; exactly 1 at 0, never above 1, 0 below LEAST_EXPONENT; NaN for NaN.

    Not `tl.exp`, whose argument is multiplied by log2(e) in float32: that is off by 2^-17 for the smallest weights.
    """
    inside = tl.where(x >= LEAST_EXPONENT, x, 0.0)
    k = whole(inside * LOG2_E)
    r = (inside - k * LOG_2_HIGH) - k * LOG_2_LOW
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    grown = 1.0 + (r + r * r * p)
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    found = grown * power
    found = tl.where(found > 1.0, 1.0, found)
    return tl.where(x >= LEAST_EXPONENT, found, tl.where(x == x, 0.0, x))


@triton.jit
def _series(r):
    """(exp(r) - 1) / r of float64 |r| <= log(2) / 2, within 2^-50: 15 terms."""
    p = r * 0.0 + 1.0 / 1307674368000.0
    p = p * r + 1.0 / 87178291200.0
    p = p * r + 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    return p * r + 1.0


@triton.jit
def _parts64(x):
    """n and r with x = n log 2 + r, and 2^n: float64, x within [-700, 700]."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * WIDE_LOG_2_HIGH) - n * WIDE_LOG_2_LOW
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return r, power


@triton.jit
def exp64(x):
    """exp of float64 x <= 0, relative error below 2^-48; 0 below -700; NaN stays NaN."""
    inside = tl.where(x >= -700.0, x, 0.0)
    r, power = _parts64(inside)
    found = power * (1.0 + r * _series(r))
    return tl.where(x >= -700.0, found, tl.where(x == x, 0.0, x))


@triton.jit
def expm1_64(x):
    """exp(x) - 1 of float64 x >= 0, relative error below 2^-48; infinite from 700 on; NaN stays NaN."""
    inside = tl.where(x <= 700.0, x, 0.0)
    r, power = _parts64(inside)
    found = power * (r * _series(r)) + (power - 1.0)
    return tl.where(x <= 700.0, found, tl.where(x == x, INFINITY, x))


@triton.jit
def gamma(n):
    """`bounds.gamma`, float64."""
    product = n * UNIT
    return tl.where(product < 1.0, product / (1.0 - product), INFINITY)


@triton.jit
def rounded(x, kind: tl.constexpr):
    """float32 to a model's type, to nearest and to even: the interpreter cuts bfloat16 off instead."""
    if kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        found = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        found = x.to(kind)
    return found
