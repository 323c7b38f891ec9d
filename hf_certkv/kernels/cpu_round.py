"""Outputs rounded to the cache's type, in numba."""

from __future__ import annotations

import math

import numpy as np

from . import memory
from .compiling import part
from .cpu_pass import BFLOAT16, FLOAT32


@part
def rounded(output: np.ndarray, shown: np.ndarray, result: int, start: int, dtype: int) -> float:
    """Write an output in the cache's type, rounded to nearest even; the L2 norm of what was written."""
    count, total = len(output), 0.0
    bits, shown_bits = memory.uint32s(output.ctypes.data, count), memory.uint32s(shown.ctypes.data, count)
    if dtype == FLOAT32:
        numbers = memory.float32s(result + 4 * start, count)
        for c in range(count):
            shown[c] = numbers[c] = output[c]
    elif dtype == BFLOAT16:
        halves = memory.uint16s(result + 2 * start, count)
        for c in range(count):
            upper = np.uint32(bits[c] + np.uint32(0x7FFF) + ((bits[c] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            if output[c] != output[c]:
                upper = np.uint32(0x7FC0)
            halves[c] = upper
            shown_bits[c] = upper << np.uint32(16)
    else:
        halves = memory.uint16s(result + 2 * start, count)
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
