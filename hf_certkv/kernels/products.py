"""Products of a matrix with its own transpose, in float32, for the spectral numbers: vector code behind numba intrinsics.

Arrays are given by their addresses, with rows one behind the other; sizes are multiples of LANES, filled up with zeros. Each
number of a product is one chain of additions, of as many addends as there are rows.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic as _intrinsic

from .vectors import FLOAT, LANES, Emitter, floats, long

INDEX = types.intp
intrinsic: Any = _intrinsic  # its calls look otherwise than its definition


def _turned(emit: Emitter, rows: list[Any]) -> list[Any]:
    """The columns of LANES vectors of LANES: in each step pairs of rows exchange a half, a quarter ... of their lanes."""
    held, step = list(rows), LANES // 2
    while step:
        for i in range(LANES):
            if i & step == 0:
                x, y = held[i], held[i + step]
                first = [k if k & step == 0 else LANES + k - step for k in range(LANES)]
                second = [k + step if k & step == 0 else LANES + k for k in range(LANES)]
                held[i], held[i + step] = emit.pick(x, y, first), emit.pick(x, y, second)
        step //= 2
    return held


@intrinsic
def turn(typing: Any, rows: Any, count: Any, width: Any, factor: Any, out: Any) -> Any:
    """out[c, t] = factor * rows[t, c], of `count` rows of `width` numbers."""
    signature = types.void(INDEX, INDEX, INDEX, types.float32, INDEX)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        source, out = (emit.pointer(arguments[i], long(0), FLOAT) for i in (0, 4))
        count, width, factor = arguments[1], arguments[2], emit.splat(arguments[3])
        with emit.loop(builder.udiv(count, long(LANES))) as i, emit.loop(builder.udiv(width, long(LANES))) as j:
            t, c = emit.times(i, LANES), emit.times(j, LANES)
            tile = [emit.load(emit.at(source, builder.mul(builder.add(t, long(k)), width), c)) for k in range(LANES)]
            for k, column in enumerate(_turned(emit, [builder.fmul(row, factor) for row in tile])):
                emit.store(column, emit.at(out, builder.mul(builder.add(c, long(k)), count), t))
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
            """LANES by LANES numbers, and the same on the other side of the diagonal."""
            held = [emit.variable(floats(0.0)) for _ in range(LANES)]
            with emit.loop(count) as k:
                row = emit.at(source, builder.mul(k, width))
                right = emit.load(emit.at(row, second))
                for i in range(LANES):
                    emit.add_to(held[i], emit.splat(builder.load(emit.at(row, first, i))), right)
            made = [builder.load(part) for part in held]
            for left, below, block in ((first, second, made), (second, first, _turned(emit, made))):
                for i, row in enumerate(block):
                    emit.store(row, emit.at(out, builder.mul(builder.add(left, long(i)), width), below))

        with emit.loop(builder.udiv(width, long(LANES))) as j, emit.loop(builder.add(j, long(1))) as i:
            tile(emit.times(i, LANES), emit.times(j, LANES))
        return context.get_dummy_value()

    return signature, generate
