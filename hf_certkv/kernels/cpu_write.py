"""Blocks quantised, measured and checksummed on the CPU: what `codecs` and `checksums` specify, compiled, on several threads.

Why the results are those of the codecs, and the numbers upper bounds as theirs are, is said in `cpu_write_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checksums import multipliers
from ..codecs import SQUARINGS, KeyCodec, ValueCodec
from . import compiling, cpu, micro_integers, threads
from .cpu_write_row import (
    BFLOAT16,
    EXACT,
    FLOAT16,
    FLOAT32,
    LARGEST,
    SMALLEST,
    SUMMING,
    copy,
    extremes,
    grid,
    half_bits,
    length_codes,
    load,
    round_up,
    spectral,
    spread,
    without_step,
)
from .micro_integers import CHUNK as BYTES_AT_ONCE
from .residual import (
    FACTS,
    channel_extremes,
    group_extremes,
    nibbles,
    spread_groups,
    token_both,
    token_coarse,
    token_fine,
    widen_bfloat16,
    widen_float32,
)
from .vectors import LANES

FORMS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
CHUNK = 16  # blocks that a thread takes at a time
Work = Callable[[int, int], object]  # on units start..stop-1
Task = tuple[Tensor, KeyCodec | ValueCodec, dict[str, Tensor], int]
SIGNED_AT_LEAST = 128  # blocks that are worth a thread
exact_kernel, summing_kernel = (compiling.kernel(fastmath=allowed, error_model="numpy") for allowed in (EXACT, SUMMING))


@exact_kernel
def _write(
    bits16: Any,
    bits32: Any,
    form: int,
    strides: Any,
    sizes: Any,
    keyed: bool,
    eight: bool,
    group: int,
    levels: int,
    integers: bool,
    first: int,
    codes: Any,
    plane: Any,
    scale: Any,
    offset: Any,
    numbers: Any,
    lengths: Any,
    left: Any,
    start: int,
    stop: int,
) -> None:
    """Blocks start..stop-1, of `heads * blocks` a batch row, into their places from `first` on. `left`: those left out."""
    heads, blocks, tokens, channels = sizes
    groups = channels if keyed else -(-channels // group)
    count = groups if keyed else tokens * groups
    whole, grouped = channels % LANES == 0, group % LANES == 0 and channels % group == 0
    deep, wide, half = -(-tokens // LANES) * LANES, -(-channels // LANES) * LANES, (channels + 1) // 2
    x = np.zeros((tokens, wide), dtype=np.float32)
    x_bits = x.view(np.int32)
    limits = np.empty((2, max(count, wide)))
    low, high = limits[0, :count], limits[1, :count]
    near, magic = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.float32)
    near_bits, magic_bits = near.view(np.int32), magic.view(np.int32)
    lattice = np.zeros((4, wide))
    origin, step, parts, inverse = lattice[0, :channels], lattice[1, :channels], lattice[2, :channels], lattice[3, :channels]
    upper, lower, packed = (
        np.zeros(2 * wide, dtype=np.uint8),
        np.zeros(2 * wide, dtype=np.uint8),
        np.empty(wide, dtype=np.uint8),
    )
    rows, turned = np.zeros((levels, deep, wide), dtype=np.float32), np.empty(deep * wide, dtype=np.float32)
    rank = min(deep, wide)
    one, two = np.empty((rank, rank), dtype=np.float32), np.empty((rank, rank), dtype=np.float32)
    narrowed, sums = np.zeros((deep, -(-wide // BYTES_AT_ONCE) * BYTES_AT_ONCE), dtype=np.int8), np.empty(deep, dtype=np.int32)
    facts, peaks = np.empty(FACTS), np.empty((levels, LANES))
    errors, total, length = np.empty(levels), np.empty(levels), np.empty(tokens)
    for unit in range(start, stop):
        n, h, b = unit % blocks, unit // blocks % heads, unit // (blocks * heads)
        base = b * strides[0] + h * strides[1] + n * strides[2]
        finite = True
        for t in range(tokens):
            place, to = base + t * strides[3], x.ctypes.data + t * wide * 4
            if form == FLOAT16 or not whole:
                finite &= load(bits16, bits32, form, place, x[t, :channels], x_bits[t, :channels])
            elif form == BFLOAT16:
                finite &= widen_bfloat16(bits16.ctypes.data + 2 * place, channels, to)
            else:
                finite &= widen_float32(bits32.ctypes.data + 4 * place, channels, to)
        if not finite:
            left[unit] = True
            continue
        if keyed:
            channel_extremes(x.ctypes.data, tokens, wide, low.ctypes.data, high.ctypes.data)
        elif grouped:
            for t in range(tokens):
                at = t * groups * 8
                group_extremes(x.ctypes.data + t * wide * 4, groups, group, low.ctypes.data + at, high.ctypes.data + at)
        else:
            for t in range(tokens):
                for g in range(groups):
                    low[t * groups + g], high[t * groups + g] = extremes(x[t, g * group : min((g + 1) * group, channels)])
        grid(low, high, 256.0 if keyed else 16.0, near, near_bits, magic, magic_bits)
        half_bits(low, near, near_bits, offset[b, h, first + n])
        half_bits(high, near, near_bits, scale[b, h, first + n])
        stepless = False
        if keyed:
            for c in range(channels):
                origin[c], step[c] = low[c], high[c]
                inverse[c] = 1.0 / high[c] if high[c] > 0.0 else 0.0
                parts[c] = 16.0 * inverse[c]
                stepless |= high[c] == 0.0
        radius, wrong = 0.0, False
        errors[:], total[:], peaks[:] = 0.0, 0.0, 0.0
        for t in range(tokens):
            if not keyed:
                steps = 0.0
                for g in range(groups):
                    steps += high[t * groups + g] * high[t * groups + g]
                share, at = 1.0 / np.sqrt(steps) if steps > 0.0 else 0.0, t * groups * 8
                stepless = steps == 0.0
                if grouped:
                    limit = low.ctypes.data + at, high.ctypes.data + at
                    spread_groups(limit[0], limit[1], groups, group, share, lattice.ctypes.data, wide)
                else:
                    spread(share, inverse)
                    for g in range(groups):
                        s, group_range = high[t * groups + g], slice(g * group, min((g + 1) * group, channels))
                        spread(low[t * groups + g], origin[group_range])
                        spread(s, step[group_range])
                        spread(16.0 / s if s > 0.0 else 0.0, parts[group_range])
            address, to = x.ctypes.data + t * wide * 4, rows.ctypes.data + t * wide * 4
            made, found = (upper.ctypes.data, lower.ctypes.data), (peaks.ctypes.data, facts.ctypes.data)
            last = 4095.0 if keyed else 255.0
            if levels == 2:
                token_both(address, lattice.ctypes.data, wide, last, made[0], made[1], to, deep * wide, found[0], found[1])
            elif eight:
                token_fine(address, lattice.ctypes.data, wide, last, made[0], made[1], to, 0, found[0], found[1])
            else:
                token_coarse(address, lattice.ctypes.data, wide, last, made[0], made[1], to, 0, found[0], found[1])
            radius, length[t] = max(radius, facts[0], facts[1]), facts[4]
            for level in range(levels):
                errors[level] = max(errors[level], facts[2 + level])
                norm = np.float64(round_up(np.sqrt(facts[2 + level])))
                total[level] += norm * norm
            if stepless and without_step(x[t, :channels], origin, inverse):
                wrong = True
            if keyed or eight:
                copy(upper, codes[b, h, first + n, t])
            else:
                nibbles(upper.ctypes.data, half, packed.ctypes.data)
                copy(packed, codes[b, h, first + n, t])
            if levels == 2:
                nibbles(lower.ctypes.data, half, packed.ctypes.data)
                copy(packed, plane[b, h, first + n, t])
        out = numbers[b, h, first + n]
        for level in range(levels):
            norm = round_up(np.sqrt(errors[level]))
            if norm != 0.0 and not SMALLEST < norm < LARGEST:
                wrong = True
                break
            squarings = SQUARINGS[level]
            bound = spectral(rows[level], tokens, channels, norm, squarings, integers, narrowed, sums, turned, one, two)
            if keyed:
                out[3 * level], out[3 * level + 1], out[3 * level + 2] = round_up(peaks[level].max()), norm, bound
            else:
                out[3 * level], out[3 * level + 1] = norm, bound
                out[3 * level + 2] = np.float32(np.sqrt(total[level] / tokens))
        out[3 * levels] = round_up(np.sqrt(radius))
        if not keyed:
            length_codes(length, np.float64(out[3 * levels]), lengths[b, h, first + n])
        left[unit] = wrong


@summing_kernel
def _sign(words: Any, factors: Any, sizes: Any, first: int, checksums: Any, fresh: bool, start: int, stop: int) -> None:
    """What one part adds to the checksums of blocks start..stop-1."""
    heads, blocks = sizes[0], sizes[1]
    for unit in range(start, stop):
        n, h, b = first + unit % blocks, unit // blocks % heads, unit // (blocks * heads)
        row, total = words[b, h, n], np.int64(0)
        for i in range(len(row)):
            total += np.int64(row[i]) * factors[i]
        checksums[b, h, n] = total if fresh else checksums[b, h, n] + total


def _shared(work: list[tuple[Work, int]]) -> None:
    """Call each function for all of its units, a few at a time, on as many threads as get to it: some may be held up."""
    threads.share(
        [partial(function, start, min(start + CHUNK, units)) for function, units in work for start in range(0, units, CHUNK)]
    )


def _writing(x: Tensor, codec: KeyCodec | ValueCodec, parts: dict[str, Tensor], first: int) -> tuple[np.ndarray, Work]:
    """Which blocks `write` leaves out, and what writes some of them."""
    compiling.announce(_write)
    x = x.detach()
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, blocks, tokens, channels = x.shape
    left = np.zeros(batch * heads * blocks, dtype=np.bool_)
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    flat = x.as_strided((span,), (1,))
    bits32 = (flat if x.dtype == torch.float32 else torch.empty(0)).view(torch.int32).numpy()
    bits16 = (flat if x.dtype != torch.float32 else torch.empty(0, dtype=torch.float16)).view(torch.int16).numpy()
    keyed, eight = isinstance(codec, KeyCodec), isinstance(codec, ValueCodec) and codec.bits == 8
    group = codec.group_size(channels) if isinstance(codec, ValueCodec) else 1
    integers = cpu.INTEGERS and micro_integers.supported()
    codes, numbers = parts["codes"].numpy(), parts["numbers"].numpy()
    plane = parts["plane"].numpy() if codec.levels == 2 else np.empty((0, 0, 0, 0, 0), dtype=np.uint8)
    lengths = np.empty((0, 0, 0, 0), np.int16) if keyed else parts["lengths"].numpy()
    scale, offset = (parts[name].view(torch.int16).flatten(3).numpy() for name in ("scale", "offset"))
    sizes = (heads, blocks, tokens, channels)
    given = (bits16, bits32, FORMS[x.dtype], x.stride()[:4], sizes, keyed, eight, group, codec.levels, integers, first)
    return left, partial(_write, *given, codes, plane, scale, offset, numbers, lengths, left)


def _signing(parts: list[Tensor | None], checksums: Tensor, first: int, blocks: int) -> Work:
    """What signs some of the blocks."""
    out = checksums.numpy()
    given = [(words, factors, (out.shape[1], blocks), first, out, fresh) for words, factors, fresh in _words(parts)]

    def work(start: int, stop: int) -> None:
        for part in given:
            _sign(*part, start, stop)

    return work


def write(x: Tensor, codec: KeyCodec | ValueCodec, parts: dict[str, Tensor], first: int) -> Tensor:
    """Encode whole blocks into places from `first` on, but for the few that the codec has to encode.

    Args:
        x: originals `[batch, kv_heads, blocks, block, channels]` on the CPU, of a dtype in `FORMS`.
        parts: contiguous tensors `[batch, kv_heads, places, ...]`, by name, as in `EncodedBlocks`; `plane` where there is one.
    Returns: bool `[batch, kv_heads, blocks]`: the blocks that were left out; what is written in their places means nothing.
    """
    left, work = _writing(x, codec, parts, first)
    _shared([(work, len(left))])
    return torch.from_numpy(left).view(x.shape[:3])


def write_signed(tasks: Sequence[Task], names: Sequence[str]) -> list[Tensor]:
    """`write`, then `sign`, for several tensors at once; the checksums of blocks that are left out mean nothing.

    Args: tasks: arguments of `write`, with a part `checksum`; names: of the parts that are signed, in their order.
    Returns: what `write` returns, for each.
    """
    given: list[tuple[Work, int]] = []
    made = []
    for x, codec, parts, first in tasks:
        left, writing = _writing(x, codec, parts, first)
        signing = _signing([parts.get(name) for name in names], parts["checksum"], first, x.shape[2])

        def work(start: int, stop: int, writing: Work = writing, signing: Work = signing) -> None:
            writing(start, stop)
            signing(start, stop)

        given.append((work, len(left)))
        made.append(torch.from_numpy(left).view(x.shape[:3]))
    _shared(given)
    return made


def _words(parts: list[Tensor | None]) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Of each part that there is: its words `[batch, kv_heads, places, n]`, their multipliers, and whether it is the first."""
    for place, part in enumerate(parts):
        if part is None:
            continue
        raw = part.flatten(3).view(torch.uint8)
        words = raw.view(torch.int32) if raw.shape[-1] % 4 == 0 else raw
        yield words.numpy(), multipliers(place, words.shape[-1], words.device).numpy(), place == 0


def sign(parts: list[Tensor | None], checksums: Tensor, first: int, blocks: int) -> None:
    """The checksums of `blocks` blocks from `first` on, as `block_checksum` takes them.

    Args: parts: contiguous, `[batch, kv_heads, places, ...]`; None where a format has no such part; checksums: written to.
    """
    _shared([(_signing(parts, checksums, first, blocks), checksums.shape[0] * checksums.shape[1] * blocks)])


@summing_kernel
def _sign_some(
    words: Any, factors: Any, rows: Any, heads: Any, blocks: Any, sums: Any, fresh: bool, start: int, stop: int
) -> None:
    """What one part adds to the checksums of single blocks start..stop-1."""
    for i in range(start, stop):
        row, total = words[rows[i], heads[i], blocks[i]], np.int64(0)
        for k in range(len(row)):
            total += np.int64(row[k]) * factors[k]
        sums[i] = total if fresh else sums[i] + total


def signatures(parts: list[Tensor | None], index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The checksums of single blocks as they are now, as `block_checksum` takes them: int64 `[n]`.

    Args: parts: as in `sign`; index: int64 `[n]` each, batch row, KV head and place.
    """
    sums, where = np.empty(len(index[0]), np.int64), [part.numpy() for part in index]
    given = [(words, factors, *where, sums, fresh) for words, factors, fresh in _words(parts)]

    def work(start: int, stop: int) -> None:
        for part in given:
            _sign_some(*part, start, stop)

    threads.run(work, len(sums), SIGNED_AT_LEAST)
    return torch.from_numpy(sums)
