"""The innermost loops of the decode kernel, for a tile of one block: vector code behind numba intrinsics.

An array is given by its address and, where there are two arguments, by the entry at which the tile begins. Addresses, because
passing numba's arrays on costs more than these loops. Rows are query rows. A tile has 1 or `ROWS` rows, so that its
accumulators stay in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..codecs import LOW_BITS, MIDDLE
from .cpu import ROWS
from .memory import intrinsic
from .vectors import BYTE, BYTES, FLOAT, FLOATS, HALF, HALVES, INT, LANES, LINE, Emitter, floats, ints, long

# A tile's scores are of ROWS rows and ROWS tokens: ROWS * ROWS accumulators.
USUAL_GROUPS = 4  # value groups of a token that have code of their own: 128 channels, 32 a group
STRIP = 4  # vectors of channels that are gathered at a time: ROWS * STRIP accumulators
INDEX = types.intp


def _emitter(context: Any, builder: Any, arguments: Any) -> tuple[Emitter, Any]:
    """An emitter, and a function that makes a pointer of an address among the arguments, and the start behind it."""
    emit = Emitter(context, builder)

    def pointer(place: int, kind: Any) -> Any:
        return emit.pointer(arguments[place], arguments[place + 1], kind)

    return emit, pointer


def _dots(rows: int, coded: bool) -> Any:
    """Scores of ROWS tokens with a tile of rows: dot products over the channels.

    A key is read as offset + scale * (code + MIDDLE): the product is exact, so it is the reference's number with or without a
    fused multiplication.
    """

    @intrinsic
    def dots(
        typing: Any,
        keys: Any,
        key: Any,
        grid: Any,
        at: Any,
        query: Any,
        row: Any,
        channels: Any,
        scores: Any,
        to: Any,
        apart: Any,
    ) -> Any:
        """scores[to + r * apart + t] = query r . key t, of `keys[key:]`, `query[row:]`; `grid[at:]`: scales, then offsets."""
        signature = types.void(*(INDEX,) * 10)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit, pointer = _emitter(context, builder, arguments)
            width, apart = arguments[6], arguments[9]
            key, grid, query, to = pointer(0, BYTE if coded else FLOAT), pointer(2, FLOAT), pointer(4, FLOAT), pointer(7, FLOAT)
            held = [[emit.variable(floats(0.0)) for _ in range(ROWS)] for _ in range(rows)]
            with emit.loop(builder.udiv(width, long(LANES))) as chunk:
                c = emit.times(chunk, LANES)
                queries = [emit.load(emit.at(query, c, emit.times(width, r))) for r in range(rows)]
                if coded:
                    scale, offset = emit.load(emit.at(grid, c)), emit.load(emit.at(grid, c, width))
                for t in range(ROWS):
                    here = emit.at(key, c, emit.times(width, t))
                    if coded:
                        position = builder.fadd(builder.sitofp(emit.unsigned(here, BYTES), FLOATS), floats(MIDDLE))
                        read = emit.fma(position, scale, offset)
                    else:
                        read = emit.load(here)
                    for r in range(rows):
                        emit.add_to(held[r][t], read, queries[r])
            summed = emit.sums([builder.load(part) for row in held for part in row])
            for r in range(rows):
                four = emit.pick(summed, summed, [r * ROWS + t for t in range(ROWS)])
                emit.store(four, emit.at(to, emit.times(apart, r)))
            return context.get_dummy_value()

        return signature, generate

    return dots


def _gather(rows: int, form: str) -> Any:
    """What a tile's tokens add to the output: values by weights.

    `form` says how values are stored: "nibbles", a byte's low nibble is a channel of the first half of the channels, its high
    nibble one of the second; "bytes", one code a byte; "exact", float32 numbers.
    """

    @intrinsic
    def gather(
        typing: Any,
        values: Any,
        value: Any,
        scales: Any,
        offsets: Any,
        groups: Any,
        per_group: Any,
        weights: Any,
        weight: Any,
        tokens: Any,
        output: Any,
        to: Any,
        width: Any,
    ) -> Any:
        """output[to + r * width + c] = sum over t of weights[weight + r * tokens + t] * value t at channel c.

        The tokens' values begin at `values[value]`. Token t has `groups` scales at `scales[t * groups]`, offsets likewise;
        `per_group` vectors of channels share one.
        """
        signature = types.void(*(INDEX,) * 12)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit = Emitter(context, builder)
            groups, per_group, tokens, width = (arguments[i] for i in (4, 5, 8, 11))

            def pointer(place: int, start: Any, kind: Any) -> Any:
                return emit.pointer(arguments[place], start, kind)

            value = pointer(0, arguments[1], FLOAT if form == "exact" else BYTE)
            scale, offset = (pointer(i, long(0), FLOAT) for i in (2, 3))
            weight, output = pointer(6, arguments[7], FLOAT), pointer(9, arguments[10], FLOAT)
            pitch = builder.udiv(width, long(2)) if form == "nibbles" else width
            vectors = builder.udiv(pitch, long(LANES))

            def strip(first: Any, count: int, part: str) -> None:
                """`count` vectors of channels from vector `first` of a token's codes on."""
                held = [[emit.variable(floats(0.0)) for _ in range(rows)] for _ in range(count)]
                start = emit.times(first, LANES)
                channel = builder.add(start, pitch) if part == "high" else start
                mine = [
                    builder.udiv(builder.udiv(builder.add(channel, long(v * LANES)), long(LANES)), per_group)
                    for v in range(count)
                ]
                with emit.loop(tokens) as t:
                    token, grid = emit.at(value, builder.mul(t, pitch), start), builder.mul(t, groups)
                    shares = [emit.splat(builder.load(emit.at(weight, t, builder.mul(tokens, long(r))))) for r in range(rows)]
                    for v in range(count):
                        read = emit.load(emit.at(token, v * LANES)) if part == "exact" else None
                        if read is None:
                            position = _position(emit, emit.unsigned(emit.at(token, v * LANES), BYTES), part)
                            step, start_ = (emit.splat(builder.load(emit.at(of, grid, mine[v]))) for of in (scale, offset))
                            read = emit.fma(position, step, start_)
                        for r in range(rows):
                            emit.add_to(held[v][r], read, shares[r])
                for v in range(count):
                    for r in range(rows):
                        to = emit.at(output, channel, v * LANES, emit.times(width, r))
                        emit.store(builder.load(held[v][r]), to)

            def strips(first: Any, count: int) -> None:
                for half in ("low", "high") if form == "nibbles" else (form,):
                    strip(first, count, half)

            # As many vectors at a time as registers hold accumulators for; then what is left.
            with emit.loop(builder.udiv(vectors, long(STRIP))) as i:
                strips(emit.times(i, STRIP), STRIP)
            count = STRIP // 2
            while count:
                done = builder.and_(vectors, long(-2 * count))
                with builder.if_then(builder.icmp_unsigned("!=", builder.and_(vectors, long(count)), long(0))):
                    strips(done, count)
                count //= 2
            return context.get_dummy_value()

        return signature, generate

    return gather


def _position(emit: Emitter, codes: Any, part: str) -> Any:
    """Where on the grid codes lie, in float32, exactly."""
    b = emit.builder
    if part == "bytes":
        return b.fmul(b.sitofp(codes, FLOATS), floats(2.0**-LOW_BITS))
    nibble = b.and_(codes, ints(15)) if part == "low" else b.lshr(codes, ints(LOW_BITS))
    return b.fadd(b.sitofp(nibble, FLOATS), floats(MIDDLE))


dots_codes_1, dots_codes = _dots(1, True), _dots(ROWS, True)
dots_exact_1, dots_exact = _dots(1, False), _dots(ROWS, False)
gather_nibbles_1, gather_nibbles = _gather(1, "nibbles"), _gather(ROWS, "nibbles")
gather_bytes_1, gather_bytes = _gather(1, "bytes"), _gather(ROWS, "bytes")
gather_exact_1, gather_exact = _gather(1, "exact"), _gather(ROWS, "exact")


@intrinsic
def largest(typing: Any, numbers: Any, start: Any, count: Any) -> Any:
    """The largest of `count` floats (a multiple of 16); NaN is passed over."""
    signature = types.float32(*(INDEX,) * 3)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, pointer = _emitter(context, builder, arguments)
        source, most = pointer(0, FLOAT), emit.variable(floats(float("-inf")))

        def greater(x: Any, y: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        with emit.loop(builder.udiv(arguments[2], long(LANES))) as chunk:
            found = emit.load(emit.at(source, emit.times(chunk, LANES)))
            builder.store(greater(found, builder.load(most)), most)
        result, step = builder.load(most), 1
        while step < LANES:
            turned = emit.pick(result, result, [(k + step) % LANES for k in range(LANES)])
            result, step = greater(turned, result), 2 * step
        return builder.extract_element(result, ir.Constant(INT, 0))

    return signature, generate


@intrinsic
def weigh(typing: Any, scores: Any, start: Any, count: Any, base: Any, steps: Any, step: Any, sums: Any, to: Any) -> Any:
    """Scores to weights w = exp(score - base), in place.

    Eight sums at `sums[to]`: of w * step and its square, two zeros, and of w, w^2, w^3, w^4.
    """
    signature = types.void(INDEX, INDEX, INDEX, types.float32, *(INDEX,) * 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, pointer = _emitter(context, builder, arguments)
        scores, steps, sums = pointer(0, FLOAT), pointer(4, FLOAT), pointer(6, FLOAT)
        base = emit.splat(arguments[3])
        held = [emit.variable(floats(0.0)) for _ in range(8)]
        with emit.loop(builder.udiv(arguments[2], long(LANES))) as chunk:
            here = emit.times(chunk, LANES)
            place = emit.at(scores, here)
            weights = emit.exp(builder.fsub(emit.load(place), base))
            emit.store(weights, place)
            stepped, squared = builder.fmul(weights, emit.load(emit.at(steps, here))), builder.fmul(weights, weights)
            for i, x, y in ((0, stepped, None), (1, stepped, stepped), (4, weights, None), (5, squared, None)):
                emit.add_to(held[i], x, y)
            emit.add_to(held[6], squared, weights)
            emit.add_to(held[7], squared, squared)
        summed = emit.sums([builder.load(part) for part in held])
        emit.store(emit.pick(summed, summed, range(8)), sums)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def moments(typing: Any, weights: Any, weight: Any, norms: Any, norm: Any, count: Any) -> Any:
    """Sums of w * n and of w^2 * n, `count` of each (a multiple of 16)."""
    signature = types.UniTuple(types.float32, 2)(*(INDEX,) * 5)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, pointer = _emitter(context, builder, arguments)
        weights, norms = pointer(0, FLOAT), pointer(2, FLOAT)
        held = [emit.variable(floats(0.0)) for _ in range(2)]
        with emit.loop(builder.udiv(arguments[4], long(LANES))) as chunk:
            here = emit.times(chunk, LANES)
            w, n = emit.load(emit.at(weights, here)), emit.load(emit.at(norms, here))
            emit.add_to(held[0], w, n)
            emit.add_to(held[1], builder.fmul(w, w), n)
        return _pair(emit, held)

    return signature, generate


def _pair(emit: Emitter, held: Any) -> Any:
    """The sums of two variables as a tuple."""
    builder = emit.builder
    summed = emit.sums([builder.load(part) for part in held])
    return cgutils.pack_array(builder, [builder.extract_element(summed, ir.Constant(INT, i)) for i in range(2)])


def _widened(kind: str) -> Any:
    @intrinsic
    def widened(typing: Any, source: Any, start: Any, numbers: Any, to: Any, count: Any) -> Any:
        """`count` numbers (a multiple of 16) from byte `start` on, to float32."""
        signature = types.void(*(INDEX,) * 5)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit = Emitter(context, builder)
            stored = FLOAT if kind == "float32" else HALF
            source = builder.bitcast(emit.pointer(arguments[0], arguments[1], BYTE), stored.as_pointer())
            numbers = emit.pointer(arguments[2], arguments[3], FLOAT)
            with emit.loop(builder.udiv(arguments[4], long(LANES))) as chunk:
                here = emit.times(chunk, LANES)
                if kind == "float32":
                    wide = emit.load(emit.at(source, here))
                elif kind == "float16":
                    wide = emit.half(emit.at(source, here))
                else:
                    wide = builder.bitcast(builder.shl(emit.unsigned(emit.at(source, here), HALVES), ints(16)), FLOATS)
                emit.store(wide, emit.at(numbers, here))
            return context.get_dummy_value()

        return signature, generate

    return widened


from_float32, from_float16, from_bfloat16 = _widened("float32"), _widened("float16"), _widened("bfloat16")


@intrinsic
def fetch(typing: Any, source: Any, start: Any, count: Any) -> Any:
    """Ask for `count` bytes from byte `start` on to be brought near. Where nothing lies, that does no harm."""
    signature = types.void(*(INDEX,) * 3)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        source = emit.pointer(arguments[0], arguments[1], BYTE)
        with emit.loop(builder.udiv(builder.add(arguments[2], long(LINE - 1)), long(LINE))) as line:
            emit.fetch(emit.at(source, emit.times(line, LINE)))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def lengths(typing: Any, source: Any, start: Any, count: Any, factor: Any, norms: Any) -> Any:
    """norms[t] = factor times unsigned 16-bit number t from byte `start` on, `count` of them (a multiple of 16)."""
    signature = types.void(*(INDEX,) * 3, types.float32, INDEX)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit = Emitter(context, builder)
        source = builder.bitcast(emit.pointer(arguments[0], arguments[1], BYTE), HALF.as_pointer())
        norms, factor = emit.pointer(arguments[4], long(0), FLOAT), emit.splat(arguments[3])
        with emit.loop(builder.udiv(arguments[2], long(LANES))) as chunk:
            here = emit.times(chunk, LANES)
            codes = builder.sitofp(emit.unsigned(emit.at(source, here), HALVES), FLOATS)
            emit.store(builder.fmul(codes, factor), emit.at(norms, here))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def query_weights(typing: Any, sizes: Any, row: Any, scales: Any, scale: Any, channels: Any) -> Any:
    """(sum of sizes * |scales|, sum of their squares): what `score_weights` adds up, of sizes that are not negative."""
    signature = types.UniTuple(types.float32, 2)(*(INDEX,) * 5)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, pointer = _emitter(context, builder, arguments)
        sizes, scales = pointer(0, FLOAT), pointer(2, FLOAT)
        held = [emit.variable(floats(0.0)) for _ in range(2)]
        with emit.loop(builder.udiv(arguments[4], long(LANES))) as chunk:
            here = emit.times(chunk, LANES)
            product = builder.fmul(
                emit.load(emit.at(sizes, here)), emit.call("llvm.fabs", FLOATS, emit.load(emit.at(scales, here)))
            )
            emit.add_to(held[0], product)
            emit.add_to(held[1], product, product)
        return _pair(emit, held)

    return signature, generate


@intrinsic
def token_steps(typing: Any, scales: Any, start: Any, groups: Any, tokens: Any, up: Any, steps: Any, to: Any) -> Any:
    """steps[to + t] = up * the L2 norm of `scales[start + t * groups:]`, `groups` of them; a multiple of 16 tokens."""
    signature = types.void(*(INDEX,) * 4, types.float32, INDEX, INDEX)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, pointer = _emitter(context, builder, arguments)
        scales, steps, groups, up = pointer(0, FLOAT), pointer(5, FLOAT), arguments[2], emit.splat(arguments[4])
        with emit.loop(builder.udiv(arguments[3], long(LANES))) as chunk:
            here, total = emit.times(chunk, LANES), emit.variable(floats(0.0))
            with builder.if_else(builder.icmp_unsigned("==", groups, long(USUAL_GROUPS))) as (usual, other):
                with usual:
                    first = emit.at(scales, emit.times(here, USUAL_GROUPS))
                    rows = [emit.load(emit.at(first, i * LANES)) for i in range(USUAL_GROUPS)]
                    builder.store(emit.neighbours([builder.fmul(row, row) for row in rows]), total)
                with other, emit.loop(groups) as g:
                    lanes: Any = ir.Constant(FLOATS, ir.Undefined)
                    for k in range(LANES):
                        one = builder.load(emit.at(scales, g, builder.mul(builder.add(here, long(k)), groups)))
                        lanes = builder.insert_element(lanes, one, ir.Constant(INT, k))
                    emit.add_to(total, lanes, lanes)
            emit.store(builder.fmul(emit.call("llvm.sqrt", FLOATS, builder.load(total)), up), emit.at(steps, here))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def dot(typing: Any, x: Any, at: Any, y: Any, to: Any, count: Any) -> Any:
    """The float32 dot product of `x[at:]` and `y[to:]`, `count` numbers (a multiple of 16)."""
    signature = types.float32(*(INDEX,) * 5)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit, pointer = _emitter(context, builder, arguments)
        x, y, held = pointer(0, FLOAT), pointer(2, FLOAT), emit.variable(floats(0.0))
        with emit.loop(builder.udiv(arguments[4], long(LANES))) as chunk:
            here = emit.times(chunk, LANES)
            emit.add_to(held, emit.load(emit.at(x, here)), emit.load(emit.at(y, here)))
        return builder.extract_element(emit.sums([builder.load(held)]), ir.Constant(INT, 0))

    return signature, generate
