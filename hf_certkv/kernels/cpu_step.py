"""A share of a step's units, in one numba call: query, pass, certificate."""

from __future__ import annotations

import numpy as np

from . import cpu_certify, cpu_pass, micro
from .compiling import kernel, part
from .cpu_certify import Claim
from .cpu_pass import Task


@kernel(error_model="numpy")
def units(task: Task, claim: Claim, query: int, start: int, stop: int) -> None:
    """Units start..stop-1 from the beginning. Args: query: address of `[U, used, channels]` in the cache's type."""
    for unit in range(start, stop):
        _prepare(task, claim, query, unit)
        cpu_pass.blocks(task, unit)
        key_norm, value_norm = cpu_pass.exact_tokens(task, unit)
        cpu_certify.radii(task, claim, unit, key_norm, value_norm)
        cpu_certify.certify(task, claim, unit)


@kernel(error_model="numpy")
def certify_again(task: Task, claim: Claim, start: int, stop: int) -> None:
    """The certificates of units start..stop-1, whose sums or levels have changed."""
    for unit in range(start, stop):
        cpu_certify.certify(task, claim, unit)


@kernel(error_model="numpy")
def merge_again(task: Task, claim: Claim, start: int, stop: int) -> None:
    """Only what attention needs of `certify_again`, to know how long that takes."""
    for unit in range(start, stop):
        cpu_certify.merge(task, claim, unit)


@part
def _prepare(task: Task, claim: Claim, query: int, unit: int) -> None:
    """One unit's query rows: as they are, scaled, and their magnitudes over the largest; padding is 0."""
    channels, scaling, count = task.channels, np.float32(claim.scaling), task.rows * task.channels
    raw = micro.float32s(claim.raw + 4 * unit * count, count)
    scaled, sizes = micro.float32s(task.query + 4 * unit * count, count), micro.float32s(task.sizes + 4 * unit * count, count)
    tops = micro.float32s(claim.top + 4 * unit * task.rows, task.rows)
    for c in range(task.used * channels, count):
        raw[c] = 0
    cpu_pass.widen(query, unit * task.used * channels, task.used * channels, task.dtype, claim.raw + 4 * unit * count)
    for row in range(task.rows):
        top, start = np.float32(0), row * channels
        for c in range(start, start + channels):
            size = abs(raw[c])
            top = size if size > top or size != size else top
            scaled[c] = raw[c] * scaling
        tops[row] = top
        for c in range(start, start + channels):
            sizes[c] = abs(raw[c]) / top if top > 0 else np.float32(0)
