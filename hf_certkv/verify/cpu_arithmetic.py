"""The innermost loops of the CPU kernel, as functions of arrays: for comparisons that know no tolerance.

Every function here is one of kernels/micro.py with nothing around it. float32 arrays, contiguous, of multiples of 16 numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..codecs import KeyCodec, ValueCodec
from ..kernels import cpu_pass, cpu_round, micro, micro_combine
from ..kernels.compiling import kernel
from .arithmetic import KINDS, count_failures
from .parts import Part

Numbers = Any  # np.ndarray


plain = kernel(error_model="numpy")


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
def _read_keys(queries: Numbers, codes: Numbers, grid: Numbers, out: Numbers) -> None:
    channels, tokens = queries.shape[1], len(codes)
    key, at, query, to = codes.ctypes.data, grid.ctypes.data, queries.ctypes.data, out.ctypes.data
    for row in range(0, len(queries), micro.ROWS):
        for token in range(0, tokens, micro.ROWS):
            start = row * tokens + token
            micro.dots_codes(key, token * channels, at, 0, query, row * channels, channels, to, start, tokens)
            if row % (2 * micro.ROWS):  # half of them one by one
                for r in range(row, row + micro.ROWS):
                    start = r * tokens + token
                    micro.dots_codes_1(key, token * channels, at, 0, query, r * channels, channels, to, start, tokens)


@plain
def _read_values(weights: Numbers, codes: Numbers, scale: Numbers, offset: Numbers, per: int, bits: int, out: Numbers) -> None:
    tokens, groups, width = len(codes), scale.shape[1], out.shape[1]
    v, s, o, w, to = codes.ctypes.data, scale.ctypes.data, offset.ctypes.data, weights.ctypes.data, out.ctypes.data
    for row in range(0, len(weights), micro.ROWS):
        if bits == 8:
            micro.gather_bytes(v, 0, s, o, groups, per, w, row * tokens, tokens, to, row * width, width)
        else:
            micro.gather_nibbles(v, 0, s, o, groups, per, w, row * tokens, tokens, to, row * width, width)
        if row % (2 * micro.ROWS):
            for r in range(row, row + micro.ROWS):
                if bits == 8:
                    micro.gather_bytes_1(v, 0, s, o, groups, per, w, r * tokens, tokens, to, r * width, width)
                else:
                    micro.gather_nibbles_1(v, 0, s, o, groups, per, w, r * tokens, tokens, to, r * width, width)


@plain
def _widened(bits: Numbers, dtype: int, out: Numbers) -> None:
    cpu_pass.widen(bits.ctypes.data, 0, len(out), dtype, out.ctypes.data)


@plain
def _values(weights: Numbers, values: Numbers, norms: Numbers, out: Numbers) -> None:
    tokens, width = values.shape
    at, value, steps = weights.ctypes.data, values.ctypes.data, norms.ctypes.data
    if len(weights) == 1:
        micro.gather_exact_1(value, 0, steps, steps, 0, 1, at, 0, tokens, out.ctypes.data, 0, width)
    else:
        micro.gather_exact(value, 0, steps, steps, 0, 1, at, 0, tokens, out.ctypes.data, 0, width)
    for t in range(tokens):
        norms[t] = micro.dot(value, t * width, value, t * width, width)


@plain
def _mixed(parts: Numbers, weights: Numbers, out: Numbers) -> None:
    width = parts.shape[1]
    micro_combine.mix(parts.ctypes.data, 0, width, weights.ctypes.data, len(parts), out.ctypes.data, width)


@plain
def _inners(parts: Numbers, output: Numbers, out: Numbers) -> None:
    width = parts.shape[1]
    micro_combine.inners(parts.ctypes.data, 0, width, output.ctypes.data, width, len(parts), out.ctypes.data)


@plain
def _sums(scores: Numbers, steps: Numbers, out: Numbers) -> None:
    micro.weigh(scores.ctypes.data, 0, len(scores), np.float32(0), steps.ctypes.data, 0, out.ctypes.data, 0)


@plain
def _moments(weights: Numbers, norms: Numbers) -> tuple[float, float]:
    return micro.moments(weights.ctypes.data, 0, norms.ctypes.data, 0, len(weights))


@plain
def _query_weights(sizes: Numbers, scales: Numbers) -> tuple[float, float]:
    return micro.query_weights(sizes.ctypes.data, 0, scales.ctypes.data, 0, len(sizes))


@plain
def _rounded(x: Numbers, shown: Numbers, out: Numbers, dtype: int) -> float:
    return cpu_round.rounded(x, shown, out.ctypes.data, 0, dtype)


def exp(x: Numbers) -> Numbers:
    """exp of numbers up to 0, and of NaN; of any count."""
    given = np.pad(x, (0, -len(x) % 16))
    out = np.empty_like(given)
    _exp(given, out, np.empty(16, np.float32))
    return out[: len(x)]


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
    norms, out = np.empty(tokens, np.float32), np.empty((len(weights), width), np.float32)
    _values(weights, values, norms, out)
    return out, norms


def mixed(parts: Numbers, weights: Numbers) -> Numbers:
    """Outputs of segments `[segments, channels]` by weights."""
    out = np.empty(parts.shape[1], np.float32)
    _mixed(parts, weights, out)
    return out


def inners(parts: Numbers, output: Numbers) -> Numbers:
    """Dot products of segments' outputs with the output."""
    out = np.empty(len(parts), np.float32)
    _inners(parts, output, out)
    return out


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


def widened(bits: Numbers, dtype: int) -> Numbers:
    """16-bit numbers, given by their bits, in float32."""
    out = np.empty(len(bits), np.float32)
    _widened(bits, dtype, out)
    return out


def weigh_products(factors: list[Numbers], got: float, roundings: int) -> tuple[bool, float]:
    """Whether a computed sum of products of finite float32 numbers is within gamma of the sum of their sizes, and its share.

    Args: factors: arrays `[n]`; roundings: n of gamma_n. A product may lose 2^-126 besides, once a factor.
    """
    if not math.isfinite(got):
        return False, math.inf
    places = 149 * len(factors)  # products are integers times 2^-places
    columns = [[int(x) for x in (factor.astype(np.float64) * 2.0**149).tolist()] for factor in factors]
    products = [math.prod(row) for row in zip(*columns, strict=True)]
    numerator, denominator = float(got).as_integer_ratio()
    error = abs(numerator * 2**places - denominator * sum(products)) * (2**24 - roundings)
    tiny = len(factors) * len(products) * 2 ** (places - 126) * (2**24 - roundings)
    allowed = denominator * (roundings * sum(map(abs, products)) + tiny)
    return error <= allowed, error / allowed


def chains(part: Part, generator: Generator, kind: str) -> None:
    """Every sum of the kernel on inputs of a kind, against the roundings that section 5 counts, as integers."""

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def drawn(*shape: int) -> Numbers:
        return KINDS[kind](shape, generator).float().contiguous().numpy()

    n, rows, tokens, width = pick(16, 32, 64, 96, 128, 256), pick(1, 4), pick(16, 32, 64, 128), pick(16, 32, 48, 80, 128)
    query, keys, weights, rest = drawn(rows, n), drawn(tokens, n), drawn(rows, tokens), drawn(width, tokens).T.copy()
    if "half a unit" in kind:
        query, weights = np.ones_like(query), np.ones_like(weights)
    found: list[tuple[str, list[Numbers], float, int]] = []
    tree = 4  # additions of a sum over sixteen lanes
    got = scores(query, keys)
    found += [("scores", [query[r], keys[t]], got[r, t], n // 16 + tree) for r in range(rows) for t in range(0, tokens, 5)]
    got, norms = values(weights, rest)
    found += [("values", [weights[r], rest[:, c]], got[r, c], tokens) for r in range(rows) for c in range(0, width, 7)]
    found += [("norms", [rest[t], rest[t]], norms[t], width // 16 + tree) for t in range(0, tokens, 5)]
    shares, many = np.abs(weights[0]), rest.T[:, :16].copy() if width < tokens else rest
    got = mixed(many, np.resize(shares, len(many)))
    found += [("segments", [np.resize(shares, len(many)), many[:, c]], got[c], len(many)) for c in range(0, many.shape[1], 7)]
    got = inners(rest, got_of := np.resize(weights[0], width))
    found += [("inner products", [rest[t], got_of], got[t], width // 16 + tree) for t in range(0, tokens, 5)]
    x = keys[0], np.abs(query[0])
    found.append(("dot", [*x], dot(*x), n // 16 + tree))
    first, second = query_weights(x[1], x[0])
    found.append(("query weights", [np.abs(x[0]), x[1]], first, n // 16 + tree))
    found.append(("query weights", [x[0], x[0], x[1], x[1]], second, n // 16 + tree + 2))
    given = -np.abs(drawn(1, tokens)[0]) - np.float32(3) * torch.rand(tokens, generator=generator).numpy()
    steps = np.abs(weights[0])
    w, of = sums(given, steps)
    one, added = np.ones_like(w), tokens // 16 + tree
    sizes = {0: [w, steps], 1: [w, w, steps, steps], 4: [w, one], 5: [w, w], 6: [w, w, w], 7: [w, w, w, w]}
    more = {0: 0, 1: 2, 4: 0, 5: 1, 6: 1, 7: 2}
    found += [("sums", factors, of[i], added + more[i]) for i, factors in sizes.items()]
    first, second = moments(w, norms)
    found += [("moments", [w, norms], first, added), ("moments", [w, w, norms], second, added + 1)]
    shares = part.figures.setdefault("cpu_chains_error_over_gamma", {})
    for name, factors, value, roundings in found:
        within, share = weigh_products(factors, float(value), roundings)
        part.checked += 1
        shares[name] = max(shares.get(name, 0.0), share)
        if not within:
            part.fail(f"CPU kernel, {name}, {kind}: {len(factors[0])} addends: {share:.6g} of the error allowed")


def decoded(part: Part, generator: Generator) -> None:
    """Numbers as the kernel reads them are those of the codecs bit for bit, in every channel and group."""
    for width, group in ((32, 16), (96, 48), (96, 0), (128, 32)):
        tokens = 16
        codes = torch.randint(0, 256, (tokens, width), generator=generator, dtype=torch.uint8)
        scale, offset = (torch.randn(2, width, generator=generator) * torch.exp2(torch.arange(width) % 30 - 15)).half()
        eye = np.eye(width, dtype=np.float32)
        out = np.empty((width, tokens), np.float32)
        _read_keys(eye, codes.numpy(), torch.stack([scale, offset]).float().numpy(), out)
        _compare(part, f"keys, {width} channels", out.T, KeyCodec(True).decode(codes, None, scale, offset))
        for bits in (4, 8):
            codec = ValueCodec(bits, group, True)
            groups = -(-width // codec.group_size(width))
            step, start = (torch.randn(2, tokens, groups, generator=generator) * 8).half()
            stored = codes if bits == 8 else codes[:, : width // 2].contiguous()
            one, values = np.eye(tokens, dtype=np.float32), out.T.copy()
            given = stored.numpy(), step.float().numpy(), start.float().numpy(), codec.group_size(width) // 16, bits
            _read_values(one, *given, values)
            _compare(part, f"int{bits} values, {width} channels", values, codec.decode(stored, None, step, start, width))
    bits_of = np.arange(2**16, dtype=np.uint16)
    for dtype, code in ((torch.float16, cpu_pass.FLOAT16), (torch.bfloat16, cpu_pass.BFLOAT16)):
        exact = torch.from_numpy(bits_of.view(np.int16)).view(dtype).float()
        wide = widened(bits_of, code)
        _compare(part, f"{dtype} numbers", wide[exact.isfinite().numpy()], exact[exact.isfinite()])
        _compare(part, f"{dtype}, not finite", np.isnan(wide) * 2 + np.isinf(wide), exact.isnan() * 2 + exact.isinf())
        back = rounded(wide, code)[0]
        _compare(part, f"{dtype} there and back", back[~exact.isnan().numpy()], torch.from_numpy(bits_of)[~exact.isnan()])


def _compare(part: Part, what: str, got: Numbers, exact: Tensor) -> None:
    wrong = int(np.count_nonzero(got != exact.numpy()))
    part.checked += exact.numel()
    count_failures(part, wrong, f"CPU kernel, {what}: {wrong} of {exact.numel()} are not those of the codecs")
