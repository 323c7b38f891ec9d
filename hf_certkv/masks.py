"""From a model's attention mask to the bias that the decode pass adds to scores. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 800.0  # a score this far below another one weighs less than 1e-300 of it


def row_bias(
    mask: Tensor | None, batch: int, heads: int, groups: int, positions: int, span: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The mask as an additive float32 bias, rows as in decode.py, and the largest magnitude that it adds.

    A token whose bias is so far below the row's largest that no score can make up for it (a mask of -1e9, or of the dtype's
    minimum) is masked: its exact weight is below 1e-300. Without that, rounding at such magnitudes would enter the bound.

    Args:
        mask: bool (True attends) or additive, broadcastable to `[batch, heads * groups, positions, tokens]`, or None.
        span: the most by which two scores can differ before the bias (a scalar tensor).
    Returns: float32 `[batch | 1, heads | 1, rows | 1, tokens]` or None, and a float64 scalar tensor.
    """
    if mask is None:
        return None, torch.zeros_like(span)
    mask = mask.detach()
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=torch.float32, device=mask.device)
        bias, size = torch.where(mask, zero, -torch.inf), torch.zeros_like(span)
    else:
        bias = mask.float()
        lowest = bias.amax(dim=-1, keepdim=True).double() - span - NEGLIGIBLE
        bias = torch.where(bias.double() < lowest, -torch.inf, bias)
        size = torch.where(bias == -torch.inf, 0.0, bias).abs().amax().double()
    tokens = bias.shape[-1]
    if bias.shape[1] > 1:  # one mask a query head
        bias = bias.expand(-1, -1, positions, -1).reshape(bias.shape[0], heads, groups * positions, tokens)
    elif bias.shape[2] > 1:  # one mask a position, for all heads
        rows = bias.unsqueeze(2).expand(-1, -1, groups, -1, -1)
        bias = rows.reshape(bias.shape[0], 1, groups * positions, tokens)
    return bias, size


def split_bias(bias: Tensor | None, sink: int, blocks: int, block: int) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the quantised blocks `[..., blocks, block]`, and of the exact tokens (sink, then tail)."""
    if bias is None:
        return None, None
    middle = sink + blocks * block
    exact = torch.cat([bias[..., :sink], bias[..., middle:]], dim=-1)
    return bias[..., sink:middle].unflatten(-1, (blocks, block)), exact
