"""From a finished step to its record: who was served how, and what was promoted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .certificate import StepRecord
from .ladder import Rung

if TYPE_CHECKING:
    from .decode import DecodeStep


def step_record(step: DecodeStep, error: Tensor) -> StepRecord:
    """The record of a step whose outputs and bounds are final.

    Args: error: float64 `[batch, kv_heads, rows]`, NaN where it was not audited.
    """

    def by_head(rows: Tensor) -> np.ndarray:
        return step.by_position(rows).transpose(1, 2).cpu().numpy()

    shape = step.bound.shape
    keys = (step.key_level > step.hot_level).sum(dim=-1)
    values = (step.value_level > step.hot_level).sum(dim=-1)
    rung = torch.full(shape, Rung.FAST if step.config.certified else Rung.UNCERTIFIED, device=step.bound.device)
    rung = torch.where((keys > 0).unsqueeze(-1), Rung.KEYS, rung)
    rung = torch.where((values > 0).unsqueeze(-1), Rung.VALUES, rung)
    dense = Rung.DENSE_LAYER if step.whole_layer else Rung.DENSE_HEAD
    # A head that met its tolerance at once counts as fast, although it uses what was raised for others of its group.
    rung = torch.where(step.met_at_once, Rung.FAST, rung)
    rung = torch.where(step.dense.unsqueeze(-1), dense, rung)
    return StepRecord(
        step.layer.cache.recorder.step,
        step.layer.layer_idx,
        by_head(rung),
        by_head(step.candidate),
        by_head(step.bound),
        by_head(step.expected),
        by_head(step.norm),
        by_head(error),
        keys.cpu().numpy(),
        values.cpu().numpy(),
        step.bytes_moved,
    )
