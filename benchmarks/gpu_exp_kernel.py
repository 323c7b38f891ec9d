"""The kernel of `gpu_exp`: in a file of its own, since triton is imported when it is wanted and not before."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from hf_certkv.kernels.triton_common import exp32, exp64, expm1_64


@triton.jit
def elementwise(x_at, out_at, count, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    """out = exp32, exp64 or expm1_64 of x, by WHICH."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + place, mask=place < count, other=0.0)
    if WHICH == 0:
        found = exp32(x)
    elif WHICH == 1:
        found = exp64(x)
    else:
        found = expm1_64(x)
    tl.store(out_at + place, found, mask=place < count)
