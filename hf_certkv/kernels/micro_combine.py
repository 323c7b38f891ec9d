"""More innermost loops, by addresses: over segments, their outputs mixed and met; over codes, read onto their grid."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .memory import intrinsic
from .micro import INDEX, STRIP
from .vectors import BYTE, BYTES, FLOAT, FLOATS, INT, INTS, LANES, LONG, Emitter, floats, long

FOUR = 4  # segments at a time


@intrinsic
def mix(typing: Any, parts: Any, start: Any, pitch: Any, weights: Any, count: Any, output: Any, width: Any) -> Any:
    """output[c] = sum over s < count of weights[s] * parts[start + s * pitch + c], for `width` channels (a multiple of 16)."""
    signature = types.void(*(INDEX,) * 7)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        pitch, count, width = arguments[2], arguments[4], arguments[6]
        parts = emit.pointer(arguments[0], arguments[1], FLOAT)
        weights, output = (emit.pointer(arguments[i], long(0), FLOAT) for i in (3, 5))
        vectors = builder.udiv(width, long(LANES))

        def strip(first: Any, size: int) -> None:
            held = [emit.variable(floats(0.0)) for _ in range(size)]
            with emit.loop(count) as s:
                weight = emit.splat(builder.load(emit.at(weights, s)))
                row = emit.at(parts, builder.mul(s, pitch), emit.times(first, LANES))
                for v in range(size):
                    emit.add_to(held[v], emit.load(emit.at(row, v * LANES)), weight)
            for v in range(size):
                emit.store(builder.load(held[v]), emit.at(output, emit.times(first, LANES), v * LANES))

        wide = builder.udiv(vectors, long(2 * STRIP))
        with emit.loop(wide) as i:
            strip(emit.times(i, 2 * STRIP), 2 * STRIP)
        done = emit.times(wide, 2 * STRIP)
        with emit.loop(builder.sub(vectors, done)) as i:
            strip(builder.add(done, i), 1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def inners(typing: Any, parts: Any, start: Any, pitch: Any, output: Any, width: Any, count: Any, result: Any) -> Any:
    """result[s] = the float32 dot product of `output` and the `width` numbers at `parts[start + s * pitch]`, for s < count."""
    signature = types.void(*(INDEX,) * 7)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        pitch, width, count = arguments[2], arguments[4], arguments[5]
        parts = emit.pointer(arguments[0], arguments[1], FLOAT)
        output, result = (emit.pointer(arguments[i], long(0), FLOAT) for i in (3, 6))

        def some(first: Any, size: int) -> None:
            held = [emit.variable(floats(0.0)) for _ in range(size)]
            rows = [emit.at(parts, builder.mul(builder.add(first, long(k)), pitch)) for k in range(size)]
            with emit.loop(builder.udiv(width, long(LANES))) as chunk:
                c = emit.times(chunk, LANES)
                mine = emit.load(emit.at(output, c))
                for k in range(size):
                    emit.add_to(held[k], emit.load(emit.at(rows[k], c)), mine)
            summed = emit.sums([builder.load(part) for part in held])
            for k in range(size):
                builder.store(builder.extract_element(summed, ir.Constant(INT, k)), emit.at(result, first, k))

        groups = builder.udiv(count, long(FOUR))
        with emit.loop(groups) as i:
            some(emit.times(i, FOUR), FOUR)
        done = emit.times(groups, FOUR)
        with emit.loop(builder.sub(count, done)) as i:
            some(builder.add(done, i), 1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def spread(
    typing: Any,
    source: Any,
    at: Any,
    count: Any,
    shift: Any,
    mask: Any,
    factor: Any,
    plus: Any,
    numbers: Any,
    to: Any,
    fresh: Any,
) -> Any:
    """numbers[to + c] = (0 if fresh, else itself) + ((source[at + c] >> shift) & mask) * factor + plus, for `count` bytes."""
    signature = types.void(*(INDEX,) * 5, types.float32, types.float32, INDEX, INDEX, types.boolean)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        source, numbers = emit.pointer(arguments[0], arguments[1], BYTE), emit.pointer(arguments[7], arguments[8], FLOAT)
        shift, mask = (_every(emit, builder.trunc(arguments[i], INT)) for i in (3, 4))
        factor, plus = emit.splat(arguments[5]), emit.splat(arguments[6])
        with emit.loop(builder.udiv(arguments[2], long(LANES))) as chunk:
            c = emit.times(chunk, LANES)
            code = builder.and_(builder.lshr(emit.unsigned(emit.at(source, c), BYTES), shift), mask)
            read = emit.fma(builder.sitofp(code, FLOATS), factor, plus)
            place = emit.at(numbers, c)
            held = builder.select(arguments[9], floats(0.0), emit.load(place))
            emit.store(builder.fadd(held, read), place)
        done = builder.and_(arguments[2], long(-LANES))
        with emit.loop(builder.sub(arguments[2], done)) as i:
            c = builder.add(done, i)
            byte = builder.zext(builder.load(emit.at(source, c)), INT)
            shifts, masks = (builder.trunc(arguments[k], INT) for k in (3, 4))
            code = builder.uitofp(builder.and_(builder.lshr(byte, shifts), masks), FLOAT)
            read = builder.fadd(builder.fmul(code, arguments[5]), arguments[6])
            place = emit.at(numbers, c)
            held = builder.select(arguments[9], ir.Constant(FLOAT, 0.0), builder.load(place))
            builder.store(builder.fadd(held, read), place)
        return context.get_dummy_value()

    return signature, generate


def _every(emit: Emitter, x: Any) -> Any:
    """One int32 in every lane."""
    one = emit.builder.insert_element(ir.Constant(INTS, ir.Undefined), x, ir.Constant(INT, 0))
    return emit.pick(one, one, [0] * LANES)


@intrinsic
def onto_grid(typing: Any, numbers: Any, to: Any, count: Any, scales: Any, scale: Any, offset: Any, shared: Any) -> Any:
    """numbers[to + c] = numbers[to + c] * scales[scale + c] + scales[offset + c], or with one of each where `shared`.

    `count` is a multiple of 16. Positions times steps are exact, so that one rounding is all, with or without a fused product.
    """
    signature = types.void(*(INDEX,) * 6, types.boolean)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        numbers = emit.pointer(arguments[0], arguments[1], FLOAT)
        steps, starts = (emit.pointer(arguments[3], arguments[i], FLOAT) for i in (4, 5))
        with builder.if_else(arguments[6]) as (same, each):
            for branch, one in ((same, True), (each, False)):
                with branch, emit.loop(builder.udiv(arguments[2], long(LANES))) as chunk:
                    c = emit.times(chunk, LANES)
                    step = emit.splat(builder.load(steps)) if one else emit.load(emit.at(steps, c))
                    start = emit.splat(builder.load(starts)) if one else emit.load(emit.at(starts, c))
                    place = emit.at(numbers, c)
                    emit.store(emit.fma(emit.load(place), step, start), place)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2^n of a whole float64 number -1022 <= n <= 1023."""
    signature = types.float64(types.float64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(builder.fptosi(arguments[0], LONG), long(1023))
        return builder.bitcast(builder.shl(biased, long(52)), ir.DoubleType())

    return signature, generate


@intrinsic
def series(typing: Any, r: Any) -> Any:
    """(exp(r) - 1) / r by fifteen terms of its series; no loop, which would keep the loop around it from being vectorised."""
    signature = types.float64(types.float64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        p: Any = ir.Constant(ir.DoubleType(), 1.0)
        for k in range(16, 1, -1):
            product = builder.fmul(builder.fmul(p, arguments[0]), ir.Constant(ir.DoubleType(), 1 / k))
            p = builder.fadd(product, ir.Constant(ir.DoubleType(), 1.0))
        return p

    return signature, generate
