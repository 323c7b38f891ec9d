"""What `cpu_pass.blocks` does, with codes multiplied as integers: in fewer operations, where the processor has them."""

from __future__ import annotations

import math

import numpy as np

from .. import codecs
from . import cpu_pass, memory
from . import micro as plain
from . import micro_integer_values as values
from . import micro_integers as micro
from .compiling import part
from .cpu import ROWS
from .cpu_pass import Task
from .vectors import LANES

WORDS, FACTS = micro.WORDS, micro.FACTS
NIBBLE, BYTE = 15, 255
MIDDLE = np.float32(codecs.MIDDLE)


@part
def blocks(task: Task, unit: int, first: int, last: int) -> None:
    """Blocks first..last-1 of one unit."""
    block, channels, width, rows, groups = task.block, task.channels, task.width, task.rows, task.groups
    floats = np.empty(
        2 * channels + rows * (block + FACTS) + 4 * block * groups + 2 * block + groups * (1 + ROWS) + LANES * LANES, np.float32
    )
    grid = floats.ctypes.data
    scores = grid + 8 * channels
    facts = scores + 4 * rows * block
    scale = facts + 4 * rows * FACTS
    offset = scale + 4 * block * groups
    steps_of = offset + 4 * block * groups  # by group, then `starts`
    starts = steps_of + 4 * block * groups
    steps = starts + 4 * block * groups
    norms = steps + 4 * block
    units = norms + 4 * block
    constants = units + 4 * groups
    turned = constants + 4 * ROWS * groups
    tile = rows if rows < ROWS else ROWS
    digit_array = np.empty(WORDS // 4 * max(rows * channels, ROWS * groups * block), np.uint8)
    digits = digit_array.ctypes.data
    errors = memory.float32s(task.errors + 4 * unit * rows * task.blocks, rows * task.blocks)
    slips = memory.float32s(task.slips + 4 * unit * task.blocks, task.blocks)
    query = task.query + 4 * unit * rows * channels
    facts_of = memory.float32s(facts, rows * FACTS)
    pitch, ahead = width if task.bits == 8 else width // 2, block * channels
    for number in range(first, last):
        here = unit * task.room + number
        cpu_pass.key_grid(task, unit, number, grid)
        for row in range(rows):
            to = (row // tile * tile * channels // 4 + row % tile) * WORDS
            micro.key_digits(query, row * channels, grid, 0, channels, digits, to, tile * WORDS, facts, row * FACTS)
            errors[row * task.blocks + number] = facts_of[row * FACTS + micro.ERROR]
        for token in range(0, block, LANES):
            key = (here * block + token) * channels
            _fetch(task, here + 1, token)
            if rows == 1:
                micro.dots_integers_1(task.key_codes, key, digits, 0, facts, 0, channels, scores, token, block, turned, ahead)
            else:
                for row in range(0, rows, ROWS):
                    at, to = row * channels // 4 * WORDS, row * block + token
                    # fmt: off
                    micro.dots_integers(task.key_codes, key, digits, at, facts, row * FACTS, channels, scores, to, block,
                                        turned, ahead)
                    # fmt: on
        cpu_pass.biased(task, unit, number, scores, block)
        cpu_pass.value_grid(task, here, scale, offset, steps)
        cpu_pass.weighed(task, unit, number, scores, steps, block)
        slips[number] = _value_units(task, scale, offset, steps_of, starts, units)
        value, to = here * block * pitch, (unit * (task.blocks + 1) + number) * rows * width
        codes, per = task.value_codes, task.per_group
        for row in range(0, rows, ROWS):
            # fmt: off
            if rows == 1:
                values.weight_digits_1(scores, 0, steps_of, starts, groups, block, digits, constants)
                if task.bits == 8:
                    values.gather_bytes_1(codes, value, digits, constants, units, per, block, task.output, to, width)
                else:
                    values.gather_nibbles_1(codes, value, digits, constants, units, per, block, task.output, to, width)
            else:
                values.weight_digits(scores, row * block, steps_of, starts, groups, block, digits, constants)
                place = to + row * width
                if task.bits == 8:
                    values.gather_bytes(codes, value, digits, constants, units, per, block, task.output, place, width)
                else:
                    values.gather_nibbles(codes, value, digits, constants, units, per, block, task.output, place, width)
            # fmt: on
        cpu_pass.stored_norms(task, here, norms)
        cpu_pass.moments_of(task, unit, number, scores, norms)
    floats[0] = digit_array[0] = 0  # numba frees an array behind its last use, which an address is not


@part
def _fetch(task: Task, here: int, token: int) -> None:
    """Have a part of a block's scales and offsets brought near; its codes are while the last are used."""
    block, channels, groups = task.block, task.channels, task.groups
    first = here * block + token
    share = 2 * LANES * channels // block
    for scales in (task.key_scale, task.key_offset):
        plain.fetch(scales, here * 2 * channels + token // LANES * share, share)
    for scales in (task.value_scale, task.value_offset):
        plain.fetch(scales, 2 * first * groups, 2 * LANES * groups)


@part
def _value_units(task: Task, scale: int, offset: int, steps: int, starts: int, units: int) -> float:
    """A block's value grid by group, steps as multiples of `units`. Returns the L2 norm of what that rounds, at most."""
    block, groups = task.block, task.groups
    factor, middle = (np.float32(1.0), MIDDLE) if task.bits == 4 else (np.float32(0.0625), np.float32(0.0))
    values.value_grid(scale, offset, groups, block, factor, middle, steps, starts)
    found, square = memory.float32s(units, groups), 0.0
    for g in range(groups):
        found[g] = values.onto_integers(steps, g * block, block)
        square += np.float64(found[g]) * np.float64(found[g])
    # Each digit sum is off by half a unit, three quarters where a product is rounded by itself, times a code.
    largest = NIBBLE if task.bits == 4 else BYTE
    return np.float32(0.75 * largest * block * math.sqrt(task.group * square) * (1 + 2.0**-20))
