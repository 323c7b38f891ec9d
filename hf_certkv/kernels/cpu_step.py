"""A step on the CPU, in one numba function that several threads call at once: query, pass, certificate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import cpu_certify, cpu_integers, cpu_pass, memory
from .compiling import kernel, part
from .cpu_certify import CLAIM, Claim
from .cpu_pass import TASK, Task

WHOLE, PREPARE, CERTIFY, MERGE = range(4)


class Work(NamedTuple):
    """How the work is divided: items, of which each thread takes the next that nobody has taken.

    Attributes:
        query: address of `[U, used, channels]` in the cache's type.
        what: WHOLE, a step from the beginning; PREPARE, only its query rows; CERTIFY, the certificates of sums or levels that
            have changed; MERGE, only what attention needs of that, to know how long that takes.
        units: KV heads of all batch rows; spans: items that the blocks of each are divided into, with WHOLE. If there are
            several, the query rows are prepared beforehand.
        left: address of int64 `[U]`: spans of each unit that are still to be done.
        taken, done: items taken, and units that are finished.
    """

    query: int
    what: int
    units: int
    spans: int
    left: int
    taken: int
    done: int


WORK = memory.record(Work)
STEP = np.dtype([("task", TASK), ("claim", CLAIM), ("work", WORK)])
CLAIM_AT, WORK_AT = TASK.itemsize, TASK.itemsize + CLAIM.itemsize
TAKEN_AT, DONE_AT = WORK_AT + WORK.fields["taken"][1], WORK_AT + WORK.fields["done"][1]  # type: ignore[index]
_task, _claim, _work = memory.reader(TASK), memory.reader(CLAIM), memory.reader(WORK)


@kernel(error_model="numpy")
def share(step: int) -> None:
    """Take items of the step at an address until none is left; codes as float32."""
    task, claim, work = _task(step), _claim(step + CLAIM_AT), _work(step + WORK_AT)
    item, first, last = _take(task, claim, work, step)
    while item >= 0:
        if first < last:
            cpu_pass.blocks(task, item // work.spans, first, last)
        _end(task, claim, work, item // work.spans, step)
        item, first, last = _take(task, claim, work, step)


@kernel(error_model="numpy")
def share_integers(step: int) -> None:
    """The same, codes as integers. Only to be compiled where the processor can do that (`micro_integers.supported`)."""
    task, claim, work = _task(step), _claim(step + CLAIM_AT), _work(step + WORK_AT)
    item, first, last = _take(task, claim, work, step)
    while item >= 0:
        if first < last:
            cpu_integers.blocks(task, item // work.spans, first, last)
        _end(task, claim, work, item // work.spans, step)
        item, first, last = _take(task, claim, work, step)


@part
def _take(task: Task, claim: Claim, work: Work, step: int) -> tuple[int, int, int]:
    """The next item, after what comes before its blocks, and these: the first, and behind the last. -1: none is left."""
    item = memory.add_shared(step + TAKEN_AT, 1)
    if item >= work.units * work.spans:
        return -1, 0, 0
    if work.what == PREPARE or (work.what == WHOLE and work.spans == 1):
        _prepare(task, claim, work.query, item // work.spans)
    if work.what != WHOLE:
        return item, 0, 0
    span = item % work.spans
    return item, task.blocks * span // work.spans, task.blocks * (span + 1) // work.spans


@part
def _end(task: Task, claim: Claim, work: Work, unit: int, step: int) -> None:
    """What comes behind an item's blocks; behind the last item of a unit, its certificate."""
    if work.what == WHOLE:
        if work.spans > 1 and memory.add_shared(work.left + 8 * unit, -1) > 1:
            return
        key_norm, value_norm = cpu_pass.exact_tokens(task, unit)
        cpu_certify.radii(task, claim, unit, key_norm, value_norm)
    if work.what == MERGE:
        cpu_certify.merge(task, claim, unit)
    elif work.what != PREPARE:
        cpu_certify.certify(task, claim, unit)
    memory.add_shared(step + DONE_AT, 1)


@part
def _prepare(task: Task, claim: Claim, query: int, unit: int) -> None:
    """One unit's query rows: as they are, scaled, and their magnitudes over the largest; padding is 0."""
    channels, scaling, count = task.channels, np.float32(claim.scaling), task.rows * task.channels
    raw = memory.float32s(claim.raw + 4 * unit * count, count)
    scaled, sizes = memory.float32s(task.query + 4 * unit * count, count), memory.float32s(task.sizes + 4 * unit * count, count)
    tops = memory.float32s(claim.top + 4 * unit * task.rows, task.rows)
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
