"""The value half of the loops over integers: weights times steps as digits, and the codes of four tokens at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ..codecs import LOW_BITS
from .cpu import ROWS
from .memory import intrinsic
from .micro import INDEX
from .micro_integers import DIGITS, WORDS, add_tile, largest, power_of, put_digits, raised, size, together
from .vectors import BYTE, BYTES, FLOAT, FLOATS, INT, INTS, LANES, LINE, Emitter, floats, ints, long


def _columns(emit: Emitter, vectors: list[Any]) -> list[Any]:
    """Every n-th lane of n vectors, one behind the other: n vectors. n is a power of two."""
    if len(vectors) == 1:
        return vectors
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    even, odd = (_columns(emit, [emit.pick(x, y, range(at, 2 * LANES, 2)) for x, y in pairs]) for at in (0, 1))
    return [one for pair in zip(even, odd, strict=True) for one in pair]


@intrinsic
def value_grid(
    typing: Any, scales: Any, offsets: Any, groups: Any, tokens: Any, factor: Any, middle: Any, steps: Any, starts: Any
) -> Any:
    """By group: `steps[g * tokens + t]` = factor * the scale of token t; `starts[...]` = its offset + middle * its scale.

    `scales`, `offsets`: float32 `[tokens, groups]`; tokens: a multiple of 16.
    """
    signature = types.void(*(INDEX,) * 4, types.float32, types.float32, INDEX, INDEX)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, b = Emitter(context, builder), builder
        groups, tokens = arguments[2], arguments[3]
        scales, offsets, steps, starts = (emit.pointer(arguments[i], long(0), FLOAT) for i in (0, 1, 6, 7))
        factor, middle = emit.splat(arguments[4]), emit.splat(arguments[5])

        def put(g: Any, here: Any, scale: Any, offset: Any) -> None:
            place = b.add(b.mul(g, tokens), here)
            emit.store(b.fmul(scale, factor), emit.at(steps, place))
            emit.store(emit.fma(scale, middle, offset), emit.at(starts, place))

        with emit.loop(b.udiv(tokens, long(LANES))) as chunk:
            here = emit.times(chunk, LANES)
            usual = ir.Constant(ir.IntType(1), 0)
            for count in (1, 2, 4, 8):
                found = b.icmp_unsigned("==", groups, long(count))
                usual = b.or_(usual, found)
                with b.if_then(found):
                    first = emit.times(here, count)
                    parts = [[emit.load(emit.at(of, first, i * LANES)) for i in range(count)] for of in (scales, offsets)]
                    for g, (scale, offset) in enumerate(zip(*(_columns(emit, part) for part in parts), strict=True)):
                        put(long(g), here, scale, offset)
            with b.if_then(b.not_(usual)), emit.loop(groups) as g:
                lanes: list[Any] = [ir.Constant(FLOATS, ir.Undefined)] * 2
                for k in range(LANES):
                    place = b.add(b.mul(b.add(here, long(k)), groups), g)
                    one = [b.load(emit.at(of, place)) for of in (scales, offsets)]
                    lanes = [b.insert_element(x, y, ir.Constant(INT, k)) for x, y in zip(lanes, one, strict=True)]
                put(g, here, *lanes)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def onto_integers(typing: Any, steps: Any, start: Any, count: Any) -> Any:
    """Multiply `count` numbers (a multiple of 16) by the power of two that brings them below 2^22. Returns its inverse."""
    signature = types.float32(*(INDEX,) * 3)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, b = Emitter(context, builder), builder
        steps, chunks = emit.pointer(arguments[0], arguments[1], FLOAT), b.udiv(arguments[2], long(LANES))
        top = emit.variable(floats(0.0))
        with emit.loop(chunks) as chunk:
            raised(emit, top, size(emit, emit.load(emit.at(steps, emit.times(chunk, LANES)))))
        power, unit = power_of(emit, largest(emit, b.load(top)))
        by = emit.splat(power)
        with emit.loop(chunks) as chunk:
            place = emit.at(steps, emit.times(chunk, LANES))
            emit.store(b.fmul(emit.load(place), by), place)
        return unit

    return signature, generate


def _weight_digits(rows: int) -> Any:
    @intrinsic
    def weight_digits(
        typing: Any, weights: Any, weight: Any, steps: Any, starts: Any, groups: Any, tokens: Any, digits: Any, constants: Any
    ) -> Any:
        """Digits of a tile's weights times steps, by group and four tokens; `constants[g * rows + r]`: weights by starts.

        `weights[weight + r * tokens + t]`, at most 1; `steps`, `starts`: `[groups, tokens]`, the former below 2^22.
        """
        signature = types.void(*(INDEX,) * 8)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit, b = Emitter(context, builder), builder
            groups, tokens = arguments[4], arguments[5]
            weights = emit.pointer(arguments[0], arguments[1], FLOAT)
            steps, starts, constants = (emit.pointer(arguments[i], long(0), FLOAT) for i in (2, 3, 7))
            digits = emit.pointer(arguments[6], long(0), BYTE)
            with emit.loop(groups) as g:
                held = [emit.variable(floats(0.0)) for _ in range(rows)]
                with emit.loop(b.udiv(tokens, long(LANES))) as chunk:
                    here = emit.times(chunk, LANES)
                    place = b.add(b.mul(g, tokens), here)
                    step, start = emit.load(emit.at(steps, place)), emit.load(emit.at(starts, place))
                    for r in range(rows):
                        mine = emit.load(emit.at(weights, here, emit.times(tokens, r)))
                        emit.add_to(held[r], mine, start)
                        to = emit.at(digits, emit.times(place, rows * WORDS // 4), r * WORDS)
                        put_digits(emit, mine, step, to, long(rows * WORDS))
                summed = emit.sums([b.load(part) for part in held])
                emit.store(emit.pick(summed, summed, range(rows)), emit.at(constants, emit.times(g, rows)))
            return context.get_dummy_value()

        return signature, generate

    return weight_digits


weight_digits_1, weight_digits = _weight_digits(1), _weight_digits(ROWS)


def _gather(rows: int, nibbles: bool) -> Any:
    @intrinsic
    def gather(
        typing: Any, values: Any, value: Any, digits: Any, constants: Any, units: Any, per_group: Any, tokens: Any, output: Any,
        to: Any, width: Any,
    ) -> Any:  # fmt: skip
        """output[to + r * width + c] = what a block's values add, from `weight_digits`; units: of each group's steps.

        Codes begin at `values[value]`: two to a byte, low nibbles those of the first half of the channels, or one. What lies
        behind them is brought near meanwhile.
        """
        signature = types.void(*(INDEX,) * 10)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit, b = Emitter(context, builder), builder
            per_group, tokens, width = (arguments[i] for i in (5, 6, 9))
            values, output = emit.pointer(arguments[0], arguments[1], BYTE), emit.pointer(arguments[7], arguments[8], FLOAT)
            digits = emit.pointer(arguments[2], long(0), BYTE)
            constants, units = (emit.pointer(arguments[i], long(0), FLOAT) for i in (3, 4))
            halves = 2 if nibbles else 1
            pitch = b.udiv(width, long(halves))
            vectors = b.udiv(pitch, long(LANES))
            with emit.loop(vectors) as piece:
                group = [b.udiv(b.add(piece, b.mul(vectors, long(half))), per_group) for half in range(halves)]
                held = [[[emit.variable(ints(0)) for _ in range(DIGITS)] for _ in range(rows)] for _ in range(halves)]
                words = [emit.at(digits, emit.times(b.mul(g, tokens), rows * WORDS // 4)) for g in group]
                with emit.loop(b.udiv(tokens, long(4))) as four:
                    t = emit.times(four, 4)
                    line = b.add(b.mul(piece, b.udiv(tokens, long(4))), four)
                    emit.fetch(emit.at(values, b.mul(tokens, pitch), emit.times(line, LINE)))
                    codes = _four_tokens(emit, emit.at(values, b.mul(t, pitch), emit.times(piece, LANES)), pitch)
                    parts = [codes]
                    if nibbles:
                        mask = ints(0x0F0F0F0F)
                        parts = [b.and_(codes, mask), b.and_(b.lshr(codes, ints(LOW_BITS)), mask)]
                    for half in range(halves):
                        add_tile(emit, held[half], parts[half], emit.at(words[half], emit.times(four, rows * WORDS)))
                for half in range(halves):
                    unit = b.load(emit.at(units, group[half]))
                    high, low = emit.splat(b.fmul(unit, ir.Constant(FLOAT, 256.0))), emit.splat(unit)
                    for r in range(rows):
                        constant = emit.splat(b.load(emit.at(constants, emit.times(group[half], rows), r)))
                        found = together(emit, [b.load(place) for place in held[half][r]], high, low, constant)
                        channel = b.add(emit.times(piece, LANES), b.mul(pitch, long(half)))
                        emit.store(found, emit.at(output, channel, emit.times(width, r)))
            return context.get_dummy_value()

        return signature, generate

    return gather


def _four_tokens(emit: Emitter, pointer: Any, pitch: Any) -> Any:
    """Sixteen bytes of each of four tokens `pitch` apart: a lane for each place, its bytes those of the four tokens."""
    b = emit.builder
    rows = [emit.load(emit.at(pointer, emit.times(pitch, t)), BYTES) for t in range(4)]
    two = [emit.pick(rows[i], rows[i + 1], range(2 * LANES)) for i in (0, 2)]
    order = ir.VectorType(INT, 4 * LANES)
    lanes = [LANES * t + place for place in range(LANES) for t in range(4)]
    return b.bitcast(b.shuffle_vector(two[0], two[1], ir.Constant(order, lanes)), INTS)


gather_nibbles_1, gather_nibbles = _gather(1, True), _gather(ROWS, True)
gather_bytes_1, gather_bytes = _gather(1, False), _gather(ROWS, False)
