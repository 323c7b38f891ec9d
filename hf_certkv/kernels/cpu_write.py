"""Blocks quantised, measured and checksummed on the CPU: what `codecs` and `checksums` specify, compiled, on several threads.

Why the results are those of the codecs, and the numbers upper bounds as theirs are, is said in `cpu_write_row`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checksums import multipliers
from ..codecs import KeyCodec, ValueCodec
from . import compiling, threads
from .cpu_write_row import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LARGEST,
    SMALLEST,
    TILE,
    exact,
    extremes,
    grid,
    half_bits,
    length_codes,
    load,
    pack,
    quantise,
    raise_to,
    residuals,
    round_up,
    spectral,
    square,
    squares,
    summing,
    without_step,
)

FORMS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_ready = False


@exact
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
    x = np.empty((tokens, channels), dtype=np.float32)
    x_bits = x.view(np.int32)
    low, high = np.empty(count), np.empty(count)
    near, magic = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.float32)
    near_bits, magic_bits = near.view(np.int32), magic.view(np.int32)
    origin, step, divisor, inverse = np.empty(channels), np.empty(channels), np.empty(channels), np.empty(channels)
    place = np.empty(channels, dtype=np.int32)
    read, shares = np.empty(channels), np.empty(channels)
    rows = np.zeros((levels, -(-tokens // TILE) * TILE, channels), dtype=np.float32)
    rank = -(-min(tokens, channels) // TILE) * TILE
    turned = np.zeros((rank, tokens if tokens > channels else 0), dtype=np.float32)
    one, two = np.empty((rank, rank), dtype=np.float32), np.empty((rank, rank), dtype=np.float32)
    length = np.empty(tokens)
    errors, total, peak = np.empty(levels), np.empty(levels), np.empty((levels, channels))
    for unit in range(start, stop):
        n, h, b = unit % blocks, unit // blocks % heads, unit // (blocks * heads)
        base = b * strides[0] + h * strides[1] + n * strides[2]
        finite = True
        for t in range(tokens):
            finite &= load(bits16, bits32, form, base + t * strides[3], x[t], x_bits[t])
        if not finite:
            left[unit] = True
            continue
        if keyed:
            for c in range(channels):
                low[c], high[c] = x[0, c], x[0, c]
            for t in range(1, tokens):
                for c in range(channels):
                    number = np.float64(x[t, c])
                    low[c], high[c] = min(low[c], number), max(high[c], number)
        else:
            for t in range(tokens):
                for g in range(groups):
                    low[t * groups + g], high[t * groups + g] = extremes(x[t, g * group : min((g + 1) * group, channels)])
        grid(low, high, 256.0 if keyed else 16.0, near, near_bits, magic, magic_bits)
        half_bits(low, near, near_bits, offset[b, h, first + n])
        half_bits(high, near, near_bits, scale[b, h, first + n])
        if keyed:
            for c in range(channels):
                origin[c], step[c] = low[c], high[c]
                divisor[c] = high[c] if high[c] > 0.0 else np.inf
                inverse[c] = 1.0 / high[c] if high[c] > 0.0 else 0.0
        radius, wrong = 0.0, False
        errors[:], total[:], peak[:] = 0.0, 0.0, 0.0
        for t in range(tokens):
            if not keyed:
                steps = 0.0
                for g in range(groups):
                    s = high[t * groups + g]
                    steps += s * s
                    over = s if s > 0.0 else np.inf
                    for c in range(g * group, min((g + 1) * group, channels)):
                        origin[c], step[c], divisor[c] = low[t * groups + g], s, over
                inverse[:] = 1.0 / np.sqrt(steps) if steps > 0.0 else 0.0
            quantise(x[t], origin, divisor, 4095.0 if keyed else 255.0, place)
            radius = max(radius, square(x[t]))
            for level in range(levels):
                coarse = level == 0 and not eight
                residuals(x[t], place, coarse, origin, step, inverse, read, shares, rows[level, t])
                error = squares(shares)
                size = squares(read)
                if level == 0:
                    length[t] = size
                radius, errors[level] = max(radius, size), max(errors[level], error)
                if keyed:
                    raise_to(peak[level], shares)
                norm = np.float64(round_up(np.sqrt(error)))
                total[level] += norm * norm
            if without_step(x[t], read, inverse):
                wrong = True
            row = codes[b, h, first + n, t]
            if keyed:
                for c in range(channels):
                    row[c] = place[c] >> 4
            elif eight:
                for c in range(channels):
                    row[c] = place[c]
            else:
                pack(place, 4, row)
            if levels == 2:
                pack(place, 0, plane[b, h, first + n, t])
        out = numbers[b, h, first + n]
        for level in range(levels):
            norm = round_up(np.sqrt(errors[level]))
            if norm != 0.0 and not SMALLEST < norm < LARGEST:
                wrong = True
                break
            bound = spectral(rows[level], tokens, norm, turned, one, two)
            if keyed:
                out[3 * level], out[3 * level + 1], out[3 * level + 2] = round_up(peak[level].max()), norm, bound
            else:
                out[3 * level], out[3 * level + 1] = norm, bound
                out[3 * level + 2] = np.float32(np.sqrt(total[level] / tokens))
        out[3 * levels] = round_up(np.sqrt(radius))
        if not keyed:
            length_codes(length, np.float64(out[3 * levels]), lengths[b, h, first + n])
        left[unit] = wrong


@summing
def _sign(words: Any, factors: Any, sizes: Any, first: int, checksums: Any, fresh: bool, start: int, stop: int) -> None:
    """What one part adds to the checksums of blocks start..stop-1."""
    heads, blocks = sizes[0], sizes[1]
    for unit in range(start, stop):
        n, h, b = first + unit % blocks, unit // blocks % heads, unit // (blocks * heads)
        row, total = words[b, h, n], np.int64(0)
        for i in range(len(row)):
            total += np.int64(row[i]) * factors[i]
        checksums[b, h, n] = total if fresh else checksums[b, h, n] + total


def _compile() -> None:
    """Tell the user, if the first call will take long."""
    global _ready
    if not _ready:
        if not compiling.is_kept(_write):
            compiling.announce()
        _ready = True


def write(x: Tensor, codec: KeyCodec | ValueCodec, parts: dict[str, Tensor], first: int) -> Tensor:
    """Encode whole blocks into places from `first` on, but for the few that the codec has to encode.

    Args:
        x: originals `[batch, kv_heads, blocks, block, channels]` on the CPU, of a dtype in `FORMS`.
        parts: contiguous tensors `[batch, kv_heads, places, ...]`, by name, as in `EncodedBlocks`; `plane` where there is one.
    Returns: bool `[batch, kv_heads, blocks]`: the blocks that were left out; what is written in their places means nothing.
    """
    _compile()
    x = x.detach()
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, blocks, tokens, channels = x.shape
    left = np.zeros(batch * heads * blocks, dtype=np.bool_)
    if x.numel():
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        flat = x.as_strided((span,), (1,))
        bits32 = (flat if x.dtype == torch.float32 else torch.empty(0)).view(torch.int32).numpy()
        bits16 = (flat if x.dtype != torch.float32 else torch.empty(0, dtype=torch.float16)).view(torch.int16).numpy()
        keyed, eight = isinstance(codec, KeyCodec), isinstance(codec, ValueCodec) and codec.bits == 8
        group = codec.group_size(channels) if isinstance(codec, ValueCodec) else 1
        codes, numbers = parts["codes"].numpy(), parts["numbers"].numpy()
        plane = parts["plane"].numpy() if codec.levels == 2 else np.empty((0, 0, 0, 0, 0), dtype=np.uint8)
        lengths = np.empty((0, 0, 0, 0), np.int16) if keyed else parts["lengths"].numpy()
        scale, offset = (parts[name].view(torch.int16).flatten(3).numpy() for name in ("scale", "offset"))
        sizes = (heads, blocks, tokens, channels)
        given = (bits16, bits32, FORMS[x.dtype], x.stride()[:4], sizes, keyed, eight, group, codec.levels, first)
        made = (codes, plane, scale, offset, numbers, lengths, left)
        threads.run(lambda start, stop: _write(*given, *made, start, stop), len(left))
    return torch.from_numpy(left).view(batch, heads, blocks)


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
    batch, heads = checksums.shape[:2]
    out = checksums.numpy()
    for words, factors, fresh in _words(parts):
        given = (words, factors, (heads, blocks), first, out, fresh)
        threads.run(lambda start, stop, given=given: _sign(*given, start, stop), batch * heads * blocks)  # type: ignore[misc]


@summing
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
    for words, factors, fresh in _words(parts):
        given = (words, factors, *where, sums, fresh)
        threads.run(lambda start, stop, given=given: _sign_some(*given, start, stop), len(sums))  # type: ignore[misc]
    return torch.from_numpy(sums)
