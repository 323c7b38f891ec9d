"""The innermost loops over segments: their outputs mixed into one, and how far each points along it. By addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .micro import INDEX, STRIP, intrinsic
from .vectors import FLOAT, INT, LANES, LONG, Emitter, floats, long

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
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2^n of a whole float64 number -1022 <= n <= 1023."""
    signature = types.float64(types.float64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(builder.fptosi(arguments[0], LONG), long(1023))
        return builder.bitcast(builder.shl(biased, long(52)), ir.DoubleType())

    return signature, generate
