"""The dense rungs: heads or the whole layer on the originals, by the very call that the model made, and their bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import bounds
from .handle import KEYS, VALUES, Handle
from .precision import ambient_is_full

if TYPE_CHECKING:
    from .decode import DecodeStep


def dense_layer(step: DecodeStep) -> Tensor:
    """The whole layer: bit for bit what a dense cache gives. Returns the output in the call's own shape.

    Raises: CorruptedPageError: the originals cannot be trusted.
    """
    call = step.call.original or step.call
    step.whole_layer = True
    step.dense.fill_(True)
    assert isinstance(call.key, Handle) and isinstance(call.value, Handle)
    key, value = call.key.materialise(), call.value.materialise()
    step.bytes_moved += step.unit_bytes() * step.dense.numel()
    output = call.dense(call.query, key, value, call.mask, call.sinks)
    step.output = output.reshape(step.shape)
    return output


def dense_unit(step: DecodeStep, row: int, head: int) -> None:
    """The query heads of one batch row and KV head, into the step's output.

    Raises: CorruptedPageError: the originals cannot be trusted.
    """
    call, layer = step.call, step.layer
    mine = slice(head * step.groups, (head + 1) * step.groups)
    query = call.query[row : row + 1, mine]
    key, value = layer.unit_originals(KEYS, row, head), layer.unit_originals(VALUES, row, head)
    mask = call.mask
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask[row : row + 1] if mask.shape[0] > 1 else mask
        mask = mask[:, mine] if mask.shape[1] > 1 else mask
    sinks = call.sinks
    if sinks is not None:
        per_head = sinks.shape[0] // layer.heads
        sinks = sinks[head * per_head : (head + 1) * per_head]
    key, value = (part.expand(-1, step.groups, -1, -1) for part in (key, value))
    step.bytes_moved += step.unit_bytes()
    step.output[row, head] = call.dense(query, key, value, mask, sinks).reshape(step.rows, -1)


def dense_bound(step: DecodeStep, norm: Tensor) -> Tensor:
    """The rounding bound of section 5 for a dense output of this norm; the order of summation is the backend's, not ours.

    Infinite where the process has asked for less than the tensors' own precision (autocast, TF32): the dense call honours
    that, as a dense cache would, and nothing is proven of it.

    Args: norm: float64 `[batch, kv_heads, rows]`. Returns the same shape.
    """
    dtype, tokens = step.output.dtype, step.layer.sequence_length
    if not ambient_is_full(step.layer.device.type, dtype):
        return torch.full_like(norm, torch.inf)
    rescalings = 2 + tokens // 32
    # Backends scale the query before the product or the score after it: an unscaled product must neither overflow, nor lose
    # to underflow what a large scale makes much of.
    product = step.query_norm * step.key_norm
    lost = abs(step.call.scaling) * bounds.TINY * step.layer.widths[0]
    slack = bounds.weight_slack(3 * step.slack + lost, rescalings)
    rounding = bounds.rounding_error(
        slack,
        step.value_radius,
        tokens,
        rescalings,
        tokens,
        step.shape[3],
        weight_cast=bounds.OUTPUT_ROUNDOFF[dtype][0],
    )
    # A weight relative to the heaviest may fall below what a 16-bit type holds.
    rounding = rounding + tokens * bounds.OUTPUT_ROUNDOFF[dtype][1] * step.value_radius * bounds.OUTWARD
    bound = rounding + bounds.output_rounding(norm, step.shape[3], dtype)
    return torch.where(product < bounds.OVERFLOW, bound, torch.full_like(bound, torch.inf))
