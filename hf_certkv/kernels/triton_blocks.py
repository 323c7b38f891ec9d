"""Single blocks on a GPU, at any level: codes, refinement planes, originals wherever they lie, compared with checksums."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import INFINITY, MIDDLE


@triton.jit
def read_page(
    address, sums, multipliers, trouble, code, unit, block, like, COUNT: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """A page of originals, wherever it lies, as float32 `[TOKENS, WIDE]`: NaN, and `trouble`, where its checksum is another.

    Args: code: what `trouble` then says, 1 for keys and 3 for values, then unit and block; sums: where the page's checksum is;
    multipliers: int64 `[TOKENS * COUNT]`; like: a pointer to the page's type.
    """
    token, channel = tl.arange(0, TOKENS)[:, None], tl.arange(0, WIDE)[None, :]
    inside = tl.broadcast_to(channel < COUNT, (TOKENS, WIDE))
    found = tl.load(address.to(like.dtype) + token * COUNT + channel, mask=inside, other=0.0)
    if BYTES == 2:
        words = found.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    else:
        words = found.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    factors = tl.load(multipliers + token * COUNT + channel, mask=inside, other=0)
    wrong = tl.sum(tl.sum(words * factors, axis=1), axis=0) != tl.load(sums)
    if wrong:
        tl.store(trouble, code)
        tl.store(trouble + 1, unit)
        tl.store(trouble + 2, block)
    return tl.where(wrong, INFINITY - INFINITY, found.to(tl.float32))


@triton.jit
def load_keys(
    codes, plane, scale, offset, slabs, rows_per_slab, units, sums, multipliers, trouble, like, level, unit, block, blocks,
    room, plane_room, CHANNELS: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, PLANE: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """A block's keys at a level, as float32 `[TOKENS, WIDE]`."""
    token, channel = tl.arange(0, TOKENS)[:, None], tl.arange(0, WIDE)[None, :]
    inside = tl.broadcast_to(channel < CHANNELS, (TOKENS, WIDE))
    HALF: tl.constexpr = (CHANNELS + 1) // 2
    if level == 2:
        page = ((block % rows_per_slab) * units + unit).to(tl.int64) * (TOKENS * CHANNELS * BYTES)
        address = tl.load(slabs + block // rows_per_slab) + page
        keys = read_page(
            address, sums + (unit.to(tl.int64) * blocks + block) * 2, multipliers, trouble, 1, unit, block, like,
            CHANNELS, WIDE, TOKENS, BYTES,
        )  # fmt: skip
    else:
        place = unit.to(tl.int64) * room + block
        found = tl.load(codes + (place * TOKENS + token) * CHANNELS + channel, mask=inside, other=0).to(tl.float32)
        fine = tl.zeros_like(found) + MIDDLE
        if PLANE:
            if level == 1:
                packed = (unit.to(tl.int64) * plane_room + block) * TOKENS + token
                byte = tl.load(plane + packed * HALF + channel % HALF, mask=inside, other=0).to(tl.int32)
                fine = tl.where(channel < HALF, byte & 15, byte >> 4).to(tl.float32) * (1 / 16)
        step = tl.load(scale + place * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        start = tl.load(offset + place * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        keys = (found + fine) * step + start
    return keys


@triton.jit
def load_values(
    codes, plane, scale, offset, slabs, rows_per_slab, units, value_offset, sums, multipliers, trouble, like, level, unit,
    block,
    blocks, room, plane_room, WIDTH: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, FOUR: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """A block's values at a level, as float32 `[TOKENS, WIDE]`."""
    token, channel = tl.arange(0, TOKENS)[:, None], tl.arange(0, WIDE)[None, :]
    inside = tl.broadcast_to(channel < WIDTH, (TOKENS, WIDE))
    HALF: tl.constexpr = (WIDTH + 1) // 2
    if level == 2:
        page = ((block % rows_per_slab) * units + unit).to(tl.int64) * (TOKENS * WIDTH * BYTES)
        address = tl.load(slabs + block // rows_per_slab) + value_offset + page
        values = read_page(
            address, sums + (unit.to(tl.int64) * blocks + block) * 2 + 1, multipliers, trouble, 3, unit, block, like,
            WIDTH, WIDE, TOKENS, BYTES,
        )  # fmt: skip
    else:
        place = unit.to(tl.int64) * room + block
        if FOUR:
            byte = tl.load(codes + (place * TOKENS + token) * HALF + channel % HALF, mask=inside, other=0).to(tl.int32)
            found = tl.where(channel < HALF, byte & 15, byte >> 4).to(tl.float32)
            fine = tl.zeros_like(found) + MIDDLE
            if PLANE:
                if level == 1:
                    packed = (unit.to(tl.int64) * plane_room + block) * TOKENS + token
                    byte = tl.load(plane + packed * HALF + channel % HALF, mask=inside, other=0).to(tl.int32)
                    fine = tl.where(channel < HALF, byte & 15, byte >> 4).to(tl.float32) * (1 / 16)
            found += fine
        else:
            byte = tl.load(codes + (place * TOKENS + token) * WIDTH + channel, mask=inside, other=0).to(tl.float32)
            found = byte * (1 / 16)
        at = (place * TOKENS + token) * GROUPS + channel // GROUP
        step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        start = tl.load(offset + at, mask=inside, other=0.0).to(tl.float32)
        values = found * step + start
    return values
