"""Whether this machine's arithmetic is what docs/certificate.md, sections 5 and 7, assumes it to be.

Every float32 number goes through the backend's `exp`, `tanh` and casts, as far as the budget lasts: in three layouts, because a
library may compute full vectors, tails and strided tensors by different code, and on a CPU also with subnormal numbers flushed.
Single operations and sums are in arithmetic.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import device_decode
from ..bounds import EXP_ERROR, OUTPUT_ROUNDOFF, TANH_ERROR, TINY, UNIT_ROUNDOFF
from ..kernels import cpu
from ..precision import full_precision
from . import kernel
from .arithmetic import (
    CHAINS,
    KINDS,
    REFERENCE_ERROR,
    Ball,
    basic_operations,
    codes,
    count_failures,
    float64_functions,
    one_chain,
    weigh,
)
from .parts import Clock, Part

PAGE = 2**16  # inputs of a page, and pages in all: a page has every high half of 32 bits, with one low half
FIRST_PAGES, SHAPES = 16, 4  # whatever the clock says: pages, and shapes of every kind of sum
SUMS_EVERY = 64  # pages between further sums
OVERFLOW = 2.0**128  # what infinity stands for: the first power of two that float32 does not hold
WRONG = 1e300  # the most that error / allowed is said to be: NaN where there should be a number, or the reverse
KEPT = 8  # worst inputs of a function and zone, judged again in balls
Numbers = Any  # np.ndarray


@dataclass(frozen=True)
class Function:
    """A float32 function, elementwise, and the error that section 5 allows it.

    Attributes: name; call: of the backend; exact: float64 to float64; allowed: from result and exact result, both float64;
        ball: the same function of balls; limit: of error / allowed, below 1 by what `exact` may be off; layouts: whether every
        layout is tried, or the contiguous one alone.
    """

    name: str
    call: Callable[[Tensor], Tensor]
    exact: Callable[[Numbers], Numbers]
    allowed: Callable[[Numbers, Numbers], Numbers]
    ball: Callable[[Ball], Ball]
    limit: float = 1 - 2 * REFERENCE_ERROR / min(EXP_ERROR, TANH_ERROR)
    layouts: bool = True


def cast(dtype: torch.dtype) -> Function:
    """The output's cast to a 16-bit type. What overflows is left out: it goes dense."""
    relative, absolute = OUTPUT_ROUNDOFF[dtype]

    def call(x: Tensor) -> Tensor:
        y = x.to(dtype).float()
        return torch.where(torch.isinf(y), x, y)

    return Function(str(dtype)[6:], call, lambda x: x, lambda y, _: relative * np.abs(y) + absolute, lambda x: x, 1.0, False)


def exp_allowed(y: Numbers, exact: Numbers) -> Numbers:
    """A relative error; where the result is below the normal numbers, an absolute one."""
    return np.maximum(EXP_ERROR * exact, TINY * (y < TINY))


FUNCTIONS = (
    Function("exp", lambda x: torch.exp(x), np.exp, exp_allowed, lambda x: x.exp()),
    Function("tanh", lambda x: torch.tanh(x), np.tanh, lambda y, _: np.full_like(y, TANH_ERROR), lambda x: x.tanh()),
    cast(torch.float16),
    cast(torch.bfloat16),
)


def cpu_exp(x: Tensor) -> Tensor:
    """exp of the CPU kernel for what it is used for, differences from a largest score; the backend's above 0."""
    from . import cpu_arithmetic

    return torch.where(x > 0, torch.exp(x), torch.from_numpy(cpu_arithmetic.exp(x.numpy())))


CPU_EXP = Function("cpu exp", cpu_exp, np.exp, exp_allowed, lambda x: x.exp(), layouts=False)
EXPONENTIALS = ("exp", "cpu exp", "triton exp")


def has_cpu_kernel(device: torch.device) -> bool:
    """Whether the CPU kernel's arithmetic is to be looked at."""
    return device.type == "cpu" and cpu.installed() and kernel.chosen() in ("auto", "cpu")


def has_triton_kernels(device: torch.device) -> bool:
    """Whether the arithmetic of the Triton kernels is to be looked at."""
    return kernel.chosen() == "triton" or (kernel.chosen() == "auto" and device.type == "cuda" and device_decode.installed())


def triton_functions() -> tuple[Function, ...]:
    """Those of the Triton kernels."""
    from . import triton_arithmetic as own

    def bent(name: str, call: Callable[[Tensor], Tensor]) -> Function:
        return Function(name, call, np.tanh, lambda y, _: np.full_like(y, TANH_ERROR), lambda x: x.tanh(), layouts=False)

    return (
        Function("triton exp", own.exp, np.exp, exp_allowed, lambda x: x.exp(), layouts=False),
        bent("triton tanh", own.of(own.TANH)),
        bent("triton dense tanh", own.of(own.TANH32)),
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": lambda x: torch.stack([x, x], dim=-1)[:, 0],
    "rows of seven": lambda x: F.pad(F.pad(x, (0, -len(x) % 7)).view(-1, 7), (0, 1))[:, :7],
}


@contextmanager
def flushing(wanted: bool) -> Iterator[bool]:
    """Subnormal numbers flushed to zero on the CPU, or not; gives whether this CPU can. The setting is put back."""
    before = bool(torch.full((1,), TINY) * 0.5 == 0)
    try:
        yield torch.set_flush_denormal(wanted)
    finally:
        torch.set_flush_denormal(before)


@dataclass
class Tally:
    """What is known of a function so far.

    Attributes: worst: by zone (`normal` or `subnormal` results) the largest of error / allowed, with the input's bits, the
        result and the layout; ulps: largest error in units of a normal result's last place; largest: result for inputs of at
        most 0; differ: by layout, inputs whose result is not the contiguous one's.
    """

    worst: dict[str, list[tuple[float, int, float, str]]] = field(default_factory=lambda: {"normal": [], "subnormal": []})
    ulps: float = 0.0
    largest: float = 0.0
    differ: dict[str, int] = field(default_factory=dict)


class Sweep:
    """Float32 numbers through every function, layout and mode. Args: part: where failures go; device: the backend's."""

    def __init__(self, part: Part, device: torch.device) -> None:
        self.part, self.device = part, device
        self.functions: tuple[Function, ...] = (*FUNCTIONS, CPU_EXP) if has_cpu_kernel(device) else FUNCTIONS
        self.functions += triton_functions() if has_triton_kernels(device) else ()
        self.tally = {function.name: Tally() for function in self.functions}

    def results(self, call: Callable[[Tensor], Tensor], x: Tensor, layouts: bool = True) -> dict[str, Numbers]:
        """A function of float32 `[n]`, by layout and mode."""
        found = {"contiguous": call(x)}
        if layouts:
            found |= {name: call(place(x)).flatten()[: len(x)] for name, place in LAYOUTS.items()}
        if self.device.type == "cpu":
            with flushing(True) as able:
                found |= {"flushed": call(x)} if able else {}
        return {name: y.cpu().numpy() for name, y in found.items()}

    def page(self, bits: Numbers) -> None:
        """Judge inputs given by their bits, uint32 `[n]`."""
        x = torch.from_numpy(bits.view(np.float32)).to(self.device)
        for function in self.functions:
            results, differ = self.results(function.call, x, function.layouts), self.tally[function.name].differ
            first = results.pop("contiguous")
            self.judge(function, bits, first, "contiguous")
            for name, y in results.items():
                other = (y != first) & ((y == y) | (first == first))  # two NaNs are no difference
                differ[name] = differ.get(name, 0) + int(other.sum())
                if other.any():
                    self.judge(function, bits[other], y[other], name)
        self.part.checked += len(bits) * len(self.functions)

    def judge(self, function: Function, bits: Numbers, result: Numbers, layout: str) -> None:
        """Compare results, float32 `[n]`, with float64 ones."""
        tally, x, y = self.tally[function.name], bits.view(np.float32), result.astype(np.float64)
        exact = function.exact(x.astype(np.float64)).clip(-OVERFLOW, OVERFLOW)
        error = np.fmax(np.abs(y.clip(-OVERFLOW, OVERFLOW) - exact), 0.0)  # fmax: 0 for NaN
        share = np.fmax(error / function.allowed(y, exact), 0.0)
        share[np.isnan(x) != np.isnan(result)] = WRONG
        np.minimum(share, WRONG, out=share)
        tiny = np.abs(result) < TINY
        for zone, here in (("normal", share * ~tiny), ("subnormal", share * tiny)):
            at, kept = int(here.argmax()), tally.worst[zone]
            if here[at] > 0 and (len(kept) < KEPT or here[at] > kept[-1][0]):
                kept.append((float(here[at]), int(bits[at]), float(y[at]), layout))
                kept.sort(reverse=True)
                del kept[KEPT:]
        if function.name in (*EXPONENTIALS, "tanh"):
            unit = (result.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32).astype(np.float64) * 2.0**-23
            tally.ulps = max(tally.ulps, float((error / np.maximum(unit, 2.0**-149) * ~tiny).max()))
            tally.largest = max(tally.largest, float(np.fmax.reduce(y * (x <= 0))))
        count, at = int((share > function.limit).sum()), int(share.argmax())
        told = f"{function.name}({float(x[at])!r}), {layout}, is {float(y[at])!r}: {float(share[at]):.4g} of the error allowed"
        count_failures(self.part, count, f"{told}; {count} such among {len(bits)}")

    def special_values(self) -> None:
        """What the certificate takes for exact: exp(0) = 1, the heaviest weight, exp(-inf) = 0, a masked one, and NaN."""
        given, wanted = (0.0, -0.0, -math.inf, math.nan, math.inf), np.array([1.0, 1.0, 0.0, math.nan, math.inf] * 9)
        inputs = torch.tensor(given * 9, device=self.device)
        for function in self.functions:
            if function.name not in EXPONENTIALS:
                continue
            for name, y in self.results(function.call, inputs, function.layouts).items():
                wrong = ~((y == wanted) | (np.isnan(y) & np.isnan(wanted)))
                self.part.checked += len(y)
                count_failures(self.part, int(wrong.sum()), f"{function.name}, {name}: of {given} it is {y[:5].tolist()}")

    def figures(self) -> dict[str, Any]:
        """The worst inputs judged again in balls, and what else was found."""
        found: dict[str, Any] = {}
        for function in self.functions:
            tally = self.tally[function.name]
            found[function.name] = {"differ_from_contiguous": tally.differ}
            for zone, kept in tally.worst.items():
                worst: dict[str, Any] = {"error_over_allowed": 0.0, "error": 0.0}
                for _, bits, y, layout in kept:
                    x = float(np.array([bits], dtype=np.uint32).view(np.float32)[0])
                    exact = function.exact(np.array([x]))
                    if not np.isfinite(exact).all():
                        continue
                    relative = EXP_ERROR if function.name in EXPONENTIALS and zone == "normal" else 0.0
                    allowed = float(function.allowed(np.array([y]), exact)[0])
                    within, error, share = weigh(function.ball, x, y, relative, allowed)
                    self.part.checked += 1
                    if not within:
                        self.part.fail(f"{function.name}({x!r}), {layout}, is {y!r}: {share!r} of the error allowed, in balls")
                    if share > worst["error_over_allowed"]:
                        worst = {"error_over_allowed": share, "input": x, "bits": hex(bits), "layout": layout, "error": error}
                        if zone == "normal":
                            worst["relative_error_u"] = error / abs(float(exact[0])) / UNIT_ROUNDOFF
                found[function.name][zone] = worst
        for name in {*EXPONENTIALS, "tanh"} & set(found):
            found[name] |= {"ulps": self.tally[name].ulps, "largest_for_inputs_to_0": self.tally[name].largest}
        return found


def low_half(index: int, seed: int) -> int:
    """The low 16 bits of a page's numbers. The factor is odd, so PAGE pages have every one of them once."""
    return (index * 40503 + seed) % PAGE


def page_bits(index: int, seed: int) -> Numbers:
    """Bits of one page, uint32 `[PAGE]`: every sign, every exponent and all of the first seven places."""
    return np.arange(PAGE, dtype=np.uint32) << np.uint32(16) | np.uint32(low_half(index, seed))


def special_points() -> Numbers:
    """Bits of numbers where implementations change their ways: near multiples of ln 2 / 2, powers of two, ends of ranges."""
    wide = [0.0, TINY, TINY / 2, 2.0**-25, 1.0, 0.34657359, 0.625, 9.010913, 88.722839, 87.336545, 103.27893, 103.97208, 104.0]
    wide += [65504.0, 65520.0, 2.0**-14, 2.0**-24, math.inf, float(np.finfo(np.float32).max)]
    narrow = [k * math.log(2) / 2 for k in range(1, 310)] + [2.0**k for k in range(-30, 8)]
    found = []
    for centres, reach in ((wide, 2**13), (narrow, 2**7)):
        at = np.array(centres, dtype=np.float32).view(np.uint32).astype(np.int64)
        near = (at[:, None] + np.arange(-reach, reach)).clip(0, 2**31 - 1).ravel()
        found += [near, near + 2**31]
    return np.unique(np.concatenate(found)).astype(np.uint32)


def compiled_kernels(part: Part, device: torch.device, generator: torch.Generator, number: int) -> None:
    """The sums of the CPU kernel and products of the Triton kernels, where there are such, on one kind of inputs."""
    if has_cpu_kernel(device):
        from . import cpu_arithmetic

        cpu_arithmetic.chains(part, generator, list(KINDS)[number % len(KINDS)])
    if has_triton_kernels(device):
        from . import triton_arithmetic

        triton_arithmetic.products(part, device, generator, list(KINDS)[number % len(KINDS)])


def run(clock: Clock, device: torch.device, seed: int) -> Part:
    """Check this backend's arithmetic, with every float32 number if the clock lasts.

    Args: device: whose arithmetic; seed: of the random inputs and of the order in which float32 numbers are covered.
    """
    part = Part("rounding", "arithmetic on this machine is as section 5 of docs/certificate.md assumes", "comparisons")
    start, generator, sweep, done = clock.spent, torch.Generator().manual_seed(seed), Sweep(part, device), 0
    with torch.no_grad(), np.errstate(all="ignore"), flushing(False), full_precision(device.type):
        codes(part, device, generator)
        basic_operations(part, device, generator)
        float64_functions(part, device, generator)
        everything = [(name, kind) for name in CHAINS for kind in KINDS]
        for name, kind in everything * SHAPES:
            one_chain(part, device, generator, name, kind)
        if has_cpu_kernel(device):
            from . import cpu_arithmetic

            cpu_arithmetic.decoded(part, generator)
        if has_triton_kernels(device):
            from . import triton_arithmetic

            triton_arithmetic.wide(part, device, generator)
        for number in range(len(KINDS) * SHAPES):
            compiled_kernels(part, device, generator, number)
        sweep.special_values()
        points = special_points()
        for bits in np.array_split(points, -(-len(points) // PAGE)):
            sweep.page(bits)
        while done < PAGE and (done < FIRST_PAGES or not clock.over()):
            for half in np.split(page_bits(done, seed), 2):  # what fits into a CPU's cache
                sweep.page(half)
            done += 1
            if done % SUMS_EVERY == 0:
                compiled_kernels(part, device, generator, done // SUMS_EVERY)
                one_chain(part, device, generator, *everything[done // SUMS_EVERY % len(everything)])
                clock.tell(f"{done / PAGE:.1%} of all float32 numbers")
        functions = sweep.figures()
    part.figures |= {
        "float32_numbers": done * PAGE,
        "exhaustive": done == PAGE,
        "exp_error_u": functions["exp"]["normal"].get("relative_error_u", 0.0),
        "exp_ulps": functions["exp"]["ulps"],
        "tanh_error_u": functions["tanh"]["normal"]["error"] / UNIT_ROUNDOFF,
        **{
            f"{name}_exp_error_u": functions[f"{name} exp"]["normal"].get("relative_error_u", 0.0)
            for name in ("cpu", "triton")
            if f"{name} exp" in functions
        },
        "functions": functions,
    }
    part.seconds = clock.spent - start
    return part
