"""Single blocks at better levels, in numba: read from codes and refinement planes, and put into a pass's sums anew."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..codecs import LOW_BITS, MIDDLE
from . import cpu_pass, memory, micro, micro_combine
from .compiling import kernel, part
from .cpu_pass import TASK
from .vectors import LANES

FINE = 2.0**-LOW_BITS
_task = memory.reader(TASK)


class Coded(NamedTuple):
    """Where the codes of keys or of values lie, by addresses; `plane` is 0 where there is none. Rooms: blocks a unit.

    Attributes: group: channels that share a scale of a token, 0 for keys, whose scales are a block's; bits: of a code.
    """

    codes: int
    plane: int
    scale: int
    offset: int
    room: int
    plane_room: int
    tokens: int
    channels: int
    groups: int
    group: int
    bits: int


@kernel(error_model="numpy")
def read(coded: Coded, units: int, numbers: int, levels: int, count: int, out: int, start: int, stop: int) -> None:
    """Blocks start..stop-1 of `count` as float32 `[count, tokens, channels]`, those at level 0 or 1; others are left alone.

    Args: units, numbers, levels: addresses of int64 `[count]`: KV head of all batch rows, block, level.
    """
    tokens, channels = coded.tokens, coded.channels
    unit, number, level = memory.int64s(units, count), memory.int64s(numbers, count), memory.int64s(levels, count)
    scales = tokens * coded.groups if coded.group else channels
    padded = -(-scales // LANES) * LANES
    grid = np.empty(2 * padded, np.float32)
    half = (channels + 1) // 2
    pitch = half if coded.bits == 4 else channels
    for i in range(start, stop):
        if level[i] > 1:
            continue
        here = unit[i] * coded.room + number[i]
        _scales(coded.scale, here * scales, scales, grid, 0)
        _scales(coded.offset, here * scales, scales, grid, padded)
        codes = coded.codes + here * tokens * pitch
        plane = coded.plane + (unit[i] * coded.plane_room + number[i]) * tokens * half
        first = i * tokens * channels
        _codes(coded, codes, tokens, out, first, level[i])
        if level[i] == 1:
            _nibbles(plane, tokens, channels, FINE, 0.0, out, first, False)
        for t in range(tokens):
            row, scale = first + t * channels, t * coded.groups
            if coded.group == 0:
                micro_combine.onto_grid(out, row, channels, grid.ctypes.data, 0, padded, False)
            elif coded.groups == 1:
                micro_combine.onto_grid(out, row, channels, grid.ctypes.data, scale, padded + scale, True)
            else:
                for g in range(coded.groups):
                    count_of = min(coded.group, channels - g * coded.group)
                    at = row + g * coded.group
                    micro_combine.onto_grid(out, at, count_of, grid.ctypes.data, scale + g, padded + scale + g, True)
    grid[0] = 0  # numba frees an array behind its last use, which an address is not


@part
def _codes(coded: Coded, codes: int, tokens: int, out: int, first: int, level: int) -> None:
    """Where on the grid a block's codes lie."""
    channels = coded.channels
    # A value's byte of 8 bits has both nibbles; other codes are read at the middle of their cell until the plane is added.
    middle = MIDDLE if level == 0 else 0.0
    if coded.bits == 4:
        _nibbles(codes, tokens, channels, 1.0, middle, out, first, True)
    else:
        factor = FINE if coded.group != 0 else 1.0
        plus = 0.0 if coded.group != 0 else middle
        micro_combine.spread(codes, 0, tokens * channels, 0, 255, np.float32(factor), np.float32(plus), out, first, True)


@part
def _nibbles(source: int, tokens: int, channels: int, factor: float, plus: float, out: int, first: int, fresh: bool) -> None:
    """Add packed nibbles, times a factor, to numbers `[tokens, channels]`, or put them there."""
    half = channels // 2
    for t in range(tokens):
        row, at = first + t * channels, t * half
        micro_combine.spread(source, at, half, 0, 15, np.float32(factor), np.float32(plus), out, row, fresh)
        micro_combine.spread(source, at, half, LOW_BITS, 15, np.float32(factor), np.float32(plus), out, row + half, fresh)


@part
def _scales(source: int, start: int, count: int, grid: np.ndarray, to: int) -> None:
    """`count` float16 numbers as float32; vectors of sixteen, and the rest by way of a vector of its own."""
    whole = count // LANES * LANES
    micro.from_float16(source, start * 2, grid.ctypes.data, to, whole)
    if whole < count:
        bits, last = np.zeros(LANES, np.uint16), np.empty(LANES, np.float32)
        halves = memory.uint16s(source + 2 * (start + whole), count - whole)
        for k in range(count - whole):
            bits[k] = halves[k]
        micro.from_float16(bits.ctypes.data, 0, last.ctypes.data, 0, LANES)
        for k in range(count - whole):
            grid[to + whole + k] = last[k]
        bits[0] = 0  # numba frees an array behind its last use, which an address is not


@kernel(error_model="numpy")
def redo(task_at: int, units: int, numbers: int, count: int, keys: int, values: int, start: int, stop: int) -> None:
    """Put blocks start..stop-1 of `count` into a pass's sums, in place of what they were.

    Args: task_at: address of a `Task`; units, numbers: int64 `[count]`; keys, values: float32 `[count, tokens, channels]`.
    """
    task = _task(task_at)
    block, channels, width, groups = task.block, task.channels, task.width, task.groups
    unit, number = memory.int64s(units, count), memory.int64s(numbers, count)
    held = (np.empty(task.rows * block, np.float32), np.empty(block, np.float32))
    steps = np.empty(block, np.float32)
    scale = np.empty(block * groups, np.float32)
    for i in range(start, stop):
        here = unit[i] * task.room + number[i]
        micro.from_float16(task.value_scale, here * block * groups * 2, scale.ctypes.data, 0, block * groups)
        micro.token_steps(scale.ctypes.data, 0, groups, block, np.float32(task.step_up), steps.ctypes.data, 0)
        at = 4 * i * block
        cpu_pass.scores_of(task, unit[i], keys + at * channels, block, held[0].ctypes.data)
        cpu_pass.biased(task, unit[i], number[i], held[0].ctypes.data, block)
        scores, norms = held[0].ctypes.data, held[1].ctypes.data
        cpu_pass.segment(task, unit[i], number[i], values + at * width, block, scores, steps.ctypes.data, norms)
        cpu_pass.moments_of(task, unit[i], number[i], scores, norms)
        cpu_pass.exactly(task, unit[i], number[i])
    held[0][0] = held[1][0] = steps[0] = scale[0] = 0  # as above
