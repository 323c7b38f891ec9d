"""Where attention meets the cache: one call of `scaled_dot_product_attention`, and the `"certkv"` implementation.

A call goes one of three ways: certified (few queries on current handles), exact on the originals (many queries, or anything
the certificate does not cover), or, for plain tensors, untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .compiled import outside_graphs
from .errors import GradientError, InputError
from .handle import KEYS, VALUES, Handle, Lazy
from .layers import CertifiedLayer

IMPLEMENTATION = "certkv"


@dataclass
class AttentionCall:
    """One call of attention, as the model made it.

    Attributes:
        query: `[batch, query_heads, positions, channels]`; key, value: handles or plain tensors.
        mask: bool (True attends) or additive, broadcastable to `[batch, query_heads, positions, tokens]`, or None.
        scaling: the softmax scale; softcap: c of c*tanh(score/c), or None; sinks: sink logits `[query_heads]`, or None.
        as_written: what the model itself computes on the originals, `[batch, query_heads, positions, value channels]`, where it
            writes attention out (written_out.py), or None.
        original: the call without a mask for tokens that the layer holds and does not show, where this one has it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    as_written: Callable[[], Tensor] | None = None
    original: AttentionCall | None = None

    @property
    def scaling(self) -> float:
        """The softmax scale, SDPA's default filled in."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """This call's attention over plain tensors: the dense rung, and every exact call."""
        if self.softcap is None and sinks is None:
            return F.scaled_dot_product_attention(
                query, key, value, mask, self.dropout, self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa
            )
        return eager_attention(query, key, value, mask, self.scaling, self.softcap, sinks)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Dense attention with what SDPA cannot carry, in float32, rounded once to the query's dtype. Shapes as in SDPA."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (part.float().repeat_interleave(groups, dim=1) for part in (key, value))
    scores = (query.float() @ keys.mT) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if sinks is not None:
        logit = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, logit], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
        # A row that may attend to nothing (padding) is 0, as SDPA has it, and not NaN: the next layer would spread it.
        weights = torch.where(scores.amax(dim=-1, keepdim=True) == -torch.inf, 0.0, weights)
    return (weights @ values).to(query.dtype)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with at least one handle among its tensors."""
    return attend(AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))


@outside_graphs
def attend(call: AttentionCall) -> Tensor:
    """Serve one call: certified where it can be, exact where not."""
    handles = [part for part in (call.key, call.value) if isinstance(part, Handle)]
    given = (call.query, call.mask, call.sinks)
    if handles and torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in given):
        with handles[0].layer.cache.step_guard():
            raise GradientError(
                "The query (or a mask, or sink logits) requires a gradient, and attention over a quantised cache cannot be "
                "differentiated through. Run the model under `torch.no_grad()` (as `generate` does), or use a DynamicCache for "
                "training."
            )
    layer = certifiable(call)
    if layer is not None:
        with layer.cache.step_guard():
            return _decode().certified_decode(layer, _over_all(layer, call))
    owner = handles[0].layer.cache if handles else None
    guards = (nullcontext(), nullcontext()) if owner is None else (owner.step_guard(), owner.ranks.together())
    with guards[0], guards[1]:
        query = _exact(call.query)
        assert query is not None
        if handles:
            handles[0].layer.cache.recorder.add_exact(query.shape[0] * query.shape[1] * query.shape[2])
            handles[0].layer.cache.note_exact(1 if is_packed(handles[0].layer, call) else query.shape[2])
        if call.as_written is not None:
            return call.as_written()
        key, value, mask = (_exact(part) for part in (call.key, call.value, call.mask))
        assert key is not None and value is not None
        return call.dense(query, key, value, mask, call.sinks)


@cache
def _decode() -> Any:
    """The module, and not its function, which may be another one by the next call."""
    from . import decode  # which needs AttentionCall: imported when used

    return decode


def _exact(part: Tensor | None) -> Tensor | None:
    return part.materialise() if isinstance(part, Lazy) else part


def certifiable(call: AttentionCall) -> CertifiedLayer | None:
    """The layer whose certificate covers this call, or None where it is to be computed exactly."""
    key, value, query = call.key, call.value, call.query
    if not (isinstance(key, Handle) and isinstance(value, Handle)) or isinstance(query, Lazy):
        return None
    layer = key.layer
    if call.as_written is not None and layer.config.exactly:  # bit for bit what a dense cache gives
        return None
    same = layer is value.layer and (key.kind, value.kind) == (KEYS, VALUES) and key.repeats == value.repeats
    if not same or key.pending or value.pending or not (key.is_current and value.is_current):
        return None
    if (
        query.dim() != 4
        or query.shape[0] != layer.batch
        or query.shape[1] % layer.heads
        or not query.numel()
        or query.dtype != layer.dtype
    ):
        return None
    # Without `enable_gqa`, SDPA takes as many KV heads as query heads, or a single one, which it broadcasts.
    if layer.heads * key.repeats not in (1, query.shape[1]) and not call.enable_gqa:
        return None
    if query.shape[3] != layer.widths[0] or query.device != layer.device or call.dropout or call.is_causal:
        return None
    if call.mask is not None and not _mask_fits(call.mask, query, key.length):
        return None
    positions = 1 if is_packed(layer, call) else query.shape[2]
    return layer if positions <= layer.config.certify_queries else None


def _over_all(layer: CertifiedLayer, call: AttentionCall) -> AttentionCall:
    """The call over all tokens that a layer holds: those that it does not show are masked."""
    if not layer.hidden:
        return call
    mask = call.mask
    if mask is None:
        mask = torch.ones(1, layer.sequence_length - layer.hidden, dtype=torch.bool, device=layer.device)
    old = mask.new_full((*mask.shape[:-1], layer.hidden), False if mask.dtype == torch.bool else -torch.inf)
    return replace(call, mask=torch.cat([old, mask], dim=-1), original=call)


def _mask_fits(mask: Tensor, query: Tensor, tokens: int) -> bool:
    """Whether the mask broadcasts to `[batch, query_heads, positions, tokens]` and has a type that SDPA takes."""
    if mask.dtype not in (torch.bool, query.dtype, torch.float32) or not 2 <= mask.dim() <= 4 or mask.shape[-1] != tokens:
        return False
    full = (*query.shape[:3], tokens)
    return all([size in (1, whole) for size, whole in zip(mask.shape[::-1], full[::-1], strict=False)])


def is_packed(layer: CertifiedLayer, call: AttentionCall) -> bool:
    """Whether transformers laid the query heads of one KV head along the position axis (a single new token, GQA).

    It does so for SDPA only, which knows no sink logits, and for one position: the only new token, or, in layers that share
    keys and values, the last of several. Where heads are grouped, no other query has as many heads as there are KV heads.
    """
    query = call.query
    if call.sinks is not None or call.as_written is not None or query.shape[2] == 1 or query.shape[1] != layer.heads:
        return False
    return layer.new_tokens == 1 or (layer.groups not in (None, 1) and query.shape[2] == layer.groups)


# What a model may pass that attention need not act on: bookkeeping, and what its mask already says.
_HARMLESS = {
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
    "is_causal",
    "layer_idx",
}


def certkv_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The `"certkv"` attention implementation: what SDPA carries, and softcap, sink logits and position bias besides.

    Args: as transformers' attention functions; query `[batch, query_heads, positions, channels]`.
    Returns: `[batch, positions, query_heads, channels]` and None.
    Raises: InputError: a keyword is not None and its meaning is not known here; output weights or dropout are asked for.
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown or kwargs.get("output_attentions"):
        with key.layer.cache.step_guard() if isinstance(key, Handle) else nullcontext():
            raise InputError(
                f"attn_implementation='certkv' was given {unknown or ['output_attentions']}, which it does not know how to "
                "honour. Use attn_implementation='sdpa' or 'eager' for this model: the cache then serves the exact originals."
            )
    if dropout and (softcap is not None or s_aux is not None):
        with key.layer.cache.step_guard() if isinstance(key, Handle) else nullcontext():
            raise InputError(
                f"attn_implementation='certkv' has no dropout ({dropout}) with a softcap or sink logits; use 'eager'."
            )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    positions, tokens = query.shape[2], key.shape[2]
    mask = attention_mask
    if positions > 1 and mask is None and causal and (position_bias is not None or positions != tokens):
        mask = torch.ones(positions, tokens, dtype=torch.bool, device=query.device).tril(tokens - positions)
    if position_bias is not None:
        mask = _with_bias(position_bias, mask)
    call = AttentionCall(
        query,
        key,
        value,
        mask,
        dropout,
        is_causal=positions > 1 and mask is None and bool(causal),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=softcap,
        sinks=s_aux,
    )
    if call.is_causal and (softcap is not None or s_aux is not None):
        call.mask, call.is_causal = torch.ones(positions, tokens, dtype=torch.bool, device=query.device).tril(), False
    return attend(call).transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Additive mask of a position bias `[batch | 1, query_heads, positions, tokens]` and another mask."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def register() -> None:
    """Make `attn_implementation="certkv"` known to transformers. Both registries: without a mask function, masks vanish."""
    AttentionInterface.register(IMPLEMENTATION, certkv_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
