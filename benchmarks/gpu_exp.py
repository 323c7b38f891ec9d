"""The Triton kernels' elementary functions, on the device itself: every float32 that `exp32` is given, draws for float64.

What the certificate assumes of them (docs/certificate.md, section 5) is a statement about the device's arithmetic, too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.gpu_common import DeviceName, OutFolder, Part, device_of

UNIT = 2.0**-24
MOST_SINGLE, MOST_DOUBLE = 4 * UNIT, 2.0**-46
SMALLEST = 2.0**-126
LEAST = -104.0
MINUS_ZERO = 0x80000000  # bit patterns of -0.0 and onwards are numbers that fall
BLOCK = 1024


def patterns() -> int:
    """How many float32 there are from -0 down to LEAST."""
    return int(torch.tensor(LEAST).view(torch.int32).item()) + 2**31 + 1


def kernels() -> Any:
    """`apply(which, x)`: 0 for exp32, 1 for exp64, 2 for expm1_64, of a contiguous tensor of the kernel's type."""
    from benchmarks.gpu_exp_kernel import elementwise

    def apply(which: int, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        elementwise[(-(-x.numel() // BLOCK),)](x, out, x.numel(), WHICH=which, BLOCK=BLOCK)
        return out

    return apply


def single(apply: Any, device: torch.device, chunk: int, stride: int) -> dict[str, Any]:
    """exp32 over all patterns (every `stride`-th): largest relative error, largest value, and where both are."""
    total = patterns()
    worst = torch.zeros((), dtype=torch.float64, device=device)
    where, largest = worst.clone(), worst.clone()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for first in range(0, total, chunk * stride):
        bits = torch.arange(first, min(first + chunk * stride, total), stride, device=device) + (MINUS_ZERO - 2**32)
        x = bits.to(torch.int32).view(torch.float32)
        found, exact = apply(0, x).double(), torch.exp(x.double())
        normal = exact >= SMALLEST
        error = torch.where(normal, (found - exact).abs() / exact, torch.zeros_like(exact))
        # Below the smallest normal number, 0 or what is near it.
        wrong += (~normal & ~((found >= 0) & (found <= SMALLEST * (1 + MOST_SINGLE)))).sum()
        wrong += (~torch.isfinite(found)).sum()
        most, place = error.max(dim=0)
        where, worst = torch.where(most > worst, x[place].double(), where), torch.maximum(worst, most)
        largest = torch.maximum(largest, found.max())
    special = torch.tensor([0.0, -0.0, float("nan"), float("-inf"), -1e30], device=device)
    at = apply(0, special).cpu()
    return {
        "patterns": -(-total // stride),
        "of": total,
        "largest_relative_error": float(worst),
        "over_unit": float(worst) / UNIT,
        "at": float(where),
        "largest_value": float(largest),
        "wrong": int(wrong),
        "exact_at_zero": bool((at[:2] == 1).all()),
        "nan_stays": bool(at[2].isnan()),
        "far_below_is_zero": bool((at[3:] == 0).all()),
    }


def double(apply: Any, device: torch.device, chunk: int, points: int, seed: int = 0) -> dict[str, Any]:
    """exp64 and expm1_64 at random points, near 0 and far: largest relative errors against torch's own."""
    generator = torch.Generator(device).manual_seed(seed)
    out: dict[str, Any] = {"points": points}
    for name, which, exactly in (("exp64", 1, torch.exp), ("expm1_64", 2, torch.expm1)):
        worst = torch.zeros((), dtype=torch.float64, device=device)
        for first in range(0, points, chunk):
            count = min(chunk, points - first)
            draws = torch.rand(2, count, dtype=torch.float64, device=device, generator=generator)
            # Half evenly up to 700, half with even exponents down to 1e-12.
            x = torch.where(torch.arange(count, device=device) % 2 == 0, 700 * draws[0], 10 ** (-12 + 14.8 * draws[1]))
            x = x.clamp(max=700.0) * (-1 if which == 1 else 1)
            found, exact = apply(which, x.contiguous()), exactly(x)
            error = ((found - exact) / exact).abs()
            worst = torch.maximum(worst, error.nan_to_num(nan=torch.inf).max())
        ends = torch.tensor([0.0, float("nan"), -1e4 if which == 1 else 1e4], dtype=torch.float64, device=device)
        at = apply(which, ends).cpu()
        fine = at[0] == (1 if which == 1 else 0) and at[1].isnan() and at[2] == (0 if which == 1 else torch.inf)
        out[name] = {"largest_relative_error": float(worst), "ends_are_right": bool(fine)}
    return out


def main(
    device: DeviceName = "cuda",
    out: OutFolder = Path("gpu_out"),
    points: Annotated[int, typer.Option(help="random points of each float64 function")] = 10**8,
) -> None:
    """Check, and end with status 1 where an error is larger than the certificate allows."""
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    place = device_of(device)
    apply = kernels()
    chunk, stride = (2**26, 1) if place.type == "cuda" else (2**12, 2**16 + 1)
    part = Part("exp", place, out)
    with part.attempt("exp32"):
        found = part.result["exp32"] = single(apply, place, chunk, stride)
        part.check(found["largest_relative_error"] <= MOST_SINGLE, f"exp32 is off by {found['over_unit']:.3f} u")
        part.check(found["largest_value"] <= 1, f"exp32 reaches {found['largest_value']}")
        part.check(found["wrong"] == 0, f"exp32: {found['wrong']} values of small numbers are out of range")
        part.check(found["exact_at_zero"] and found["nan_stays"] and found["far_below_is_zero"], "exp32: 0, NaN or -inf")
        print(
            f"exp32: {found['patterns']:,} of {found['of']:,} numbers, at most {found['over_unit']:.4f} u off at {found['at']}"
        )
    with part.attempt("exp64, expm1_64"):
        wide = part.result["float64"] = double(apply, place, chunk // 4, points if place.type == "cuda" else 2**12)
        for name in ("exp64", "expm1_64"):
            error = wide[name]["largest_relative_error"]
            part.check(error < MOST_DOUBLE and wide[name]["ends_are_right"], f"{name} is off by {error:.3g}")
            print(f"{name}: {wide['points']:,} points, at most {error:.3g} off")
    part.close()


if __name__ == "__main__":
    typer.run(main)
