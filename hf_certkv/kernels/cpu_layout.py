"""The record of a step on the CPU: what blocks and scratch decide, and where in it the rest goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import bounds
from ..config import CertKVConfig
from .cpu import DTYPES, LANES, Stored, integral, stored, working_bytes
from .cpu_certify import Claim
from .cpu_pass import Task
from .cpu_step import STEP, Work

if TYPE_CHECKING:
    from .cpu import FusedStep


def _places() -> dict[str, int]:
    """Where each number lies, in numbers of eight bytes; `query` of the task and that of the work have names of their own."""
    found = {}
    for part in ("task", "claim", "work"):
        kind, start = STEP.fields[part][:2]  # type: ignore[index]
        assert kind.names is not None and kind.fields is not None
        for name in kind.names:
            found[f"{name}_given" if (part, name) == ("work", "query") else name] = (start + kind.fields[name][1]) // 8
    return found


AT = _places()


def template(fused: FusedStep, config: CertKVConfig) -> np.ndarray:
    """The record of a step as int64 numbers, without what differs from step to step: that is 0."""
    layer, blocks, units, rows, used = fused.layer, fused.blocks, fused.units, fused.rows, fused.used
    found: Stored | None = layer.memo("cpu kernel", lambda: stored(layer))
    assert found is not None, "asked for by `supports`"
    (channels, width), codec, scratch = layer.widths, layer.value_codec, fused.scratch
    layer.working_bytes = working_bytes(units, used, blocks, channels, width)
    integers, group = int(integral(channels)), codec.group_size(width)

    def floats(name: str, count: int) -> int:
        return scratch(name, count, np.float32)[1]

    def doubles(name: str, count: int) -> int:
        return scratch(name, count, np.float64)[1]

    segments, every = units * rows * (blocks + 1), units * rows
    none = (0, 0, 0)
    task = Task(
        floats("scaled", every * channels),
        floats("sizes", every * channels),
        *found.parts,
        0,
        0,
        0,
        0,
        none,
        none,
        floats("maximum", segments),
        floats("sums", segments * 8),
        floats("squares", units * blocks),
        floats("output", segments * width),
        floats("l1", every * blocks),
        floats("l2", every * blocks),
        found.lengths,
        found.numbers[1] + 4 * (found.counts[1] - 1),
        4 * found.counts[1],
        floats("errors", every * blocks),
        floats("slips", units * blocks),
        integers,
        rows,
        used,
        fused.shape[1],
        channels,
        width,
        layer.block,
        blocks,
        found.room,
        0,
        0,
        DTYPES[layer.dtype],
        codec.bits,
        found.groups,
        group,
        -(-group // LANES),
        0.0,
        1 + (found.groups + 8) * 2.0**-23,
    )
    claim = Claim(
        floats("raw", every * channels),
        floats("top", every),
        *found.numbers,
        *found.counts,
        0,
        0,
        doubles("key_norm", units),
        doubles("value_norm", units),
        doubles("exact_norm", units),
        0,
        units,
        0,
        0,
        0,
        0,
        doubles("figures", 5 * units * used * blocks),
        0.0,
        0.0,
        bounds.step_slip(layer.block, group) if integers else 0.0,
        float(config.rtol),
        float(config.atol),
        *bounds.OUTPUT_ROUNDOFF[layer.dtype],
    )
    work = Work(0, 0, units, 1, scratch("left", units, np.int64)[1], 0, 0)
    record = np.empty(1, STEP)
    record[0] = (task, claim, work)
    return record.view(np.int64)
