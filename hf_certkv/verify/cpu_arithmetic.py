"""The innermost loops of the CPU kernel, as functions of arrays: for comparisons that know no tolerance.

Every function here is one of kernels/micro.py with nothing around it. float32 arrays, contiguous, of multiples of 16 numbers.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from ..kernels import cpu_certify, micro

Numbers = Any  # np.ndarray
plain = numba.njit(nogil=True, error_model="numpy")


@plain
def _exp(x: Numbers, out: Numbers, sums: Numbers) -> None:
    out[:] = x
    micro.weigh(out.ctypes.data, 0, len(out), np.float32(0), x.ctypes.data, 0, sums.ctypes.data, 0)


@plain
def _dot(x: Numbers, y: Numbers) -> float:
    return micro.dot(x.ctypes.data, 0, y.ctypes.data, 0, len(x))


@plain
def _scores(query: Numbers, keys: Numbers, out: Numbers) -> None:
    channels = query.shape[1]
    at, key, to = query.ctypes.data, keys.ctypes.data, out.ctypes.data
    for token in range(0, len(keys), micro.ROWS):
        if len(query) == 1:
            micro.dots_exact_1(key, token * channels, key, 0, at, 0, channels, to, token, len(keys))
        else:
            micro.dots_exact(key, token * channels, key, 0, at, 0, channels, to, token, len(keys))


@plain
def _values(weights: Numbers, values: Numbers, squares: Numbers, out: Numbers) -> None:
    tokens, width = values.shape
    at, value, steps = weights.ctypes.data, values.ctypes.data, squares.ctypes.data
    if len(weights) == 1:
        micro.gather_exact_1(value, 0, steps, steps, 0, 1, at, 0, tokens, squares.ctypes.data, out.ctypes.data, 0, width)
    else:
        micro.gather_exact(value, 0, steps, steps, 0, 1, at, 0, tokens, squares.ctypes.data, out.ctypes.data, 0, width)


@plain
def _sums(scores: Numbers, steps: Numbers, out: Numbers) -> None:
    micro.weigh(scores.ctypes.data, 0, len(scores), np.float32(0), steps.ctypes.data, 0, out.ctypes.data, 0)


@plain
def _moments(weights: Numbers, norms: Numbers) -> tuple[float, float]:
    return micro.moments(weights.ctypes.data, 0, norms.ctypes.data, 0, len(weights))


@plain
def _row_sums(numbers: Numbers, out: Numbers) -> None:
    micro.row_sums(numbers.ctypes.data, 0, len(out), out.ctypes.data, 0)


@plain
def _query_weights(sizes: Numbers, scales: Numbers) -> tuple[float, float]:
    return micro.query_weights(sizes.ctypes.data, 0, scales.ctypes.data, 0, len(sizes))


@plain
def _rounded(x: Numbers, shown: Numbers, out: Numbers, dtype: int) -> float:
    return cpu_certify._round(x, shown, out.ctypes.data, 0, dtype)


def exp(x: Numbers) -> Numbers:
    """exp of numbers up to 0, and of NaN."""
    out = np.empty_like(x)
    _exp(x, out, np.empty(16, np.float32))
    return out


def dot(x: Numbers, y: Numbers) -> float:
    """A dot product."""
    return float(_dot(x, y))


def scores(query: Numbers, keys: Numbers) -> Numbers:
    """Queries `[1 or 4, channels]` with keys `[tokens, channels]`."""
    out = np.empty((len(query), len(keys)), np.float32)
    _scores(query, keys, out)
    return out


def values(weights: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """Weights `[1 or 4, tokens]` by values `[tokens, channels]`, and the values' squared norms."""
    tokens, width = values.shape
    squares, out = np.empty((tokens, 16), np.float32), np.empty((len(weights), width), np.float32)
    _values(weights, values, squares, out)
    norms = np.empty(tokens, np.float32)
    _row_sums(squares, norms)
    return out, norms


def sums(scores: Numbers, steps: Numbers) -> tuple[Numbers, Numbers]:
    """The weights exp(score), and sums of w s, (w s)^2, 0, 0, w, w^2, w^3, w^4."""
    weights, out = scores.copy(), np.empty(8, np.float32)
    _sums(weights, steps, out)
    return weights, out


def moments(weights: Numbers, norms: Numbers) -> tuple[float, float]:
    """Sums of w n and of w^2 n."""
    first, second = _moments(weights, norms)
    return float(first), float(second)


def query_weights(sizes: Numbers, scales: Numbers) -> tuple[float, float]:
    """Sums of s |S| and of its square."""
    first, second = _query_weights(sizes, scales)
    return float(first), float(second)


def rounded(x: Numbers, dtype: int) -> tuple[Numbers, float]:
    """Bits of float32 numbers in a cache's type (`cpu_pass.FLOAT16` or `BFLOAT16`), and the norm of what was written."""
    out = np.empty(len(x), np.uint16)
    norm = _rounded(x, np.empty_like(x), out, dtype)
    return out, float(norm)
