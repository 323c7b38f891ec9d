"""From a finished step to its record: who was served how, and what was promoted."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .certificate import StepRecord
from .ladder import Rung

if TYPE_CHECKING:
    from .decode import DecodeStep

FAST, KEYS, VALUES, DENSE_HEAD, DENSE_LAYER, UNCERTIFIED = (int(rung) for rung in Rung)  # numpy is slow with enums


def step_record(step: DecodeStep, error: Tensor) -> StepRecord:
    """The record of a step whose outputs and bounds are final. Shares no memory with the step.

    Args: error: float64 `[batch, kv_heads, rows]`, NaN where it was not audited.
    """
    figures = torch.stack((step.candidate, step.bound, step.expected, step.norm, error))
    read = _from_host if figures.device.type == "cpu" else _from_device
    values, key_blocks, value_blocks, met, dense = read(step, figures)
    rung = np.zeros(met.shape, dtype=np.int64)  # FAST
    if not step.config.certified:
        rung.fill(UNCERTIFIED)
    for blocks, raised in ((key_blocks, KEYS), (value_blocks, VALUES)):
        if np.count_nonzero(blocks):
            rung[blocks > 0] = raised
    # A head that met its tolerance at once counts as fast, although it uses what was raised for others of its group.
    rung[met] = FAST
    if np.count_nonzero(dense):
        rung[dense] = DENSE_LAYER if step.whole_layer else DENSE_HEAD
    # Rows are the query heads of a KV head and their positions, in this order: so all heads follow one another as they lie.
    positions = 1 if step.packed else step.call.query.shape[2]
    by_head = (met.shape[0], met.shape[1] * met.shape[2] // positions, positions)
    candidate, bound, expected, norm, true = values.reshape(5, *by_head)
    layer = step.layer
    return StepRecord(
        layer.cache.recorder.step,
        layer.layer_idx,
        rung.reshape(by_head),
        candidate,
        bound,
        expected,
        norm,
        true,
        key_blocks,
        value_blocks,
        step.bytes_moved,
        step.kernel,
    )


def settled_record(step: DecodeStep) -> StepRecord:
    """`step_record` of a step whose every row met its tolerance in the CPU kernel's first pass, and was not audited."""
    fused = step.fused
    assert fused is not None
    batch, heads, rows, _ = step.shape
    positions = 1 if step.packed else step.call.query.shape[2]
    by_head = (batch, heads * rows // positions, positions)
    bound, norm, expected = fused.row_figures[:3].copy().reshape(3, *by_head)
    return StepRecord(
        step.layer.cache.recorder.step,
        step.layer.layer_idx,
        _constant(by_head, FAST),
        bound,
        bound.copy(),
        expected,
        norm,
        _constant(by_head, np.nan),
        _constant((batch, heads), 0),
        _constant((batch, heads), 0),
        0,
        step.kernel,
    )


@lru_cache(maxsize=64)
def _constant(shape: tuple[int, ...], value: float) -> np.ndarray:
    """The same number everywhere, for all who ask: not to be written to."""
    array = np.full(shape, value)
    array.flags.writeable = False
    return array


def _from_host(step: DecodeStep, figures: Tensor) -> list[np.ndarray]:
    """The figures, how many blocks of keys and of values each KV head raised, who met the tolerance at once, who is dense."""
    hot = step.hot_level.numpy()
    blocks = []
    for level in (step.key_level, step.value_level):
        raised = level.numpy() > hot
        if np.count_nonzero(raised):
            blocks.append(raised.sum(axis=-1))
        else:  # as a rule: a step is served by the fast path
            blocks.append(np.zeros(raised.shape[:2], dtype=np.int64))
    return [figures.numpy(), *blocks, step.met_at_once.numpy(), step.dense.numpy()]


def _from_device(step: DecodeStep, figures: Tensor) -> list[np.ndarray]:
    """As `_from_host`, in one transfer, through float64, which holds such counts exactly."""
    blocks = [(level > step.hot_level).sum(dim=-1) for level in (step.key_level, step.value_level)]
    parts = [figures, *blocks, step.met_at_once, step.dense]
    fetched = torch.cat([part.double().flatten() for part in parts]).cpu().split([part.numel() for part in parts])
    return [flat.view(part.shape).to(part.dtype).numpy() for flat, part in zip(fetched, parts, strict=True)]
