"""Audit: the same attention in float64 over the originals, beside every certified call. Its own error counts against us."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import CertificateViolation
from .handle import KEYS, VALUES
from .scrub import every_block, require_intact

if TYPE_CHECKING:
    from .decode import DecodeStep
    from .device_decode import DeviceDecode

FLOAT64_ERROR = 2.0**-52


def exact_output(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in float64.

    Args:
        query: `[batch, kv_heads, rows, channels]`; keys, values: `[batch, kv_heads, tokens, channels]`, originals.
        bias: additive, broadcastable to the scores, -inf masks; sinks: sink logits `[1 | batch, kv_heads, rows]`.
    Returns: float64 `[batch, kv_heads, rows, value channels]`.
    """
    scores = (query.double() @ keys.double().mT) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.double()
    if sinks is None:
        return torch.softmax(scores, dim=-1) @ values.double()
    logit = sinks.double().unsqueeze(-1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, logit], dim=-1), dim=-1)[..., :-1] @ values.double()


def audit_step(step: DecodeStep | DeviceDecode) -> Tensor:
    """True errors of what is about to be returned: float64 `[batch, kv_heads, rows]`.

    Raises: CertificateViolation: an error is above its bound, with everything needed to reproduce it; BlocksRepairedError:
        the step used damaged blocks and has to begin again.
    """
    layer, call = step.layer, step.call
    require_intact(layer, every_block(layer))
    keys, values = layer.materialise(KEYS), layer.materialise(VALUES)
    bias = None
    if step.exact_bias is not None and step.block_bias is not None:
        sink = layer.sink_tokens
        tail = step.exact_bias[..., sink:]
        bias = torch.cat([step.exact_bias[..., :sink], step.block_bias.flatten(-2), tail], dim=-1)
    exact = exact_output(step.query, keys, values, bias, call.scaling, call.softcap, step.sink_logit)
    error = torch.linalg.vector_norm(step.output.double() - exact, dim=-1)
    # What float64 itself may be off by is granted to the bound: the comparison has no other tolerance.
    own = FLOAT64_ERROR * (layer.sequence_length + step.query.shape[-1] + 200) * (1 + 2 * step.slack.new_tensor(1.0))
    size = torch.linalg.vector_norm(values.double(), dim=-1).amax(dim=-1, keepdim=True)
    scores = abs(call.scaling) * step.query_norm * torch.linalg.vector_norm(keys.double(), dim=-1).amax(-1, keepdim=True)
    granted = own * (1 + scores) * size
    finite = torch.isfinite(exact).all(dim=-1)
    # A bound that is not finite promises nothing, and only the naive baseline or a dense output may carry one.
    promised = torch.isfinite(step.bound)
    certified = ~step.dense.unsqueeze(-1).expand_as(promised) & step.config.certified
    broken = finite & torch.where(promised, ~(error - granted <= step.bound), certified)
    if bool(broken.any()):
        row, head, place = (int(part) for part in broken.nonzero()[0])
        bound, true = float(step.bound[row, head, place]), float(error[row, head, place])
        raise CertificateViolation(
            f"Layer {layer.layer_idx}, step {layer.cache.recorder.step}, batch row {row}, KV head {head}, row {place}: true "
            f"error {true:.6g} is above the bound {bound:.6g}. This is a bug in hf_certkv: please report it with `.evidence`.",
            {
                "layer": layer.layer_idx,
                "step": layer.cache.recorder.step,
                "batch_row": row,
                "kv_head": head,
                "row": place,
                "bound": bound,
                "error": true,
                "config": layer.config.to_dict(),
                "query": call.query.detach().clone(),
                "mask": call.mask,
                "scaling": call.scaling,
                "softcap": call.softcap,
                "sinks": call.sinks,
                "keys": keys,
                "values": values,
                "output": step.output.clone(),
                "key_level": step.key_level.clone(),
                "value_level": step.value_level.clone(),
                "dense": step.dense.clone(),
            },
        )
    return torch.where(finite, error, torch.full_like(error, torch.nan))
