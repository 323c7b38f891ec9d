"""The decode pass over one KV head's blocks and exact tokens, in numba: each code is read once, for all query rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..codecs import LENGTHS
from . import memory, micro
from .compiling import part, swift
from .cpu import ROWS
from .vectors import LANES

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
INFINITY = np.float32(np.inf)


class Task(NamedTuple):
    """What a pass reads and writes. Arrays are contiguous and given by their addresses. U units: batch row and KV head.

    Attributes:
        query, sizes: float32 `[U, rows, channels]`: scaled; its magnitudes over their largest (see `score_weights`).
        key_codes, key_scale, key_offset, value_codes, value_scale, value_offset: as stored, with room for `room` blocks a unit.
        exact_keys, exact_values: of `dtype`, with room for `exact_room` tokens a unit, the first `exact` of which count.
        block_bias `[used, blocks, block]`, exact_bias `[used, exact]`: float32, or 0. From one batch row, KV head or query row
            to the next, `*_strides` numbers.
        maximum: float32 `[U, rows, blocks + 1]`, output `[U, blocks + 1, rows, width]`: as in `reference.Segments`.
        sums: float32 `[U, rows, blocks + 1, 8]`: the four of `reference.Segments.sums`, then those of weights, their squares,
            cubes and fourth powers. squares: float32 `[U, blocks]`, of all numbers of a block's values.
        query_l1, query_l2: float32 `[U, rows, blocks]`, what `score_weights` adds up, not rounded up yet.
        lengths: int16 `[U, room, block]`, as stored; radius: where the first block's radius of values is, `radius_step` bytes
            before the next.
        errors: float32 `[U, rows, blocks]`, slips: float32 `[U, blocks]`: how far scores, and what values add, may be off where
            codes are multiplied as integers (`integers` is 1; else 0), see `cpu_integers`; 0 where not.
        rows: 1, or a multiple of ROWS; those beyond `used` are padding. heads: KV heads of a batch row. groups: value
            scales a token; per_group: vectors of channels that share one. bits: of a value code; group: channels of a
            value scale. step_up: see `token_steps`.
    """

    query: int
    sizes: int
    key_codes: int
    key_scale: int
    key_offset: int
    value_codes: int
    value_scale: int
    value_offset: int
    exact_keys: int
    exact_values: int
    block_bias: int
    exact_bias: int
    block_strides: tuple[int, int, int]
    exact_strides: tuple[int, int, int]
    maximum: int
    sums: int
    squares: int
    output: int
    query_l1: int
    query_l2: int
    lengths: int
    radius: int
    radius_step: int
    errors: int
    slips: int
    integers: int
    rows: int
    used: int
    heads: int
    channels: int
    width: int
    block: int
    blocks: int
    room: int
    exact: int
    exact_room: int
    dtype: int
    bits: int
    groups: int
    group: int
    per_group: int
    softcap: float
    step_up: float


TASK = memory.record(Task)


@part
def blocks(task: Task, unit: int, first: int, last: int) -> None:
    """Blocks first..last-1 of one unit, with codes read as float32."""
    block, channels, width, rows, groups = task.block, task.channels, task.width, task.rows, task.groups
    held = (np.empty(2 * channels, np.float32), np.empty(rows * block, np.float32))
    grid, scores = held[0].ctypes.data, held[1].ctypes.data
    more = (np.empty(2 * block * groups, np.float32), np.empty(2 * block, np.float32))
    scale, offset = more[0].ctypes.data, more[0].ctypes.data + 4 * block * groups
    steps, norms = more[1].ctypes.data, more[1].ctypes.data + 4 * block
    pitch = width if task.bits == 8 else width // 2
    for number in range(first, last):
        here = unit * task.room + number
        key_grid(task, unit, number, grid)
        exactly(task, unit, number)
        query = task.query + 4 * unit * rows * channels
        for token in range(0, block, ROWS):
            key = (here * block + token) * channels
            if rows == 1:
                micro.dots_codes_1(task.key_codes, key, grid, 0, query, 0, channels, scores, token, block)
            else:
                for row in range(0, rows, ROWS):
                    to = row * block + token
                    micro.dots_codes(task.key_codes, key, grid, 0, query, row * channels, channels, scores, to, block)
        biased(task, unit, number, scores, block)
        value_grid(task, here, scale, offset, steps)
        weighed(task, unit, number, scores, steps, block)
        value, to = here * block * pitch, (unit * (task.blocks + 1) + number) * rows * width
        for row in range(0, rows, ROWS):
            codes, per, place = task.value_codes, task.per_group, to + row * width
            # fmt: off
            if task.bits == 8 and rows == 1:
                micro.gather_bytes_1(codes, value, scale, offset, groups, per, scores, 0, block, task.output, to, width)
            elif task.bits == 8:
                micro.gather_bytes(codes, value, scale, offset, groups, per, scores, row * block, block,
                                   task.output, place, width)
            elif rows == 1:
                micro.gather_nibbles_1(codes, value, scale, offset, groups, per, scores, 0, block, task.output, to, width)
            else:
                micro.gather_nibbles(codes, value, scale, offset, groups, per, scores, row * block, block,
                                     task.output, place, width)
            # fmt: on
        stored_norms(task, here, norms)
        moments_of(task, unit, number, scores, norms)
    # numba frees an array behind its last use, which an address is not.
    held[0][0] = held[1][0] = more[0][0] = more[1][0] = 0


@part
def key_grid(task: Task, unit: int, number: int, grid: int) -> None:
    """A block's key scales, then its offsets, as float32; what `score_weights` adds up for the rows."""
    channels, rows, here = task.channels, task.rows, unit * task.room + number
    micro.from_float16(task.key_scale, here * channels * 2, grid, 0, channels)
    micro.from_float16(task.key_offset, here * channels * 2, grid, channels, channels)
    count = rows * task.blocks
    query_l1 = memory.float32s(task.query_l1 + 4 * unit * count, count)
    query_l2 = memory.float32s(task.query_l2 + 4 * unit * count, count)
    sizes = task.sizes + 4 * unit * rows * channels
    for row in range(rows):
        l1, l2 = micro.query_weights(sizes, row * channels, grid, 0, channels)
        query_l1[row * task.blocks + number], query_l2[row * task.blocks + number] = l1, l2


@part
def value_grid(task: Task, here: int, scale: int, offset: int, steps: int) -> None:
    """A block's value scales and offsets as float32 `[block, groups]`, and its tokens' steps."""
    count = task.block * task.groups
    micro.from_float16(task.value_scale, here * count * 2, scale, 0, count)
    micro.from_float16(task.value_offset, here * count * 2, offset, 0, count)
    micro.token_steps(scale, 0, task.groups, task.block, np.float32(task.step_up), steps, 0)


@part
def stored_norms(task: Task, here: int, norms: int) -> None:
    """The squared norms of a block's values, rounded up: `codecs.read_lengths`."""
    radius = np.float64(memory.float32s(task.radius + here * task.radius_step, 1)[0])
    factor = np.float32(radius * radius / LENGTHS * (1 + 2.0**-20))
    micro.lengths(task.lengths, here * task.block * 2, task.block, factor, norms)


@part
def exactly(task: Task, unit: int, number: int) -> None:
    """Nothing is off in a block by more than float32 sums are."""
    for row in range(task.rows):
        memory.float32s(task.errors + 4 * ((unit * task.rows + row) * task.blocks + number), 1)[0] = 0
    memory.float32s(task.slips + 4 * (unit * task.blocks + number), 1)[0] = 0


@part
def biased(task: Task, unit: int, number: int, scores: int, block: int) -> None:
    """Softcap and bias of a block's scores `[rows, block]`, in place."""
    if task.softcap != 0:
        _cap(scores, task.rows * block, task.softcap)
    if task.block_bias != 0:
        first, apart = _bias_of(task.block_strides, task.heads, unit)
        for row in range(task.used):
            bias = task.block_bias + 4 * (first + row * apart + number * block)
            _add(scores + 4 * row * block, bias, block)


@part
def moments_of(task: Task, unit: int, number: int, weights: int, norms: int) -> None:
    """What a block's weights and its values' squared norms add up to: the squares' total, the moments of each row."""
    block, count = task.block, task.rows * (task.blocks + 1)
    sums = memory.float32s(task.sums + 32 * unit * count, 8 * count)
    memory.float32s(task.squares + 4 * unit * task.blocks, task.blocks)[number] = _total(norms, block)
    for row in range(task.rows):
        place = (row * (task.blocks + 1) + number) * 8
        sums[place + 2], sums[place + 3] = micro.moments(weights, row * block, norms, 0, block)


@part
def scores_of(task: Task, unit: int, keys: int, tokens: int, scores: int) -> None:
    """Scores `[rows, tokens]` with float32 keys; tokens: a multiple of ROWS."""
    channels, rows = task.channels, task.rows
    query = task.query + 4 * unit * rows * channels
    for token in range(0, tokens, ROWS):
        if rows == 1:
            micro.dots_exact_1(keys, token * channels, keys, 0, query, 0, channels, scores, token, tokens)
        else:
            for row in range(0, rows, ROWS):
                to = row * tokens + token
                micro.dots_exact(keys, token * channels, keys, 0, query, row * channels, channels, scores, to, tokens)


@part
def segment(task: Task, unit: int, number: int, values: int, tokens: int, scores: int, steps: int, norms: int) -> None:
    """Segment `number` from scores and float32 values, a multiple of 16: maximum, sums, output; the values' squared norms."""
    rows, width = task.rows, task.width
    weighed(task, unit, number, scores, steps, tokens)
    to = (unit * (task.blocks + 1) + number) * rows * width
    for row in range(0, rows, ROWS):
        # fmt: off
        if rows == 1:
            micro.gather_exact_1(values, 0, steps, steps, 0, 1, scores, 0, tokens, task.output, to, width)
        else:
            micro.gather_exact(values, 0, steps, steps, 0, 1, scores, row * tokens, tokens,
                               task.output, to + row * width, width)
        # fmt: on
    for token in range(tokens):
        memory.float32s(norms, tokens)[token] = micro.dot(values, token * width, values, token * width, width)


@part
def _bias_of(strides: tuple[int, int, int], heads: int, unit: int) -> tuple[int, int]:
    """Where a unit's bias begins, and how far its rows are apart."""
    return (unit // heads) * strides[0] + (unit % heads) * strides[1], strides[2]


@part
def _add(numbers: int, more: int, count: int) -> None:
    to, what = memory.float32s(numbers, count), memory.float32s(more, count)
    for i in range(count):
        to[i] += what[i]


@part
def _cap(numbers: int, count: int, softcap: float) -> None:
    scores, cap = memory.float32s(numbers, count), np.float32(softcap)
    for i in range(count):
        scores[i] = np.float32(math.tanh(np.float64(scores[i] / cap))) * cap


@part
def weighed(task: Task, unit: int, number: int, scores: int, steps: int, tokens: int) -> None:
    """Scores `[rows, tokens]` to weights, in place; the maximum and the sums of segment `number`."""
    count = task.rows * (task.blocks + 1)
    maximum = memory.float32s(task.maximum + 4 * unit * count, count)
    for row in range(task.rows):
        place = row * (task.blocks + 1) + number
        most = micro.largest(scores, row * tokens, tokens)
        maximum[place] = most
        base = most if most != -INFINITY else np.float32(0)
        micro.weigh(scores, row * tokens, tokens, base, steps, 0, task.sums, (unit * count + place) * 8)


@swift
def _total(numbers: int, count: int) -> float:
    total = np.float32(0)
    for x in memory.float32s(numbers, count):
        total += x
    return total


@part
def exact_tokens(task: Task, unit: int) -> tuple[float, float]:
    """The exact tokens of one unit, as its last segment. Returns the largest norms of their keys and values, rounded up."""
    tokens, channels, width, rows = task.exact, task.channels, task.width, task.rows
    padded = -(-tokens // LANES) * LANES
    key_array, value_array = np.zeros(padded * channels, np.float32), np.zeros(padded * width, np.float32)
    held = (np.empty(rows * padded, np.float32), np.zeros(padded, np.float32))
    norm_array = np.zeros(padded, np.float32)
    keys, values, norms = key_array.ctypes.data, value_array.ctypes.data, norm_array.ctypes.data
    scores, steps = held[0].ctypes.data, held[1].ctypes.data
    widen(task.exact_keys, unit * task.exact_room * channels, tokens * channels, task.dtype, keys)
    widen(task.exact_values, unit * task.exact_room * width, tokens * width, task.dtype, values)
    scores_of(task, unit, keys, padded, scores)
    if task.softcap != 0:
        _cap(scores, rows * padded, task.softcap)
    for row in range(rows):
        if task.exact_bias != 0 and row < task.used:
            first, apart = _bias_of(task.exact_strides, task.heads, unit)
            _add(scores + 4 * row * padded, task.exact_bias + 4 * (first + row * apart), tokens)
        for token in range(tokens, padded):
            held[0][row * padded + token] = -INFINITY
    segment(task, unit, task.blocks, values, padded, scores, steps, norms)
    key_norm, value_norm = 0.0, 0.0
    for token in range(tokens):
        square = micro.dot(keys, token * channels, keys, token * channels, channels)
        key_norm = _longer(key_norm, square, key_array, token * channels, channels)
        value_norm = _longer(value_norm, norm_array[token], value_array, token * width, width)
    held[0][0] = held[1][0] = 0  # as in `blocks`
    return key_norm, value_norm


@part
def _longer(longest: float, square: float, numbers: np.ndarray, start: int, count: int) -> float:
    """The larger of a norm and that of some numbers whose squares add up to `square` in float32; NaN if one is."""
    exact = np.float64(square)
    if not 1e-30 < square < 1e36:  # what float32 may have flushed or overflown, and NaN
        exact = 0.0
        for i in range(start, start + count):
            exact += np.float64(numbers[i]) * np.float64(numbers[i])
    norm = math.sqrt(exact) * (1 + (count + 8) * 2.0**-23)
    return norm if norm > longest or norm != norm else longest


@part
def widen(source: int, start: int, count: int, dtype: int, numbers: int) -> None:
    """`count` numbers (a multiple of 16) of a type, from number `start` on, as float32."""
    if dtype == FLOAT32:
        micro.from_float32(source, start * 4, numbers, 0, count)
    elif dtype == FLOAT16:
        micro.from_float16(source, start * 2, numbers, 0, count)
    else:
        micro.from_bfloat16(source, start * 2, numbers, 0, count)
