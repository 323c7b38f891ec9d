"""Blocks quantised, measured and checksummed on a GPU: what `codecs` and `checksums` specify, in one Triton kernel.

One program encodes one block. Codes, planes, scales and offsets are those of the codecs, bit for bit: everything that makes
them is float64, elementwise and not contracted (`enable_fp_fusion=False`; and z + S * position is exact in float64 anyway, see
`cpu_write_row`). The numbers are measured by the same formulas. They differ in the order of sums; in products with 1/S, where
the codec divides; and in the scaling of rows for the spectral bound, here by a power of two, exactly, before the one rounding
to float32. `SLACK` and the analysis of `spectral_bound` hold for any order and leave room for that. A length may differ by one
where its sum lies that near to a step.

Steps and offsets go to memory first and are read from there: so any size of group, and any piece of a block, is one gather.
Originals come from memory once. Their pieces are read again, from the GPU's caches, for the codes and for each level's spectral
bound: to keep residuals would take more registers than there are.
NaN and infinities need no way of their own: they end in numbers that are NaN or infinite, as they do in the codecs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import codecs
from ..checksums import block_checksum
from ..codecs import KeyCodec, ValueCodec
from .triton_common import power_of_two
from .triton_write_parts import (
    extremes,
    largest,
    piece,
    read_level,
    round_up,
    row_products,
    scale_down,
    sizes,
    spectral,
    token_steps,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TOKENS, MOST_CHANNELS = 128, 512  # of a block
PIECE_CHANNELS = 16  # of each half of the channels, taken at a time
PRODUCTS = 16  # numbers that a product adds at a time: with more the kernel runs out of registers
SIGNED_AT_ONCE = 2**24  # bytes of codes: bounds the int64 scratch of checksums
Task = tuple[Tensor, KeyCodec | ValueCodec, dict[str, Tensor], int]

LOW_BITS: Any = tl.constexpr(codecs.LOW_BITS)
LOW_MASK: Any = tl.constexpr(2**codecs.LOW_BITS - 1)
LENGTHS: Any = tl.constexpr(codecs.LENGTHS)
LENGTH_UNITS: Any = tl.constexpr(codecs.LENGTHS * (1 + 2.0**-30))
PLACES = ("code_places", "plane_places", "scale_places", "offset_places", "number_places", "length_places")
NEVER_THE_SAME = ["blocks", "first", "plane_first", *PLACES]  # arguments that no kernel is compiled for


@triton.jit
def _level(
    numbers, squares, peaks, x, scale, offset, stride_t, stride_c,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, KEYED: tl.constexpr, SIZE: tl.constexpr, ONE_GROUP: tl.constexpr,
    ALL_BITS: tl.constexpr, SQUARINGS: tl.constexpr, GRAM_ROUNDING: tl.constexpr, ROUNDING: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Store a level's three numbers. `squares`: of the tokens' errors, float64 `[T]`; `peaks`: the largest `sizes` of each."""
    RANK: tl.constexpr = min(TOKENS, CHANNELS)
    norm = round_up(tl.sqrt(largest(sizes(squares))))
    power = scale_down(norm)
    gram = row_products(x, scale, offset, power, stride_t, stride_c, TOKENS, CHANNELS, KEYED, SIZE, ONE_GROUP, ALL_BITS, N, K)
    bound = spectral(gram, norm, power, SQUARINGS, TOKENS, RANK, N, K, GRAM_ROUNDING, ROUNDING)
    if KEYED:
        tl.store(numbers, round_up(largest(peaks)))
        tl.store(numbers + 1, norm)
        tl.store(numbers + 2, bound)
    else:
        norms = round_up(tl.sqrt(squares)).to(tl.float64)
        tl.store(numbers, norm)
        tl.store(numbers + 1, bound)
        tl.store(numbers + 2, tl.sqrt(tl.sum(norms * norms, 0) / TOKENS).to(tl.float32))


@triton.jit(do_not_specialize=NEVER_THE_SAME)
def _write(
    x, codes, plane, scale, offset, numbers, lengths,
    blocks, first, plane_first, code_places, plane_places, scale_places, offset_places, number_places, length_places,
    heads, stride_b, stride_h, stride_n, stride_t, stride_c,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, KEYED: tl.constexpr, EIGHT: tl.constexpr, SIZE: tl.constexpr,
    LEVELS: tl.constexpr, SQUARINGS_0: tl.constexpr, SQUARINGS_1: tl.constexpr,
    GRAM_ROUNDING: tl.constexpr, ROUNDING: tl.constexpr,
    T: tl.constexpr, WIDE: tl.constexpr, PIECE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ONE_GROUP: tl.constexpr, ONE_GROUP_GRAM: tl.constexpr,
):  # fmt: skip
    """One block of one batch row and KV head into its place."""
    GROUPS: tl.constexpr = (CHANNELS + SIZE - 1) // SIZE
    HALF: tl.constexpr = (CHANNELS + 1) // 2
    CODE_WIDTH: tl.constexpr = CHANNELS if KEYED or EIGHT else HALF
    STEPS: tl.constexpr = CHANNELS if KEYED else TOKENS * GROUPS
    unit, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    x += unit // heads * stride_b + unit % heads * stride_h + block * stride_n
    codes += (unit * code_places + first + block) * (TOKENS * CODE_WIDTH)
    scale += (unit * scale_places + first + block) * STEPS
    offset += (unit * offset_places + first + block) * STEPS
    numbers += (unit * number_places + first + block) * (3 * LEVELS + 1)
    if LEVELS == 2:
        plane += (unit * plane_places + plane_first + block) * (TOKENS * HALF)
    extremes(x, scale, offset, stride_t, stride_c, TOKENS, CHANNELS, KEYED, SIZE, T, WIDE)
    tl.debug_barrier()  # what other threads stored is read from here on

    t = tl.arange(0, T)
    squares = t.to(tl.float64) * 0.0
    read_0, read_1, error_0, error_1 = squares, squares, squares, squares
    peak_0 = t.to(tl.int64) * 0
    peak_1 = peak_0
    steps = t if KEYED else token_steps(scale, t, TOKENS, CHANNELS, SIZE)
    for begin in range(0, HALF, PIECE):
        packed, packed_low = tl.zeros((T, PIECE), tl.int32), tl.zeros((T, PIECE), tl.int32)
        for upper in tl.static_range(2):
            start = begin + upper * HALF
            c = start + tl.arange(0, PIECE)
            inside = (t < TOKENS)[:, None] & ((c < CHANNELS) & (c < (1 + upper) * HALF))[None, :]
            number, code, origin, step = piece(
                x, scale, offset, t, start, c, inside, stride_t, stride_c, TOKENS, CHANNELS, KEYED, SIZE, ONE_GROUP
            )
            whole = code.to(tl.int32)
            one = step if KEYED else steps[:, None]
            squares += tl.sum(number * number, 1)
            read, error = read_level(number, code, origin, step, one, inside, EIGHT)
            read_0 += tl.sum(read * read, 1)
            error_0 += tl.sum(error * error, 1)
            if KEYED:
                peak_0 = tl.maximum(peak_0, tl.max(sizes(error), 1))
            if LEVELS == 2:
                read, error = read_level(number, code, origin, step, one, inside, True)
                read_1 += tl.sum(read * read, 1)
                error_1 += tl.sum(error * error, 1)
                if KEYED:
                    peak_1 = tl.maximum(peak_1, tl.max(sizes(error), 1))
                packed_low |= (whole & LOW_MASK) << (LOW_BITS * upper)
            if KEYED:
                tl.store(codes + t[:, None] * CODE_WIDTH + c[None, :], (whole >> LOW_BITS).to(tl.uint8), mask=inside)
            elif EIGHT:
                tl.store(codes + t[:, None] * CODE_WIDTH + c[None, :], whole.to(tl.uint8), mask=inside)
            else:
                packed |= (whole >> LOW_BITS) << (LOW_BITS * upper)
        at = begin + tl.arange(0, PIECE)
        place, inside = t[:, None] * HALF + at[None, :], (t < TOKENS)[:, None] & (at < HALF)[None, :]
        if not (KEYED or EIGHT):
            tl.store(codes + place, packed.to(tl.uint8), mask=inside)
        if LEVELS == 2:
            tl.store(plane + place, packed_low.to(tl.uint8), mask=inside)

    most = tl.maximum(tl.maximum(sizes(squares), sizes(read_0)), sizes(read_1))
    radius = round_up(tl.sqrt(largest(most)))
    tl.store(numbers + 3 * LEVELS, radius)
    if not KEYED:
        lengths += (unit * length_places + first + block) * TOKENS
        whole = radius.to(tl.float64) * radius.to(tl.float64)
        share = tl.where(whole > 0.0, read_0 / tl.where(whole > 0.0, whole, 1.0), 0.0)
        length = tl.ceil(share * LENGTH_UNITS)
        length = tl.where(length < LENGTHS, length, LENGTHS)  # NaN is the longest
        tl.store(lengths + t, length.to(tl.int32).to(tl.int16), mask=t < TOKENS)
    _level(
        numbers, error_0, peak_0, x, scale, offset, stride_t, stride_c, TOKENS, CHANNELS, KEYED, SIZE, ONE_GROUP_GRAM,
        EIGHT, SQUARINGS_0, GRAM_ROUNDING, ROUNDING, N, K,
    )  # fmt: skip
    if LEVELS == 2:
        _level(
            numbers + 3, error_1, peak_1, x, scale, offset, stride_t, stride_c, TOKENS, CHANNELS, KEYED, SIZE, ONE_GROUP_GRAM,
            True, SQUARINGS_1, GRAM_ROUNDING, ROUNDING, N, K,
        )  # fmt: skip


def fits(x: Tensor) -> bool:
    """Whether blocks `[..., block, channels]` can be encoded here; any group of values will do."""
    tokens, channels = x.shape[-2:]
    return x.dtype in DTYPES and 1 <= tokens <= MOST_TOKENS and 1 <= channels <= MOST_CHANNELS


def layout(codec: KeyCodec | ValueCodec, tokens: int, channels: int) -> dict[str, Any]:
    """What the kernel is compiled for, but for dtypes: its arguments by name."""
    keyed, half = isinstance(codec, KeyCodec), (channels + 1) // 2
    size = codec.group_size(channels) if isinstance(codec, ValueCodec) else 1
    deep, rank = max(tokens, channels), min(tokens, channels)
    aligned = size % PIECE_CHANNELS == 0 and half % PIECE_CHANNELS == 0
    return {
        "TOKENS": tokens,
        "CHANNELS": channels,
        "KEYED": keyed,
        "EIGHT": isinstance(codec, ValueCodec) and codec.bits == 8,
        "SIZE": size,
        "LEVELS": codec.levels,
        "SQUARINGS_0": codecs.SQUARINGS[0],
        "SQUARINGS_1": codecs.SQUARINGS[1],
        "GRAM_ROUNDING": codecs.gram_rounding(1.0, deep),
        "ROUNDING": codecs.product_rounding(rank),
        "T": max(16, power_of_two(tokens)),
        "WIDE": 32,
        "PIECE": PIECE_CHANNELS,
        "N": max(16, power_of_two(rank)),
        "K": PRODUCTS,
        "ONE_GROUP": size >= channels or aligned,
        "ONE_GROUP_GRAM": size >= channels or (tokens <= channels and size % PRODUCTS == 0),
    }


def warps(tokens: int) -> int:
    """Warps of a program: a larger block needs the registers of more."""
    return 4 if tokens <= 32 else 8


def write(x: Tensor, codec: KeyCodec | ValueCodec, parts: dict[str, Tensor], first: int, plane_first: int) -> None:
    """Encode whole blocks into places from `first` on.

    Args:
        x: originals `[batch, kv_heads, blocks, block, channels]`, of any strides, that `fits`.
        parts: contiguous tensors `[batch, kv_heads, places, ...]` on the same device, by name, as in `EncodedBlocks`; `plane`
            where the format has one, `lengths` for values.
        plane_first: the first place in `plane`.
    """
    x = x.detach().resolve_neg()
    x = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    batch, heads, blocks, tokens, channels = x.shape
    if x.numel() == 0:
        return
    names = ("codes", "plane", "scale", "offset", "numbers", "lengths")
    given = [parts.get(name, parts["codes"]) for name in names]  # what the format has not is not touched
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _write[(batch * heads * blocks,)](
            x, *given, blocks, first, plane_first, *(part.shape[2] for part in given), heads, *x.stride(),
            **layout(codec, tokens, channels), num_warps=warps(tokens), enable_fp_fusion=False,
        )  # fmt: skip


def sign(parts: Sequence[Tensor | None], checksums: Tensor) -> None:
    """The checksums of blocks. Args: parts: `[batch, kv_heads, blocks, ...]`, in their order; checksums: written to."""
    codes = parts[0]
    assert codes is not None, "a block has codes"
    blocks = codes.shape[2]
    step = max(1, SIGNED_AT_ONCE * blocks // max(1, codes.numel()))
    for start in range(0, blocks, step):
        some = [part[:, :, start : start + step] if part is not None else None for part in parts]
        checksums[:, :, start : start + step] = block_checksum(some, 3, checksums.device)


def _elsewhere(plane: Tensor | None, x: Tensor) -> bool:
    """Whether planes are to lie where the kernel cannot write."""
    return plane is not None and plane.device != x.device


def write_signed(tasks: Sequence[Task], names: Sequence[str]) -> list[None]:
    """`write`, then `sign`, for several tensors; planes may be to lie in host memory.

    Args: tasks: arguments of `write`, with a part `checksum`; names: of the parts that are signed, in their order.
    Returns: None for each: no block is left out, and to find out none is waited for.
    """
    for x, codec, data, first in tasks:
        parts, kept = dict(data), data.get("plane")
        plane_first, stop = first, first + x.shape[2]
        if kept is not None and _elsewhere(kept, x):
            parts["plane"] = torch.empty((*kept.shape[:2], x.shape[2], *kept.shape[3:]), dtype=kept.dtype, device=x.device)
            plane_first = 0
        write(x, codec, parts, first, plane_first)
        views = {name: part[:, :, first:stop] for name, part in parts.items()}
        if parts.get("plane") is not kept:
            views["plane"] = parts["plane"]
        sign([views.get(name) for name in names], views["checksum"])
        if kept is not None and kept is not parts["plane"]:
            for place, plane in zip(kept[:, :, first:stop].flatten(0, 1), parts["plane"].flatten(0, 1), strict=True):
                place.copy_(plane, non_blocking=kept.is_pinned())  # one piece each: other copies would be waited for
    return [None] * len(tasks)
