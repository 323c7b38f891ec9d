"""What the Triton kernels are made of, element by element and product by product: for comparisons that know no tolerance.

Every function here is one of `kernels/triton_*.py` with nothing around it, or a product as those have it.
"""

from __future__ import annotations

# mypy: allow-untyped-defs
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Generator, Tensor

from ..bounds import TINY
from ..kernels.triton_common import exp32, exp64, expm1_64, interpreted, rounded
from ..kernels.triton_dense import tanh32
from ..kernels.triton_pass import tanh
from .arithmetic import FLOAT64_ERROR, KINDS, count_failures, weigh, weigh_sum
from .oracle import flint
from .parts import Part

EXP32, TANH, TANH32, EXP64, EXPM1 = (tl.constexpr(i) for i in range(5))


@triton.jit
def _elementwise(x, y, count, FUNCTION: tl.constexpr, MANY: tl.constexpr):
    """Grid (programs,): a function of each number."""
    at = tl.program_id(0) * MANY + tl.arange(0, MANY)
    given = tl.load(x + at, mask=at < count, other=0.0)
    if FUNCTION == EXP32:
        found = exp32(given)
    elif FUNCTION == TANH:
        found = tanh(given)
    elif FUNCTION == TANH32:
        found = tanh32(given)
    elif FUNCTION == EXP64:
        found = exp64(given)
    else:
        found = expm1_64(given)
    tl.store(y + at, found, mask=at < count)


@triton.jit
def _rounded(x, y, count, MANY: tl.constexpr):
    """Grid (programs,): float32 numbers in the type of `y`."""
    at = tl.program_id(0) * MANY + tl.arange(0, MANY)
    given = tl.load(x + at, mask=at < count, other=0.0)
    tl.store(y + at, rounded(given, y.dtype.element_ty), mask=at < count)


@triton.jit
def _product(x, y, out, N: tl.constexpr, KIND: tl.constexpr):
    """One program: rows `[16, N]` by columns `[N, 16]`: of bytes (0), whole numbers in float16 (1), or float32 (2)."""
    few, many = tl.arange(0, 16), tl.arange(0, N)
    left = tl.load(x + few[:, None] * N + many[None, :])
    right = tl.load(y + many[:, None] * 16 + few[None, :])
    if KIND == 0:
        made = tl.dot(left, right, out_dtype=tl.int32)
    elif KIND == 1:
        made = tl.dot(left, right)
    else:
        made = tl.dot(left, right, input_precision="ieee")
    tl.store(out + few[:, None] * 16 + few[None, :], made)


def _map(kernel: Any, x: Tensor, y: Tensor, *which: Any) -> Tensor:
    x = x.contiguous()
    many = 2**16 if interpreted() else 1024
    kernel[(-(-x.numel() // many),)](x, y, x.numel(), *which, MANY=many)
    return y


def of(which: Any) -> Callable[[Tensor], Tensor]:
    """A function of the kernels, by its number here, of float32 or float64 tensors."""
    return lambda x: _map(_elementwise, x, torch.empty_like(x, memory_format=torch.contiguous_format), which.value)


def exp(x: Tensor) -> Tensor:
    """exp of what it is used for, differences from a largest score; the backend's above 0."""
    return torch.where(x > 0, torch.exp(x), of(EXP32)(x))


def wide(part: Part, device: torch.device, generator: Generator, count: int = 1024) -> None:
    """float64 exp of numbers up to 0, and expm1 of others; casts are the exact results rounded once."""
    sizes = torch.rand(count, generator=generator, dtype=torch.float64)
    below, above = -700 * sizes.square(), torch.exp2(sizes * 40 - 31)
    functions: tuple[tuple[str, Any, Callable[[Any], Any], Tensor], ...] = (
        ("exp64", EXP64, lambda b: b.exp(), below),
        ("expm1_64", EXPM1, lambda b: b.expm1(), above),
    )
    shares = part.figures["triton_float64_error_over_allowed"] = dict.fromkeys((case[0] for case in functions), 0.0)
    for name, which, ball, given in functions:
        for x, y in zip(given.tolist(), of(which)(given.to(device)).tolist(), strict=True):
            within, _, share = weigh(ball, flint.arb(x), y, FLOAT64_ERROR, TINY)
            shares[name] = max(shares[name], share)
            if not within:
                part.fail(f"Triton's {name}({x!r}) is {y!r}: {share:.4g} of the error allowed")
        part.checked += count
    x = torch.randn(2**16, generator=generator) * torch.exp2(torch.randint(-30, 20, (2**16,), generator=generator).float())
    for dtype in (torch.float16, torch.bfloat16):
        got = _map(_rounded, x.to(device), torch.empty(len(x), dtype=dtype, device=device))
        wrong = int((got.cpu() != x.to(dtype)).sum())
        part.checked += len(x)
        count_failures(part, wrong, f"Triton's cast to {dtype}: {wrong} of {len(x)} are not the nearest")


def products(part: Part, device: torch.device, generator: Generator, kind: str) -> None:
    """Digits by codes: whole numbers, exactly. float32 by float32: within gamma_n, as integers."""
    for n in (32, 128, 256):
        digits, codes = (torch.randint(-128, 128, size, generator=generator).to(torch.int8) for size in ((16, n), (n, 16)))
        cases = [(digits, codes, torch.int32, 0)]
        # Sums of codes by digits stay below 2^24.
        cases += [
            (torch.randint(-size, size + 1, (16, n), generator=generator).half(),
             torch.randint(0, most + 1, (n, 16), generator=generator).half(), torch.float32, 1)
            for size, most in ((1024, 15), (1024 if n <= 64 else 2**23 // (n * 256), 255), (128, 128))
        ]  # fmt: skip
        for left, right, dtype, number in cases:
            got = _dot(left, right, dtype, number, device)
            wrong = int((got != (left.double() @ right.double()).to(dtype)).sum())
            part.checked += got.numel()
            count_failures(part, wrong, f"Triton's product of {left.dtype}, {n} addends: {wrong} are not exact")
        left, right = KINDS[kind]((16, n), generator).float(), KINDS[kind]((16, n), generator).float().mT.contiguous()
        got = _dot(left, right, torch.float32, 2, device)
        shares = part.figures.setdefault("triton_products_error_over_gamma", {})
        for row, column in np.ndindex(4, 4):
            within, share = weigh_sum(left[row], right[:, column], float(got[row, column]), n)
            shares[kind] = max(shares.get(kind, 0.0), share)
            part.checked += 1
            if not within:
                part.fail(f"Triton's product, {kind}: {n} addends: {share:.6g} of the error allowed")


def _dot(left: Tensor, right: Tensor, dtype: torch.dtype, number: int, device: torch.device) -> Tensor:
    out = torch.empty(16, 16, dtype=dtype, device=device)
    _product[(1,)](left.to(device), right.to(device), out, left.shape[1], number)
    return out.cpu()
