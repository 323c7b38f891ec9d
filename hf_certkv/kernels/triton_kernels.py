"""The stages of triton_certify.py as kernels of their own, over all units."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_certify import bound, merge, mix
from .triton_common import CHANGING


@triton.jit(do_not_specialize=CHANGING)
def mix_kernel(
    maximum, output, tops, mixed, segments, chunks,
    USED: tl.constexpr, WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (units, chunks)."""
    mix(maximum, output, tops, mixed, tl.program_id(0), tl.program_id(1), segments, chunks, USED, WIDTH, WIDE_VALUES, CHUNK)


@triton.jit(do_not_specialize=CHANGING)
def merge_kernel(
    query, maximum, sums, errors, slips, key_numbers, value_numbers, key_level, value_level, exact_norms, tops, mixed, sink,
    middle, result, facts, figures, unit_norms, settings, bias_size, blocks, segments, chunks, key_room, value_room, tokens,
    chain,
    SOFTCAP: tl.constexpr, SUNK: tl.constexpr, USED: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr, KEY_COUNT: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
    FEW: tl.constexpr,
):  # fmt: skip
    """Grid (units, rows)."""
    merge(
        query, maximum, sums, errors, slips, key_numbers, value_numbers, key_level, value_level, exact_norms, tops, mixed, sink,
        middle, result, facts, figures, unit_norms, settings, bias_size, tl.program_id(0), tl.program_id(1), blocks, segments,
        chunks,
        key_room, value_room, tokens, chain, SOFTCAP, SUNK, USED, CHANNELS, WIDE, WIDTH, WIDE_VALUES, KEY_COUNT, COUNT, TILE,
        FEW,
    )  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def bound_kernel(
    maximum, sums, output, l1, l2, slips, squares, key_numbers, value_numbers, key_level, value_level, middle, facts,
    figures, partials, settings, blocks, segments, chunks, key_room, value_room,
    USED: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, WIDE_VALUES: tl.constexpr,
    TOKENS: tl.constexpr, KEY_COUNT: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (units, chunks)."""
    bound(
        maximum, sums, output, l1, l2, slips, squares, key_numbers, value_numbers, key_level, value_level, middle, facts,
        figures, partials, settings, tl.program_id(0), tl.program_id(1), blocks, segments, chunks, key_room, value_room,
        USED, CHANNELS, WIDTH, WIDE_VALUES, TOKENS, KEY_COUNT, COUNT, CHUNK,
    )  # fmt: skip
