"""From a finished step to its record: who was served how, and what was promoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .certificate import FIGURES, StepRecord
from .ladder import Rung

if TYPE_CHECKING:
    from .decode import DecodeStep


def step_record(step: DecodeStep, error: Tensor) -> StepRecord:
    """The record of a step whose outputs and bounds are final. Shares no memory with the step.

    Args: error: float64 `[batch, kv_heads, rows]`, NaN where it was not audited.
    """
    key_blocks, value_blocks = ((level > step.hot_level).sum(dim=-1) for level in (step.key_level, step.value_level))
    *figures, keys, values, met, dense = on_host(
        step.candidate, step.bound, step.expected, step.norm, error, key_blocks, value_blocks, step.met_at_once, step.dense
    )
    rung = np.full(met.shape, Rung.FAST if step.config.certified else Rung.UNCERTIFIED, dtype=np.int64)
    rung[keys > 0] = Rung.KEYS
    rung[values > 0] = Rung.VALUES
    # A head that met its tolerance at once counts as fast, although it uses what was raised for others of its group.
    rung[met] = Rung.FAST
    rung[dense] = Rung.DENSE_LAYER if step.whole_layer else Rung.DENSE_HEAD
    # Rows are query heads of a KV head and their positions, in this order: the heads follow one another as they lie.
    by_head = (met.shape[0], -1, 1 if step.packed else step.call.query.shape[2])
    made = {name: part.reshape(by_head) for name, part in zip(FIGURES, np.stack(figures), strict=True)}
    layer = step.layer
    return StepRecord(
        step=layer.cache.recorder.step,
        layer=layer.layer_idx,
        rung=rung.reshape(by_head),
        **made,
        key_blocks=keys,
        value_blocks=values,
        bytes_moved=step.bytes_moved,
    )


def on_host(*parts: Tensor) -> Sequence[np.ndarray]:
    """Small tensors as arrays; from a GPU in one transfer, through float64, which holds all that is counted here exactly."""
    if parts[0].device.type == "cpu":
        return [part.numpy() for part in parts]
    packed = torch.cat([part.double().flatten() for part in parts]).cpu()
    split = packed.split([part.numel() for part in parts])
    return [flat.view(part.shape).to(part.dtype).numpy() for flat, part in zip(split, parts, strict=True)]
