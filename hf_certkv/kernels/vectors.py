"""Vectors of sixteen float32 numbers inside numba functions: what the compiler does not make of loops by itself.

numba's loops over bytes and nibbles are not vectorised well, and an accumulator in an array is written back at every step.
So the innermost loops are written here as LLVM vector operations, from which LLVM makes what the processor has (AVX-512, two
AVX2 or four NEON registers). Nothing names a processor. A function that uses them is an ordinary numba function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
LINE = 64  # bytes of a cache line, on most processors
FLOAT, BYTE, HALF, INT, LONG = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, BYTES, HALVES, INTS = (ir.VectorType(kind, LANES) for kind in (FLOAT, BYTE, HALF, INT))


def floats(x: float) -> ir.Constant:
    """The same float32 number in every lane."""
    return ir.Constant(FLOATS, [x] * LANES)


def ints(x: int) -> ir.Constant:
    """The same int32 number in every lane."""
    return ir.Constant(INTS, [x] * LANES)


def long(x: int) -> ir.Constant:
    """An int64 constant."""
    return ir.Constant(LONG, x)


def features() -> dict[str, bool]:
    """What numba compiles for: the processor's features, less what it was told, or chooses, to leave out."""
    from llvmlite import binding
    from numba.core import config as numba_config

    config: Any = numba_config
    if config.CPU_NAME or config.CPU_FEATURES is not None:  # for another processor, of which nothing is known here
        return {}
    found = dict(binding.get_host_cpu_features())
    return {name: has and (config.ENABLE_AVX or not name.startswith("avx")) for name, has in found.items()}


@cache
def converts_halves() -> bool:
    """Whether the processor converts float16 numbers, whatever it does with subnormal ones otherwise."""
    return features().get("f16c", False)


class Emitter:
    """Writes vector operations where an LLVM builder stands. Pointers count in elements of what they point to."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def pointer(self, address: Any, start: Any, kind: Any) -> Any:
        """Pointer to entry `start` of an array of `kind` that begins at `address`."""
        return self.builder.gep(self.builder.inttoptr(address, kind.as_pointer()), [start])

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """A pointer moved on by int64 offsets, Python's or the builder's."""
        total: Any = long(0)
        for offset in offsets:
            total = self.builder.add(total, long(offset) if isinstance(offset, int) else offset)
        return self.builder.gep(pointer, [total])

    def times(self, x: Any, factor: int) -> Any:
        """An int64 times a constant."""
        return self.builder.mul(x, long(factor))

    def load(self, pointer: Any, kind: Any = FLOATS) -> Any:
        """A vector from memory that need not be aligned."""
        loaded = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        loaded.align = 1
        return loaded

    def store(self, vector: Any, pointer: Any) -> None:
        """A vector of floats to memory that need not be aligned."""
        self.builder.store(vector, self.builder.bitcast(pointer, vector.type.as_pointer())).align = 1

    def store_bytes(self, x: Any, pointer: Any) -> None:
        """Sixteen whole numbers, float32 or float64, to memory as bytes."""
        self.store(self.builder.trunc(self.builder.fptosi(x, INTS), BYTES), pointer)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x * y + z, rounded once where the processor can, else twice."""
        return self.call("llvm.fmuladd", FLOATS, x, y, z)

    def call(self, name: str, kind: Any, *arguments: Any) -> Any:
        """One of LLVM's own functions on vectors of floats."""
        signature = ir.FunctionType(kind, [kind] * len(arguments))
        function = cgutils.get_or_insert_function(self.builder.module, signature, f"{name}.v{LANES}f32")
        return self.builder.call(function, arguments)

    def splat(self, x: Any) -> Any:
        """One float or int32 in every lane."""
        kind = ir.VectorType(x.type, LANES)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), x, ir.Constant(INT, 0))
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(INTS, [0] * LANES))

    def reduce(self, name: str, vector: Any) -> Any:
        """One of LLVM's own reductions of int32 lanes."""
        signature = ir.FunctionType(INT, [INTS])
        function = cgutils.get_or_insert_function(self.builder.module, signature, f"{name}.v{LANES}i32")
        return self.builder.call(function, [vector])

    def pick(self, x: Any, y: Any, lanes: Sequence[int]) -> Any:
        """A vector of some lanes of two: 0 to 15 are those of `x`, 16 to 31 those of `y`."""
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT, len(lanes)), list(lanes)))

    def unsigned(self, pointer: Any, kind: Any) -> Any:
        """Sixteen unsigned bytes or 16-bit numbers from memory, as int32."""
        return self.builder.zext(self.load(pointer, kind), INTS)

    def fetch(self, pointer: Any) -> None:
        """Ask for the cache line at a pointer to be brought near. If nothing lies there, that does no harm."""
        name = "llvm.prefetch.p0i8" if str(pointer.type) == "i8*" else "llvm.prefetch.p0"
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        self.builder.call(function, [pointer, *(ir.Constant(INT, x) for x in (0, 3, 1))])  # to read, to all caches, of data

    def variable(self, start: Any) -> Any:
        """A variable that loops change, with its first value; LLVM keeps it in a register."""
        place = cgutils.alloca_once(self.builder, start.type)
        self.builder.store(start, place)
        return place

    def add_to(self, place: Any, x: Any, y: Any = None) -> None:
        """variable += x, or += x * y."""
        held = self.builder.load(place)
        self.builder.store(self.builder.fadd(held, x) if y is None else self.fma(x, y, held), place)

    @contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        """What is written inside runs for the index 0, 1, ... count - 1."""
        with cgutils.for_range(self.builder, count) as loop:
            yield loop.index

    def sums(self, vectors: Sequence[Any]) -> Any:
        """Lane i of the result is the sum over the lanes of vector i; 1, 2, 4, 8 or 16 vectors, repeated to fill the lanes.

        Neighbours are folded into each other, so n vectors take n - 1 additions, and each addend goes through four.
        """
        held, step = list(vectors), 1
        while len(held) > 1:
            merged = []
            for x, y in zip(held[::2], held[1::2], strict=True):
                even = [k if (k // step) % 2 == 0 else LANES + k - step for k in range(LANES)]
                odd = [k + step if (k // step) % 2 == 0 else LANES + k for k in range(LANES)]
                merged.append(self.builder.fadd(self.pick(x, y, even), self.pick(x, y, odd)))
            held, step = merged, 2 * step
        result = held[0]
        while step < LANES:
            turned = self.pick(result, result, [(k + step) % LANES for k in range(LANES)])
            result, step = self.builder.fadd(result, turned), 2 * step
        return result

    def neighbours(self, vectors: Sequence[Any]) -> Any:
        """The sums of n neighbouring lanes of n vectors, one behind the other; n is a power of two, at most 16."""
        held = list(vectors)
        while len(held) > 1:
            pairs = zip(held[::2], held[1::2], strict=True)
            held = [
                self.builder.fadd(self.pick(x, y, range(0, 2 * LANES, 2)), self.pick(x, y, range(1, 2 * LANES, 2)))
                for x, y in pairs
            ]
        return held[0]

    def exp(self, x: Any) -> Any:
        """exp(x) for x <= 0, to within EXP_ERROR (checked over every float); 0 below log(2^-126); NaN stays NaN.

        x = n log 2 + r with |r| <= log(2) / 2; n log 2 is subtracted in two parts, the first of which is exact; then the
        Taylor-like polynomial of Cephes' `expf`, and n into the exponent.
        """
        b, rounder = self.builder, floats(1.5 * 2.0**23)
        n = b.fsub(b.fadd(b.fmul(x, floats(1.4426950408889634)), rounder), rounder)
        r = self.fma(n, floats(2.12194440e-4), self.fma(n, floats(-0.693359375), x))
        p = floats(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, floats(c))
        p = b.fadd(self.fma(b.fmul(r, r), p, r), floats(1.0))
        # Below the range n may be anything: the result is not used then, and a lane too large for an int is no trap.
        inside = b.fcmp_ordered(">=", x, floats(LOWEST_EXP))
        bits = b.fptosi(b.select(inside, n, floats(0.0)), INTS)
        power = b.bitcast(b.shl(b.add(bits, ints(127)), ints(23)), FLOATS)
        small = b.fcmp_ordered("<", x, floats(LOWEST_EXP))
        return b.select(small, floats(0.0), b.fmul(p, power))

    def half(self, pointer: Any) -> Any:
        """Sixteen float16 numbers from memory, in float32; infinities and NaN stay what they are."""
        if converts_halves():
            return self.builder.fpext(
                self.builder.bitcast(self.load(pointer, HALVES), ir.VectorType(ir.HalfType(), LANES)), FLOATS
            )
        return self.from_half(self.unsigned(pointer, HALVES))

    def from_half(self, bits: Any) -> Any:
        """float16 numbers, given as int32, in float32, by integers alone."""
        b = self.builder
        size = b.and_(bits, ints(0x7FFF))
        sign = b.shl(b.and_(bits, ints(0x8000)), ints(16))
        # The exponents' biases differ by 112. Subnormal numbers are converted as whole numbers: a process may flush floats
        # that are subnormal, and what is a subnormal float16 is none in float32.
        normal = b.add(b.shl(size, ints(13)), ints(112 << 23))
        special = b.or_(b.shl(size, ints(13)), ints(0x7F800000))
        small = b.bitcast(b.fmul(b.sitofp(size, FLOATS), floats(2.0**-24)), INTS)
        number = b.select(b.icmp_signed("<", size, ints(0x0400)), small, normal)
        number = b.select(b.icmp_signed(">=", size, ints(0x7C00)), special, number)
        return b.bitcast(b.or_(number, sign), FLOATS)


LOWEST_EXP = -87.33654475  # log of 2^-126, the smallest normal float32
