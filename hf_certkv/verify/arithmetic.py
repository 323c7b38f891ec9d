"""Single operations and chains of them, as docs/certificate.md, sections 5 and 7, assumes them: without tolerance.

Sums of products are compared as integers, on inputs whose roundings line up; functions in balls; the rest bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..bounds import MASS_FLOOR, UNIT_ROUNDOFF
from ..codecs import MIDDLE, KeyCodec, ValueCodec, pack_nibbles
from .oracle import at_most, decided, flint, upper
from .parts import Part

REFERENCE_ERROR = 2.0**-50  # relative, of numpy's float64 functions, which judge the float32 ones
FLOAT64_ERROR = 2.0**-42  # relative, of the backend's float64 functions in `combine` and bounds.py
Ball = Any  # flint.arb


def count_failures(part: Part, count: int, what: str) -> None:
    """Count failures that share one line of words."""
    if count:
        part.fail(what)
        part.failed += count - 1


def weigh(ball: Callable[[Ball], Ball], x: Any, y: float, relative: float, absolute: float) -> tuple[bool, float, float]:
    """Whether y is the function's value at x (number or ball) up to `relative`, or where that is 0 up to `absolute`.

    Returns: that, the error, and its share of what is allowed, both rounded up.
    """
    found = [math.inf, math.inf]

    def question() -> list[bool | None]:
        exact = ball(flint.arb(x))
        error, allowed = abs(exact - flint.arb(y)), abs(exact) * relative if relative else flint.arb(absolute)
        found[:] = [upper(error), upper(error / allowed)]
        return [at_most(error, allowed)]

    within = math.isfinite(y) and decided(question)[0]
    return within, found[0], found[1]


def codes(part: Part, device: torch.device, generator: Generator, every: int = 1) -> None:
    """Decoded numbers: S * position exact for every float16 step (or `every` so many) and position; adding z rounds once."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    nibbles = pack_nibbles(byte[:16])
    for scale in torch.arange(0, 0x7C00, every, dtype=torch.int16).view(torch.float16).split(256):
        n = len(scale)
        drawn = torch.randn(n, generator=generator) * torch.exp2(torch.rand(n, generator=generator) * 30 - 17)
        for offset in (torch.zeros_like(scale), drawn.to(torch.float16)):
            s, z = scale.to(device), offset.to(device)
            found = [(ValueCodec(8, 0, False).decode(byte.expand(n, 256), None, s[:, None], z[:, None], 256), byte / 16)]
            for low in (None, *range(16)):
                plane = torch.full((256, n), 17 * (low or 0), dtype=torch.uint8, device=device)  # the same nibble twice
                at_keys, at_values = (None, None) if low is None else (plane[:, : (n + 1) // 2], plane[:8].mT)
                keys = KeyCodec(True).decode(byte[:, None].expand(-1, n), at_keys, s, z).mT
                values = ValueCodec(4, 0, True).decode(nibbles.expand(n, 8), at_values, s[:, None], z[:, None], 16)
                position = byte + (MIDDLE if low is None else low / 16)
                found += [(keys, position), (values, position[:16])]
            for got, position in found:
                # In float64 product and sum are exact, so this is the exact number, rounded once.
                exact = offset[:, None].double() + scale[:, None].double() * position.cpu().double()
                wrong = int((got.cpu() != exact.float()).sum())
                part.checked += got.numel()
                count_failures(part, wrong, f"decoded numbers: {wrong} of {got.numel()} are not the exact ones, rounded once")


def basic_operations(part: Part, device: torch.device, generator: Generator, count: int = 2**18) -> None:
    """Sums, differences, products and the factor's cast are the exact results rounded once; a scalar costs a little more."""
    size = torch.exp2(torch.randint(-40, 40, (2, count), generator=generator).float())
    a, b = torch.randn(2, count, generator=generator) * size
    b[::2] = a[::2] * (1 + torch.randn(count, generator=generator)[::2] * 2.0**-9)  # of nearly one size
    x, y, scalar = a.double(), b.double(), 0.1 + math.pi * float(torch.rand((), generator=generator))
    near, far = a.to(device), b.to(device)
    pairs = {"sum": (near + far, x + y), "difference": (near - far, x - y), "product": (near * far, x * y)}
    pairs["cast"] = ((x / 3).to(device).float(), x / 3)
    for name, (got, exact) in pairs.items():
        # float64 and then float32 is rounding once, because 53 >= 2 * 24 + 2.
        wrong = int(np.count_nonzero(got.cpu().numpy() != exact.numpy().astype(np.float32)))
        count_failures(part, wrong, f"{name}: {wrong} of {count} are not the exact results rounded once")
    # The number is rounded to float32 first, and a device may divide by multiplying with a rounded reciprocal.
    for name, got, exact, roundings in (("scaled", near * scalar, x * scalar, 2), ("divided", near / scalar, x / scalar, 3)):
        worst = float(((got.cpu().double() - exact).abs() / exact.abs()).max()) / UNIT_ROUNDOFF
        part.figures[f"{name}_by_a_number_u"] = worst
        if not worst <= roundings * (1 + 2.0**-20):  # not so for NaN either; the last factor covers float64's share
            part.fail(f"{name} by {scalar!r}: off by {worst} units of 2^-24")
    part.checked += 6 * count


def float64_functions(part: Part, device: torch.device, generator: Generator, count: int = 2048) -> None:
    """Float64 as `combine` and bounds.py use it: exp of differences, expm1, tanh; and numpy's, which judge the float32 ones."""
    highest = torch.randn(count, generator=generator) * 100
    maximum = highest - 745 * torch.rand(count, generator=generator).square()
    factors = torch.exp(maximum.to(device).double() - highest.to(device).double())  # as in `combine`
    scores = [flint.arb(p) - flint.arb(q) for p, q in zip(maximum.tolist(), highest.tolist(), strict=True)]
    wide = torch.rand(count, generator=generator, dtype=torch.float64)
    sizes, inputs = torch.exp2(wide * 40 - 31), wide * 193 - 104
    cases: list[tuple[str, Callable[[Ball], Ball], list[Any], Any, float]] = [
        ("exp", lambda b: b.exp(), scores, factors, FLOAT64_ERROR),
        ("expm1", lambda b: b.expm1(), sizes.tolist(), torch.expm1(sizes.to(device)), FLOAT64_ERROR),
        ("tanh", lambda b: b.tanh(), sizes.tolist(), torch.tanh(sizes.to(device)), FLOAT64_ERROR),
        ("numpy exp", lambda b: b.exp(), inputs.tolist(), np.exp(inputs.numpy()), REFERENCE_ERROR),
        ("numpy tanh", lambda b: b.tanh(), sizes.tolist(), np.tanh(sizes.numpy()), REFERENCE_ERROR),
    ]
    shares = part.figures["float64_error_over_allowed"] = dict.fromkeys((case[0] for case in cases), 0.0)
    for name, ball, given, got, allowed in cases:
        for x, y in zip(given, got.tolist(), strict=True):
            # What is below the floor under masses counts as the floor.
            within, _, share = weigh(ball, x, y, allowed if y > MASS_FLOOR else 0.0, MASS_FLOOR)
            shares[name] = max(shares[name], share)
            if not within:
                part.fail(f"float64 {name}({float(x)!r}) is {y!r}: {share:.4g} of the error allowed")
        part.checked += count


# Chains of additions, from left `[batch, kv_heads, groups, rows, n]` and right `[batch, kv_heads, groups, n, columns]` to
# `[batch, kv_heads, groups, rows, columns]`, by the expression and from the strides that kernels/reference.py has.
def scores(left: Tensor, right: Tensor) -> Tensor:
    """Queries with keys; a group is a chunk of blocks."""
    keys = right.mT.contiguous()
    return torch.stack([left[:, :, g] @ keys[:, :, g : g + 1].flatten(2, 3).mT for g in range(left.shape[2])], dim=2)


def values(left: Tensor, right: Tensor) -> Tensor:
    """Weights with values; a group is a segment."""
    return left.transpose(2, 3).contiguous().transpose(2, 3) @ right


def sums(left: Tensor, right: Tensor) -> Tensor:
    """Sums of weights."""
    return left.transpose(2, 3).contiguous().sum(dim=-1).transpose(2, 3).unsqueeze(-1)


def squares(left: Tensor, right: Tensor) -> Tensor:
    """Sums of squared weights."""
    return left.transpose(2, 3).contiguous().square().sum(dim=-1).transpose(2, 3).unsqueeze(-1)


def segments(left: Tensor, right: Tensor) -> Tensor:
    """Factors with the segments' outputs; a group is a row."""
    output = right.permute(0, 1, 3, 2, 4).contiguous()
    return torch.einsum("bhrs,bhsrd->bhrd", left[:, :, :, 0].contiguous(), output).unsqueeze(3)


def moments(left: Tensor, right: Tensor) -> Tensor:
    """The output with the segments' outputs, over channels; a group is a row."""
    output = right.permute(0, 1, 4, 2, 3).contiguous()
    return torch.einsum("bhsrd,bhrd->bhrs", output, left[:, :, :, 0].contiguous()).unsqueeze(3)


CHAINS = {chain.__name__: chain for chain in (scores, values, sums, squares, segments, moments)}
SINGLE = ("sums", "squares")  # chains of one operand


def lanes(shape: tuple[int, ...], units: float) -> Tensor:
    """Ones for 1, 2, 4 .. 128 partial sums, then addends of about half a unit of their last place, which all round one way."""
    ones = 2 ** (torch.arange(shape[-2]) % 8)
    return torch.where(torch.arange(shape[-1]) < ones[:, None], 1.0, units * UNIT_ROUNDOFF).expand(shape)


KINDS: dict[str, Callable[[tuple[int, ...], Generator], Tensor]] = {
    "just over half a unit": lambda shape, g: lanes(shape, 1 + 2.0**-10),
    "just under half a unit": lambda shape, g: lanes(shape, 1 - 2.0**-10),
    "thirds": lambda shape, g: torch.full(shape, 1 / 3),
    "alternating": lambda shape, g: torch.exp2(torch.rand(shape, generator=g) * 24 - 12) * (-1.0) ** torch.arange(shape[-1]),
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "between 1 and 2": lambda shape, g: 1 + torch.rand(shape, generator=g),
    "underflowing": lambda shape, g: torch.randn(shape, generator=g) * 2.0**-64,
}
LENGTHS = (1, 2, 7, 16, 17, 32, 48, 64, 80, 96, 128, 129, 256, 257, 512, 1000, 2048, 4096)
OUTER = ((1, 1, 1), (1, 2, 3), (2, 2, 5), (1, 8, 2), (3, 4, 17))  # batch, KV heads, groups
MOST_NUMBERS = 2**20


def one_chain(part: Part, device: torch.device, generator: Generator, name: str, kind: str) -> None:
    """One chain of a random shape on inputs of a kind: its worst outputs against gamma_n, as integers."""

    def pick(choices: tuple[Any, ...]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    outer, n, rows, columns = (), MOST_NUMBERS, 1, 1
    while math.prod(outer) * n * (rows + columns) > MOST_NUMBERS:
        outer, n, rows, columns = pick(OUTER), pick(LENGTHS), pick((1, 2, 4, 7, 8, 32)), pick((1, 8, 64, 80, 128))
    rows = {"segments": 1, "moments": 1, "sums": 8, "squares": 8}.get(name, rows)
    left, right = KINDS[kind]((*outer, rows, n), generator), KINDS[kind]((*outer, columns, n), generator).mT
    if name in SINGLE:
        left = left.abs().sqrt() if name == "squares" else left
        right = left.mT if name == "squares" else torch.ones_like(left.mT)
    elif "half a unit" in kind:
        left = torch.ones_like(left)
    got = CHAINS[name](left.to(device), right.to(device)).cpu()
    # Which outputs are the worst is found in float64; whether they are within the bound is not.
    x, y = left.double(), right.double()
    if name in SINGLE:
        exact, size = (x * y.mT).sum(-1, True), (x * y.mT).abs().sum(-1, True)
    else:
        exact, size = x @ y, x.abs() @ y.abs()
    off = ((got.double() - exact).abs() / size.clamp_min(1e-300)).nan_to_num(math.inf, math.inf).flatten()
    shares = part.figures.setdefault("chains_error_over_gamma", {}).setdefault(name, {})
    for at in off.topk(min(8, len(off))).indices.tolist():
        b, h, g, row, column = (int(i) for i in np.unravel_index(at, got.shape))
        other = right[b, h, g, :, row if name in SINGLE else column]
        within, share = weigh_sum(left[b, h, g, row], other, float(got[b, h, g, row, column]), n - (name == "sums"))
        part.checked += 1
        shares[kind] = max(shares.get(kind, 0.0), share)
        if not within:
            told = f"{name}, {kind}: {n} addends, {tuple(left.shape)} by {tuple(right.shape)}"
            part.fail(f"{told}: {share:.6g} of the error allowed")


def weigh_sum(left: Tensor, right: Tensor, got: float, roundings: int) -> tuple[bool, float]:
    """Whether a computed sum of products is within gamma_n of the sum of their sizes, and its share of that.

    Args: left, right: float32 `[n]`, finite; roundings: n of gamma_n = n u / (1 - n u). A product may lose 2^-126 besides.
    """
    if not math.isfinite(got):
        return False, math.inf
    # Float32 numbers are integers times 2^-149, products integers times 2^-298.
    pairs = zip(left.double().mul(2.0**149).tolist(), right.double().mul(2.0**149).tolist(), strict=True)
    products = [int(a) * int(b) for a, b in pairs]
    error = abs(int(got * 2.0**298) - sum(products)) * (2**24 - roundings)
    allowed = roundings * sum(map(abs, products)) + len(products) * 2 ** (298 - 126) * (2**24 - roundings)
    return error <= allowed, error / allowed
