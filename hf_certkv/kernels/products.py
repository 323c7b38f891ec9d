"""Products of a matrix with its own transpose, for the spectral numbers: vector code behind numba intrinsics.

Arrays are given by their addresses, with rows one behind the other; sizes are multiples of LANES, filled up with zeros. Each
float32 number of a product is one chain of additions, of as many addends as there are rows. Bytes are multiplied exactly.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from .memory import intrinsic
from .micro_integers import MAGIC, add_products, raised, size, supported, transposed
from .micro_integers import largest as largest_bits
from .vectors import BYTE, FLOAT, INT, INTS, LANES, Emitter, floats, ints, long

INDEX = types.intp


def _turn(emit: Emitter, source: Any, count: Any, width: Any, out: Any, factor: Any = None) -> None:
    """out[c, t] = rows[t, c], times a float where one is given, of `count` rows of `width` numbers of four bytes."""
    b = emit.builder
    with emit.loop(b.udiv(count, long(LANES))) as i, emit.loop(b.udiv(width, long(LANES))) as j:
        t, c = emit.times(i, LANES), emit.times(j, LANES)
        places = [emit.at(source, b.mul(b.add(t, long(k)), width), c) for k in range(LANES)]
        tile = [emit.load(place, INTS) if factor is None else b.fmul(emit.load(place), factor) for place in places]
        for k, column in enumerate(transposed(emit, tile)):
            emit.store(column, emit.at(out, b.mul(b.add(c, long(k)), count), t))


@intrinsic
def turn(typing: Any, rows: Any, count: Any, width: Any, factor: Any, out: Any) -> Any:
    """out[c, t] = factor * rows[t, c], of `count` rows of `width` float32 numbers."""
    signature = types.void(INDEX, INDEX, INDEX, types.float32, INDEX)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        source, out = (emit.pointer(arguments[i], long(0), FLOAT) for i in (0, 4))
        _turn(emit, source, arguments[1], arguments[2], out, emit.splat(arguments[3]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def turn_words(typing: Any, rows: Any, count: Any, width: Any, out: Any) -> Any:
    """out[w, t] = rows[t, w], of `count` rows of `width` words of four bytes."""
    signature = types.void(*(INDEX,) * 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        source, out = (emit.pointer(arguments[i], long(0), INT) for i in (0, 3))
        _turn(emit, source, arguments[1], arguments[2], out)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def largest(typing: Any, x: Any, count: Any) -> Any:
    """The largest magnitude of `count` float32 numbers, none of them NaN."""
    signature = types.float32(INDEX, INDEX)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        source, top = emit.pointer(arguments[0], long(0), FLOAT), emit.variable(floats(0.0))
        with emit.loop(builder.udiv(arguments[1], long(LANES))) as chunk:
            raised(emit, top, size(emit, emit.load(emit.at(source, emit.times(chunk, LANES)))))
        return builder.bitcast(largest_bits(emit, builder.load(top)), FLOAT)

    return signature, generate


@intrinsic
def narrow(typing: Any, rows: Any, count: Any, width: Any, factor: Any, pitch: Any, out: Any) -> Any:
    """Rows of `width` float32 numbers times a factor, at most 127 then, as bytes with a sign, `pitch` from row to row.

    Returns: float32: the sum of squares of what is lost, as computed.
    """
    signature = types.float32(INDEX, INDEX, INDEX, types.float32, INDEX, INDEX)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, b = Emitter(context, builder), builder
        source, out = emit.pointer(arguments[0], long(0), FLOAT), emit.pointer(arguments[5], long(0), BYTE)
        count, width, factor, pitch = arguments[1], arguments[2], emit.splat(arguments[3]), arguments[4]
        lost = emit.variable(floats(0.0))
        with emit.loop(count) as t, emit.loop(b.udiv(width, long(LANES))) as chunk:
            c = emit.times(chunk, LANES)
            number = b.fmul(emit.load(emit.at(source, b.mul(t, width), c)), factor)
            whole = b.fsub(b.fadd(number, floats(MAGIC)), floats(MAGIC))
            off = b.fsub(number, whole)
            emit.add_to(lost, off, off)
            emit.store_bytes(whole, emit.at(out, b.mul(t, pitch), c))
        total = emit.sums([b.load(lost)])
        return b.extract_element(total, ir.Constant(INT, 0))

    return signature, generate


def _tiles(emit: Emitter, width: Any, tile: Any) -> None:
    """Call `tile(i, j)` for the parts of LANES by LANES numbers on and above the diagonal, at row i and column j."""
    with emit.loop(emit.builder.udiv(width, long(LANES))) as j, emit.loop(emit.builder.add(j, long(1))) as i:
        tile(emit.times(i, LANES), emit.times(j, LANES))


def _store_tile(emit: Emitter, made: list[Any], first: Any, second: Any, width: Any, out: Any) -> None:
    """A part of a symmetric matrix at row `first` and column `second`, and the same on the other side of the diagonal."""
    for left, below, block in ((first, second, made), (second, first, transposed(emit, made))):
        for i, row in enumerate(block):
            emit.store(row, emit.at(out, emit.builder.mul(emit.builder.add(left, long(i)), width), below))


@intrinsic
def gram_bytes(typing: Any, words: Any, count: Any, width: Any, unit: Any, sums: Any, out: Any) -> Any:
    """out[i, j] = unit * sum over the `count` words of columns i and j of their products, in float32.

    Args: words: `[count, width]`, four bytes with a sign each; sums: int32 `[width]`, scratch. Exact up to 2^24 units.
    Not to be called where the processor cannot do that (`micro_integers.supported`): there no code is made of it.
    """
    signature = types.void(INDEX, INDEX, INDEX, types.float32, INDEX, INDEX)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, b = Emitter(context, builder), builder
        if not supported():
            return context.get_dummy_value()
        words, sums = (emit.pointer(arguments[i], long(0), INT) for i in (0, 4))
        count, width, unit = arguments[1], arguments[2], emit.splat(arguments[3])
        out = emit.pointer(arguments[5], long(0), FLOAT)
        flip, nothing = ints(0x80808080), ir.Constant(INTS, [0] * LANES)
        with emit.loop(b.udiv(width, long(LANES))) as j:
            total, place = emit.variable(nothing), emit.times(j, LANES)
            with emit.loop(count) as k:
                add_products(emit, total, ints(0x01010101), emit.load(emit.at(words, b.mul(k, width), place), INTS))
            emit.store(b.load(total), emit.at(sums, place))

        def tile(first: Any, second: Any) -> None:
            held = [emit.variable(nothing) for _ in range(LANES)]
            with emit.loop(count) as k:
                row = emit.at(words, b.mul(k, width))
                right = b.xor(emit.load(emit.at(row, second), INTS), flip)  # without a sign: 128 more
                for i in range(LANES):
                    add_products(emit, held[i], right, emit.splat(b.load(emit.at(row, first, i))))
            made = []
            for i in range(LANES):
                more = emit.splat(b.shl(b.load(emit.at(sums, first, i)), ir.Constant(INT, 7)))
                made.append(b.fmul(b.sitofp(b.sub(b.load(held[i]), more), ir.VectorType(FLOAT, LANES)), unit))
            _store_tile(emit, made, first, second, width, out)

        _tiles(emit, width, tile)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def gram(typing: Any, rows: Any, count: Any, width: Any, out: Any) -> Any:
    """out[i, j] = sum over the `count` rows of row[i] * row[j]: the transpose of the rows times the rows."""
    signature = types.void(*(INDEX,) * 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        source, out = (emit.pointer(arguments[i], long(0), FLOAT) for i in (0, 3))
        count, width = arguments[1], arguments[2]

        def tile(first: Any, second: Any) -> None:
            held = [emit.variable(floats(0.0)) for _ in range(LANES)]
            with emit.loop(count) as k:
                row = emit.at(source, builder.mul(k, width))
                right = emit.load(emit.at(row, second))
                for i in range(LANES):
                    emit.add_to(held[i], emit.splat(builder.load(emit.at(row, first, i))), right)
            _store_tile(emit, [builder.load(part) for part in held], first, second, width, out)

        _tiles(emit, width, tile)
        return context.get_dummy_value()

    return signature, generate
