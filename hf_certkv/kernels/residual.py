"""One token's codes and what is measured of them, in one pass of vector code behind numba intrinsics.

Arrays are given by their addresses; the number of channels is a multiple of LANES, filled up with zeros. Nothing that makes a
residual may be reassociated or rounded otherwise than `cpu_write_row` says; sums of squares may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..codecs import LOW_BITS, MIDDLE
from .memory import intrinsic
from .vectors import BYTE, BYTES, FLOAT, FLOATS, HALF, HALVES, INT, INTS, LANES, Emitter, ints, long

INDEX = types.intp
DOUBLE = ir.DoubleType()
DOUBLES = ir.VectorType(DOUBLE, LANES)
ROUNDER = 1.5 * 2.0**52  # added and subtracted: rounds to the nearest integer, ties to even
EXPONENT = 0x7F800000  # of a float32
FACTS = 5  # of a token: squares of the originals, the most of what is read, errors at both levels, and of what level 0 reads


def doubles(x: float) -> ir.Constant:
    """The same float64 number in every lane."""
    return ir.Constant(DOUBLES, [x] * LANES)


def _call(emit: Emitter, name: str, *arguments: Any) -> Any:
    """One of LLVM's own functions on vectors of float64 numbers."""
    signature = ir.FunctionType(DOUBLES, [DOUBLES] * len(arguments))
    function = cgutils.get_or_insert_function(emit.builder.module, signature, f"{name}.v{LANES}f64")
    return emit.builder.call(function, arguments)


def _larger(emit: Emitter, x: Any, y: Any) -> Any:
    """The larger of numbers that are no NaN."""
    return emit.builder.select(emit.builder.fcmp_ordered(">", x, y), x, y)


def _folded(emit: Emitter, x: Any) -> Any:
    """The sum of the lanes."""
    b, count = emit.builder, LANES
    while count > 1:
        count //= 2
        lower, upper = (ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(at, at + count))) for at in (0, count))
        x = b.fadd(b.shuffle_vector(x, x, lower), b.shuffle_vector(x, x, upper))
    return b.extract_element(x, ir.Constant(ir.IntType(32), 0))


def _widen(halves: bool) -> Any:
    """The function for bfloat16 originals, or for float32."""

    @intrinsic
    def widen(typing: Any, x: Any, width: Any, out: Any) -> Any:
        """`width` originals at `x` as float32 numbers at `out`. Returns whether all of them are finite."""
        signature = types.boolean(*(INDEX,) * 3)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit, b = Emitter(context, builder), builder
            source, out = (emit.pointer(arguments[i], long(0), kind) for i, kind in ((0, HALF if halves else INT), (2, INT)))
            none, exponent = ints(0), ints(EXPONENT)
            wrong = emit.variable(none)
            with emit.loop(b.udiv(arguments[1], long(LANES))) as chunk:
                c = emit.times(chunk, LANES)
                place = emit.at(source, c)
                bits = b.shl(emit.unsigned(place, HALVES), ints(16)) if halves else emit.load(place, INTS)
                emit.store(bits, emit.at(out, c))
                special = b.icmp_signed("==", b.and_(bits, exponent), exponent)
                b.store(b.select(special, exponent, b.load(wrong)), wrong)
            return b.icmp_signed("==", emit.reduce("llvm.vector.reduce.or", b.load(wrong)), ir.Constant(INT, 0))

        return signature, generate

    return widen


widen_bfloat16, widen_float32 = _widen(True), _widen(False)


def _extremes(emit: Emitter, x: Any, count: Any, apart: Any) -> list[Any]:
    """Least and largest, lane by lane, of `count` vectors of finite numbers, each `apart` numbers behind that before."""
    b, first = emit.builder, emit.load(x)
    places = emit.variable(first), emit.variable(first)
    with emit.loop(count) as k:
        number = emit.load(emit.at(x, b.mul(k, apart)))
        for place, order in zip(places, "<>", strict=True):
            held = b.load(place)
            b.store(b.select(b.fcmp_ordered(order, number, held), number, held), place)
    return [b.load(place) for place in places]


@intrinsic
def channel_extremes(typing: Any, x: Any, count: Any, width: Any, low: Any, high: Any) -> Any:
    """Least and largest number of each channel of `count` rows, as float64."""
    signature = types.void(*(INDEX,) * 5)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, b = Emitter(context, builder), builder
        x, outs = emit.pointer(arguments[0], long(0), FLOAT), [emit.pointer(arguments[i], long(0), DOUBLE) for i in (3, 4)]
        with emit.loop(b.udiv(arguments[2], long(LANES))) as chunk:
            c = emit.times(chunk, LANES)
            for found, out in zip(_extremes(emit, emit.at(x, c), arguments[1], arguments[2]), outs, strict=True):
                emit.store(b.fpext(found, DOUBLES), emit.at(out, c))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def group_extremes(typing: Any, x: Any, groups: Any, size: Any, low: Any, high: Any) -> Any:
    """Least and largest of each group of `size` numbers, a multiple of LANES, as float64."""
    signature = types.void(*(INDEX,) * 5)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, b = Emitter(context, builder), builder
        x, outs = emit.pointer(arguments[0], long(0), FLOAT), [emit.pointer(arguments[i], long(0), DOUBLE) for i in (3, 4)]
        with emit.loop(arguments[1]) as g:
            chunks = b.udiv(arguments[2], long(LANES))
            lanes = _extremes(emit, emit.at(x, b.mul(g, arguments[2])), chunks, long(LANES))
            for found, out, order in zip(lanes, outs, "<>", strict=True):
                turn = LANES // 2
                while turn:
                    other = emit.pick(found, found, [(k + turn) % LANES for k in range(LANES)])
                    found, turn = b.select(b.fcmp_ordered(order, other, found), other, found), turn // 2
                b.store(b.fpext(b.extract_element(found, ir.Constant(INT, 0)), DOUBLE), emit.at(out, g))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def spread_groups(typing: Any, low: Any, high: Any, groups: Any, size: Any, inverse: Any, lattice: Any, width: Any) -> Any:
    """The `grid` of a token's channels, as `token_both` reads it, from offsets and steps of groups of `size` channels.

    `size` is a multiple of LANES; `inverse` is for all channels.
    """
    signature = types.void(*(INDEX,) * 4, types.float64, *(INDEX,) * 2)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, b = Emitter(context, builder), builder
        low, high, lattice = (emit.pointer(arguments[i], long(0), DOUBLE) for i in (0, 1, 5))
        groups, size, width = arguments[2], arguments[3], arguments[6]
        zero, sixteen = ir.Constant(DOUBLE, 0.0), ir.Constant(DOUBLE, 2.0**LOW_BITS)
        inverse = emit.splat(arguments[4])
        with emit.loop(groups) as g:
            step = b.load(emit.at(high, g))
            parts = b.select(b.fcmp_ordered(">", step, zero), b.fdiv(sixteen, step), zero)
            numbers = (*(emit.splat(x) for x in (b.load(emit.at(low, g)), step, parts)), inverse)
            with emit.loop(b.udiv(size, long(LANES))) as chunk:
                c = b.add(b.mul(g, size), emit.times(chunk, LANES))
                for i, number in enumerate(numbers):
                    emit.store(number, emit.at(lattice, c, emit.times(width, i)))
        return context.get_dummy_value()

    return signature, generate


def _token(levels: Sequence[str]) -> Any:
    """The pass for a format: `levels` are those of "coarse", the middle of a cell, and "fine", all bits, that it has."""

    @intrinsic
    def token(
        typing: Any,
        x: Any,
        grid: Any,
        width: Any,
        last: Any,
        upper: Any,
        lower: Any,
        rows: Any,
        apart: Any,
        peaks: Any,
        facts: Any,
    ) -> Any:
        """Codes of `width` channels at `x`, residuals in float32 at `rows`, a level's `apart` behind that before.

        `grid`: float64 `[4, width]`: origin, step, sixteenths of a step that make one, what an error is multiplied by.
        `upper`, `lower`: bytes: high and low codes, or all bits in `upper` where a format has only one level, with all bits.
        `peaks`: float64 `[levels, LANES]`, raised to the largest residuals. `facts`: float64, see FACTS.
        """
        signature = types.void(INDEX, INDEX, INDEX, types.float64, *(INDEX,) * 6)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit, b = Emitter(context, builder), builder
            width, last, apart = arguments[2], arguments[3], arguments[7]
            x, rows = (emit.pointer(arguments[i], long(0), FLOAT) for i in (0, 6))
            grid, peaks, facts = (emit.pointer(arguments[i], long(0), DOUBLE) for i in (1, 8, 9))
            upper, lower = (emit.pointer(arguments[i], long(0), BYTE) for i in (4, 5))
            one = b.insert_element(ir.Constant(DOUBLES, ir.Undefined), last, ir.Constant(ir.IntType(32), 0))
            last = b.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))
            size, *made = (emit.variable(doubles(0.0)) for _ in range(1 + 2 * len(levels)))
            reads, errors = made[: len(levels)], made[len(levels) :]
            tops = [emit.variable(emit.load(emit.at(peaks, level * LANES), DOUBLES)) for level in range(len(levels))]

            def add_square(place: Any, number: Any) -> None:
                b.store(_call(emit, "llvm.fmuladd", number, number, b.load(place)), place)

            with emit.loop(b.udiv(width, long(LANES))) as chunk:
                c = emit.times(chunk, LANES)
                number = b.fpext(emit.load(emit.at(x, c)), DOUBLES)
                origin, step, parts, inverse = (emit.load(emit.at(grid, c, emit.times(width, i)), DOUBLES) for i in range(4))
                position = b.fmul(b.fsub(number, origin), parts)
                position = b.select(b.fcmp_ordered(">", position, doubles(0.0)), position, doubles(0.0))
                position = b.select(b.fcmp_ordered("<", position, last), position, last)
                code = b.fsub(b.fadd(position, doubles(ROUNDER)), doubles(ROUNDER))
                fine = b.fmul(code, doubles(2.0**-LOW_BITS))
                cell = _call(emit, "llvm.floor", fine)
                if levels == ("fine",):
                    emit.store_bytes(code, emit.at(upper, c))
                else:
                    emit.store_bytes(cell, emit.at(upper, c))
                    emit.store_bytes(b.fsub(code, b.fmul(cell, doubles(2.0**LOW_BITS))), emit.at(lower, c))
                add_square(size, number)
                for level, kind in enumerate(levels):
                    at = b.fadd(cell, doubles(MIDDLE)) if kind == "coarse" else fine
                    read = b.fadd(origin, b.fmul(step, at))
                    share = b.fmul(b.fsub(read, number), inverse)
                    emit.store(b.fptrunc(share, FLOATS), emit.at(rows, c, b.mul(apart, long(level))))
                    add_square(reads[level], read)
                    add_square(errors[level], share)
                    b.store(_larger(emit, _call(emit, "llvm.fabs", share), b.load(tops[level])), tops[level])
            largest = _folded(emit, b.load(reads[0]))
            for place in reads[1:]:
                largest = _larger(emit, _folded(emit, b.load(place)), largest)
            for i, fact in enumerate([_folded(emit, b.load(size)), largest, *(_folded(emit, b.load(e)) for e in errors)]):
                b.store(fact, emit.at(facts, i))
            b.store(_folded(emit, b.load(reads[0])), emit.at(facts, FACTS - 1))
            for level, place in enumerate(tops):
                emit.store(b.load(place), emit.at(peaks, level * LANES))
            return context.get_dummy_value()

        return signature, generate

    return token


token_both, token_coarse, token_fine = _token(("coarse", "fine")), _token(("coarse",)), _token(("fine",))


@intrinsic
def nibbles(typing: Any, codes: Any, half: Any, out: Any) -> Any:
    """Bytes below 16, two to a byte: out[c] = codes[c] + 16 codes[half + c], in whole vectors beyond `half`."""
    signature = types.void(*(INDEX,) * 3)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, half = Emitter(context, builder), arguments[1]
        codes, out = (emit.pointer(arguments[i], long(0), BYTE) for i in (0, 2))
        with emit.loop(builder.udiv(builder.add(half, long(LANES - 1)), long(LANES))) as chunk:
            c = emit.times(chunk, LANES)
            first, second = emit.load(emit.at(codes, c), BYTES), emit.load(emit.at(codes, c, half), BYTES)
            shifted = builder.shl(second, ir.Constant(BYTES, [LOW_BITS] * LANES))
            emit.store(builder.or_(first, shifted), emit.at(out, c))
        return context.get_dummy_value()

    return signature, generate
