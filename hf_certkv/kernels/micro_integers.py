"""Innermost loops that multiply codes as the integers they are, for processors that multiply bytes four at a time (VNNI).

A factor x of a code - a query's channel times its step, a weight times a token's step - becomes a multiple of a power of two,
`unit`: x = unit * Q, rounded to nearest, |Q| < 2^22. Q is written with three digits of eight bits with a sign,
Q = d0 + 256 d1 + 65536 d2, so that a sum of codes by factors is three sums of bytes by bytes, in int32, exactly.
What is rounded is in docs/certificate.md, section 5. Digits lie as they are read: for four factors of a row four words of four
bytes, of which d0, d1 and d2 are the first three; then the tile's other rows; then the next four factors.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from ..codecs import MIDDLE
from .cpu import ROWS
from .memory import intrinsic
from .micro import INDEX
from .vectors import BYTE, FLOAT, FLOATS, INT, INTS, LANES, LINE, Emitter, features, floats, ints, long

DIGITS = 3
CHUNK = 4 * LANES  # bytes of a vector
CENTRE = 128  # codes of keys are taken relative to this
MAGIC = 1.5 * 2.0**23  # added to a number below 2^22, leaves it as an integer in the low bits
MAGIC_BITS = 0x4B400000
FLIP = 0x8080  # added and flipped, makes of an integer's lower bytes digits with a sign
WORDS = 16  # bytes of four factors of a row
LEAST_EXPONENT = 22  # of the largest factor, as stored in a float32: units and their inverses are normal numbers then
FACTS = 8  # numbers of a query row and block, as `key_digits` leaves them
CONSTANT, HIGH, LOW, ERROR, STARTS = 0, 1, 2, 3, 4


@cache
def supported() -> bool:
    """Whether the processor that numba compiles for has what this module is made of."""
    found = features()
    return all(found.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni"))


def add_products(emit: Emitter, held: Any, codes: Any, digits: Any) -> None:
    """Add to sixteen int32 sums the products of four neighbouring bytes each: unsigned codes by the same four signed digits."""
    signature = ir.FunctionType(INTS, [INTS] * 3)
    module = emit.builder.module
    name = "llvm.x86.avx512.vpdpbusd.512"
    function = module.globals.get(name) or ir.Function(module, signature, name)
    emit.builder.store(emit.builder.call(function, [emit.builder.load(held), codes, digits]), held)


def _word(emit: Emitter, pointer: Any, *offsets: Any) -> Any:
    """Four neighbouring bytes."""
    word = emit.builder.load(emit.builder.bitcast(emit.at(pointer, *offsets), INT.as_pointer()))
    word.align = 1
    return word


def put_digits(emit: Emitter, x: Any, y: Any, place: Any, apart: Any) -> Any:
    """Write the digits of sixteen factors x * y, below 2^22, rounded; four of them `apart` bytes from the next."""
    b = emit.builder
    bits = b.bitcast(emit.fma(x, y, floats(MAGIC)), INTS)
    digits = b.xor(b.add(bits, ints((FLIP - MAGIC_BITS) % 2**32)), ints(FLIP))
    # In every part of 16 bytes, four bytes of each of four factors: the first ones come to lie together, and so on.
    order = [16 * part + 4 * i + k for part in range(4) for k in range(4) for i in range(4)]
    every = ir.VectorType(BYTE, CHUNK)
    both = b.bitcast(digits, every)
    words = b.bitcast(b.shuffle_vector(both, both, ir.Constant(ir.VectorType(INT, CHUNK), order)), INTS)
    for part in range(4):
        emit.store(emit.pick(words, words, range(4 * part, 4 * part + 4)), emit.at(place, b.mul(apart, long(part))))
    return words


def power_of(emit: Emitter, top: Any) -> tuple[Any, Any]:
    """The power of two that brings numbers up to `top` (by its bits) below 2^22 and over 2^21, and its inverse."""
    b = emit.builder
    stored = b.lshr(top, ir.Constant(INT, 23))
    low, high = ir.Constant(INT, LEAST_EXPONENT), ir.Constant(INT, 254)
    stored = b.select(b.icmp_unsigned("<", stored, low), low, stored)
    stored = b.select(b.icmp_unsigned(">", stored, high), high, stored)
    power = b.shl(b.sub(ir.Constant(INT, 275), stored), ir.Constant(INT, 23))
    unit = b.shl(b.sub(stored, ir.Constant(INT, 21)), ir.Constant(INT, 23))
    return b.bitcast(power, FLOAT), b.bitcast(unit, FLOAT)


def largest(emit: Emitter, lanes: Any) -> Any:
    """The largest of sixteen numbers that are not negative, by their bits; NaN counts as larger than all."""
    return emit.reduce("llvm.vector.reduce.umax", emit.builder.bitcast(lanes, INTS))


def size(emit: Emitter, x: Any) -> Any:
    return emit.call("llvm.fabs", FLOATS, x)


def raised(emit: Emitter, place: Any, sizes: Any) -> None:
    """variable = the larger, lane by lane, by bits."""
    b = emit.builder
    held, new = (b.bitcast(x, INTS) for x in (b.load(place), sizes))
    b.store(b.bitcast(b.select(b.icmp_unsigned(">", new, held), new, held), FLOATS), place)


@intrinsic
def key_digits(
    typing: Any,
    query: Any,
    row: Any,
    grid: Any,
    at: Any,
    channels: Any,
    digits: Any,
    to: Any,
    apart: Any,
    facts: Any,
    fact: Any,
) -> Any:
    """The digits of a query row's factors for one block of keys, and what else its scores are made from.

    `query[row:]`: float32, scaled; `grid[at:]`: steps of the channels, then offsets. A score is
    CONSTANT + LOW * (d0 sums) + HIGH * (d1 sums + 256 * d2 sums), sums of digits by codes that begin at STARTS: so that codes
    count relative to CENTRE. Digits at `digits[to:]`, four channels' `apart` bytes from the next; FACTS numbers at
    `facts[fact:]`: float32, the STARTS int32. ERROR: no score is farther than that from the exact one of the same keys, but
    for underflow.
    """
    signature = types.void(*(INDEX,) * 10)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, b = Emitter(context, builder), builder
        channels, apart = arguments[4], arguments[7]
        query, grid, facts = (emit.pointer(arguments[i], arguments[i + 1], FLOAT) for i in (0, 2, 8))
        digits = emit.pointer(arguments[5], arguments[6], BYTE)
        constant, sized, total, top = (emit.variable(floats(0.0)) for _ in range(4))

        def factors(c: Any) -> tuple[Any, Any, Any]:
            mine, step = emit.load(emit.at(query, c)), emit.load(emit.at(grid, c))
            return mine, step, b.fmul(mine, step)

        chunks = b.udiv(channels, long(LANES))
        with emit.loop(chunks) as chunk:
            c = emit.times(chunk, LANES)
            mine, step, factor = factors(c)
            centre = emit.fma(step, floats(CENTRE + MIDDLE), emit.load(emit.at(grid, c, channels)))
            emit.add_to(constant, mine, centre)
            emit.add_to(sized, size(emit, mine), size(emit, centre))
            emit.add_to(total, size(emit, factor))
            raised(emit, top, size(emit, factor))
        most = largest(emit, b.load(top))
        power, unit = power_of(emit, most)
        sums, by = emit.variable(ints(0)), emit.splat(power)
        with emit.loop(chunks) as chunk:
            place = emit.at(digits, b.mul(emit.times(chunk, 4), apart))
            words = put_digits(emit, factors(emit.times(chunk, LANES))[2], by, place, apart)
            add_products(emit, sums, ints(0x01010101), words)
        added = b.load(sums)
        for half in (8, 4):
            added = b.add(added, emit.pick(added, added, [(k + half) % LANES for k in range(LANES)]))
        starts = b.mul(added, ints(-CENTRE))
        emit.store(emit.pick(starts, starts, range(4)), b.bitcast(emit.at(facts, STARTS), INT.as_pointer()))
        folded = emit.sums([b.load(constant), b.load(sized), b.load(total), floats(0.0)])
        c0, a0, b0 = (b.extract_element(folded, ir.Constant(INT, i)) for i in range(3))
        # Where the largest factor overflowed, or is not a number, nor is any score.
        factor_most = b.bitcast(most, FLOAT)
        b.store(b.fadd(c0, b.fsub(factor_most, factor_most)), emit.at(facts, CONSTANT))
        b.store(b.fmul(unit, ir.Constant(FLOAT, 256.0)), emit.at(facts, HIGH))
        b.store(unit, emit.at(facts, LOW))
        width = b.uitofp(channels, FLOAT)
        by_constant = b.fadd(b.fmul(width, ir.Constant(FLOAT, 2.0**-28)), ir.Constant(FLOAT, 12 * 2.0**-24))
        error = b.fadd(b.fmul(by_constant, a0), b.fmul(ir.Constant(FLOAT, 8 * CENTRE * 2.0**-24), b0))
        error = b.fadd(error, b.fmul(b.fmul(width, ir.Constant(FLOAT, 66.0)), unit))
        b.store(b.fmul(error, ir.Constant(FLOAT, 1 + 2.0**-8)), emit.at(facts, ERROR))
        return context.get_dummy_value()

    return signature, generate


def transposed(emit: Emitter, rows: list[Any]) -> list[Any]:
    """A matrix of 16 times 16 numbers of four bytes, transposed."""

    def quads(x: Any, y: Any, high: int) -> Any:
        return emit.pick(x, y, [lane for k in range(0, LANES, 4) for lane in (k + high, LANES + k + high, k + high + 1, LANES + k + high + 1)])  # fmt: skip  # noqa: E501

    def pairs(x: Any, y: Any, high: int) -> Any:
        return emit.pick(x, y, [lane for k in range(0, LANES, 4) for lane in (k + high, k + high + 1, LANES + k + high, LANES + k + high + 1)])  # fmt: skip  # noqa: E501

    def parts(x: Any, y: Any, odd: int) -> Any:
        """Parts of four lanes: the first and third of both, or the second and fourth."""
        return emit.pick(x, y, [4 * part + i + side for side in (0, LANES) for part in (odd, odd + 2) for i in range(4)])

    # In every part of four lanes, four rows are transposed; then parts are.
    fours = []
    for k in range(0, LANES, 4):
        a, b, c, d = rows[k : k + 4]
        low, high = (quads(a, b, 0), quads(a, b, 2)), (quads(c, d, 0), quads(c, d, 2))
        fours.append(
            [pairs(low[0], high[0], 0), pairs(low[0], high[0], 2), pairs(low[1], high[1], 0), pairs(low[1], high[1], 2)]
        )
    made: list[Any] = [None] * LANES
    for j in range(4):  # fours[k][j] has in part p the rows 4k..4k+3 at column 4p + j
        a, b, c, d = (four[j] for four in fours)
        even, odd = (parts(a, b, 0), parts(c, d, 0)), (parts(a, b, 1), parts(c, d, 1))
        made[j], made[8 + j] = parts(even[0], even[1], 0), parts(even[0], even[1], 1)
        made[4 + j], made[12 + j] = parts(odd[0], odd[1], 0), parts(odd[0], odd[1], 1)
    return made


def _dots(rows: int) -> Any:
    @intrinsic
    def dots(
        typing: Any, keys: Any, key: Any, digits: Any, to_digits: Any, facts: Any, fact: Any, channels: Any, scores: Any,
        to: Any, apart: Any, turned: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        """scores[to + r * apart + t] of 16 tokens t with a tile of rows r, as `key_digits` says; a multiple of 64 channels.

        Keys begin at `keys[key]`, the tile's digits at `digits[to_digits]`, its facts at `facts[fact]`. turned: 1 KiB.
        What lies `ahead` bytes behind is brought near meanwhile, a line at a time: asked for at once, it would be waited for.
        """
        signature = types.void(*(INDEX,) * 12)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit, b = Emitter(context, builder), builder
            channels, apart = arguments[6], arguments[9]
            keys, digits = (emit.pointer(arguments[i], arguments[i + 1], BYTE) for i in (0, 2))
            facts, scores = (emit.pointer(arguments[i], arguments[i + 1], FLOAT) for i in (4, 7))
            tile = emit.pointer(arguments[10], long(0), BYTE)
            held = []
            for r in range(rows):
                starts = [b.bitcast(emit.at(facts, r * FACTS + STARTS + i), INT.as_pointer()) for i in range(DIGITS)]
                held.append([emit.variable(emit.splat(b.load(start))) for start in starts])
            with emit.loop(b.udiv(channels, long(CHUNK))) as chunk:
                c = emit.times(chunk, CHUNK)
                codes = [emit.load(emit.at(keys, c, emit.times(channels, t)), INTS) for t in range(LANES)]
                for four, vector in enumerate(transposed(emit, codes)):
                    emit.store(vector, emit.at(tile, four * CHUNK))
                # A loop, and by way of memory: written out, LLVM would put the products of one sum behind each other, and each
                # would wait for the last.
                with emit.loop(long(LANES)) as four:
                    place = b.add(emit.times(chunk, LANES), four)
                    emit.fetch(emit.at(keys, arguments[11], emit.times(place, LINE)))
                    word = emit.at(digits, emit.times(place, rows * WORDS))
                    add_tile(emit, held, emit.load(emit.at(tile, emit.times(four, CHUNK)), INTS), word)
            for r in range(rows):
                constant, high, low = (emit.splat(b.load(emit.at(facts, r * FACTS + i))) for i in (CONSTANT, HIGH, LOW))
                score = together(emit, [b.load(place) for place in held[r]], high, low, constant)
                emit.store(score, emit.at(scores, emit.times(apart, r)))
            return context.get_dummy_value()

        return signature, generate

    return dots


def add_tile(emit: Emitter, held: Any, codes: Any, words: Any) -> None:
    """Add the products of four neighbouring codes, in each lane, by the digits of four factors of all rows."""
    for r, row in enumerate(held):
        for i in range(DIGITS):
            add_products(emit, row[i], codes, emit.splat(_word(emit, words, r * WORDS + 4 * i)))


def together(emit: Emitter, sums: list[Any], high: Any, low: Any, constant: Any) -> Any:
    """constant + low * (first sum) + high * (second sum + 256 * third)."""
    b = emit.builder
    first = emit.fma(b.sitofp(sums[0], FLOATS), low, constant)
    return emit.fma(b.sitofp(b.add(b.shl(sums[2], ints(8)), sums[1]), FLOATS), high, first)


dots_integers_1, dots_integers = _dots(1), _dots(ROWS)
