"""A differentiable model of the fast path and its certificate in float64: it says where the search should look, no more.

Codes are made by the package's own codecs and are constants of the derivative, so a residual moves with its original; bounds
are the package's own inequalities. Of rounding it has the bound only, and the output's rounding to its dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import bounds
from ..cache import CertifiedQuantizedCache
from ..codecs import KeyCodec, ValueCodec
from ..kernels.reference import RESCALINGS, chain_length
from .cases import Case


@dataclass(frozen=True)
class Layout:
    """Which tokens of a call are quantised, and how: the first `sink` are not, then come `blocks` blocks."""

    sink: int
    blocks: int
    block: int
    key_codec: KeyCodec
    value_codec: ValueCodec

    @classmethod
    def of(cls, cache: CertifiedQuantizedCache) -> Layout:
        """Of the one layer of a filled cache."""
        layer: Any = cache.layers[0]
        return cls(layer.sink_tokens, layer.store.blocks, layer.block, layer.key_codec, layer.value_codec)


@dataclass(frozen=True)
class Modelled:
    """A call on the fast path in float64: error `[kv_heads, rows]`; the certificate; its parts by family."""

    error: Tensor
    certificate: bounds.Certificate
    parts: dict[str, Tensor]

    def log_share(self) -> Tensor:
        """The largest log(error / bound) of any row: a scalar that carries gradients."""
        return (self.error.clamp_min(1e-300).log() - self.certificate.total.clamp_min(1e-300).log()).amax()


def model(case: Case, layout: Layout, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Modelled:
    """The fast path of section 3 and 4 and its certificate, differentiable; codes are constants   [sections 2 to 5].

    Args: case: of one batch row and position; query, keys, values: float64, shaped as the case's; bias: float64
        `[1, 1 | query_heads, 1, tokens]` or None.
    """
    heads, tau = keys.shape[1], query.shape[-1] ** -0.5 if case.scale is None else case.scale
    q, k, v = query[0, :, 0].unflatten(0, (heads, -1)), keys[0], values[0]
    middle = slice(layout.sink, layout.sink + layout.blocks * layout.block)
    blocked_k, blocked_v = (x[:, middle].unflatten(1, (-1, layout.block)) for x in (k, v))
    with torch.no_grad():
        made_k, made_v = layout.key_codec.encode(blocked_k), layout.value_codec.encode(blocked_v)
        read_k = layout.key_codec.decode(made_k.codes, None, made_k.scale, made_k.offset).double()
        read_v = layout.value_codec.decode(made_v.codes, None, made_v.scale, made_v.offset, v.shape[-1]).double()
        step = made_k.scale.double()
    relative = torch.where(step.unsqueeze(-2) > 0, (read_k - blocked_k) / step.unsqueeze(-2).clamp_min(1e-300), 0.0)
    sigma = made_v.scale.double().norm(dim=-1)
    residual = (read_v - blocked_v) / torch.where(sigma > 0, sigma, torch.ones_like(sigma)).unsqueeze(-1)
    all_k, all_v = (
        torch.cat([x[:, : layout.sink], y.flatten(1, 2), x[:, middle.stop :]], dim=1) for x, y in ((k, read_k), (v, read_v))
    )

    def scores(of: Tensor) -> Tensor:
        raw = tau * q @ of.mT
        if case.softcap is not None:
            raw = case.softcap * torch.tanh(raw / case.softcap)
        if bias is not None:
            raw = raw + bias[0, :, 0].expand(query.shape[1], -1).unflatten(0, (heads, -1))
        if case.sinks is None:
            return raw
        return torch.cat([raw, case.sinks.double().view(heads, -1, 1)], dim=-1)

    exact, read = scores(k).softmax(-1)[..., : k.shape[1]], scores(all_k).softmax(-1)
    output = read[..., : k.shape[1]] @ all_v
    by_block = read[..., middle].unflatten(-1, (-1, layout.block))
    mass, square = by_block.sum(-1).clamp_min(1e-300), by_block.square().sum(-1).clamp_min(1e-300)
    root, weighed = square.sqrt(), by_block * sigma.unsqueeze(1)
    away = (read_v.unsqueeze(1) - output[:, :, None, None]).square().sum(-1)
    steps = weighed.sum(-1) / mass, (weighed.square().sum(-1).clamp_min(1e-300) / square).sqrt()
    moments = (by_block * away).sum(-1) / mass, (by_block.square() * away).sum(-1) / square
    l1 = q.abs() @ step.mT
    l2 = (q.square() @ step.square().mT).clamp_min(1e-300).sqrt()
    shift = bounds.score_shift(tau, relative.abs().amax((-1, -2)).unsqueeze(1), l1, _norm(relative).unsqueeze(1), l2)
    eta, spectral = _norm(residual).unsqueeze(1), _spectral(residual).unsqueeze(1)
    radius_k, radius_v = (x.numbers[..., -1].double() for x in (made_k, made_v))
    loose = torch.ones(read.shape[-1], dtype=torch.bool)  # outside the blocks, the sink logit included
    loose[middle] = False
    exact_k, exact_v = k[:, loose[: k.shape[1]]], v[:, loose[: k.shape[1]]]
    size = torch.zeros_like(q[0, 0, 0]) if bias is None else bias.where(bias > -math.inf, 0.0).abs().amax()
    key_norm, value_radius = _radius(radius_k, exact_k), _radius(radius_v, exact_v)
    error = bounds.score_rounding(tau, q.norm(dim=-1), key_norm, q.shape[-1], size, case.softcap)
    slack = bounds.weight_slack(error, RESCALINGS)
    chain = chain_length(layout.block, exact_k.shape[1], layout.blocks + 1)
    rounding = bounds.rounding_error(slack, value_radius, chain, RESCALINGS, k.shape[1], v.shape[-1])
    norm = output.norm(dim=-1)
    output_error = bounds.output_rounding(norm, v.shape[-1], case.query.dtype)
    yes = torch.ones_like(mass, dtype=torch.bool)
    shift_l2 = bounds.score_shift_l2(tau, _spectral(relative).unsqueeze(1), l2)
    # Radii and codes are constants: what they lack of a gradient is far less than what the snap to the dtype changes.
    certificate = bounds.total(
        yes,
        mass,
        root,
        read[..., loose].sum(-1),
        shift,
        shift_l2,
        yes,
        eta,
        spectral,
        *steps,
        *moments,
        radius_v.unsqueeze(1),
        value_radius,
        norm,
        slack,
        rounding,
        output_error,
        chain,
        layout.block + v.shape[-1],
    )
    capped = certificate.key_total < certificate.key_parts.sum(-1) * (1 - 1e-9)
    # The spectral number is capped by the same inequality.
    triangle = (mass * steps[0] * eta).sum(-1) <= (root * steps[1] * spectral).sum(-1) * (1 + 1e-4)
    zero = torch.zeros_like(norm)
    parts = {
        "key sum": certificate.key_total.where(~capped, zero),
        "key cap": certificate.key_total.where(capped, zero),
        "value triangle": certificate.value_total.where(triangle, zero),
        "value spectral": certificate.value_total.where(~triangle, zero),
        "rounding": rounding,
        "output rounding": output_error,
    }
    rounded = output + (output.detach().to(case.query.dtype).double() - output.detach())
    return Modelled((exact @ v - rounded).norm(dim=-1), certificate, parts)


def _radius(stored: Tensor, exact: Tensor) -> Tensor:
    """The largest L2 norm among stored radii `[heads, blocks]` and exact tokens `[heads, tokens, channels]`: `[heads, 1]`."""
    return torch.maximum(stored.amax(-1), exact.square().sum(-1).amax(-1).sqrt() * bounds.OUTWARD).unsqueeze(-1)


def _norm(rows: Tensor) -> Tensor:
    """The largest L2 norm among the rows `[..., rows, channels]`."""
    return rows.square().sum(-1).amax(-1).clamp_min(1e-300).sqrt()


def _spectral(rows: Tensor) -> Tensor:
    """The spectral norm as the package bounds it, scaled so that nothing overflows: `[...]`   [section 2]."""
    scale = _norm(rows).detach()[..., None, None]
    gram = (rows / scale) @ (rows / scale).mT
    fourth = torch.linalg.matrix_norm(gram @ gram @ gram @ gram).clamp_min(1e-300)
    return torch.minimum(fourth.pow(1 / 8) * 1.001, rows.new_tensor(rows.shape[-2] ** 0.5)) * scale[..., 0, 0]


def leaves_of(case: Case) -> dict[str, Tensor]:
    """What is climbed over: float64 query, keys, values and, where it is additive, the mask."""
    named = {"query": case.query, "keys": case.keys, "values": case.values}
    if case.mask is not None and case.mask.dtype != torch.bool:
        named["mask"] = case.mask
    return {name: part.double() for name, part in named.items()}


def modelled(case: Case, layout: Layout, leaves: dict[str, Tensor]) -> Modelled:
    """`model` of leaves; a boolean mask is a constant."""
    bias = leaves.get("mask")
    if bias is None and case.mask is not None:
        bias = torch.where(case.mask, 0.0, -math.inf).double()
    return model(case, layout, leaves["query"], leaves["keys"], leaves["values"], bias)


def snapped(case: Case, leaves: dict[str, Tensor]) -> Case:
    """The case with leaves rounded to its own dtypes, and into their finite range."""
    parts: dict[str, Any] = {}
    for name, leaf in leaves.items():
        dtype = getattr(case, name).dtype
        most = torch.finfo(dtype).max
        parts[name] = torch.where(leaf == -math.inf, leaf, leaf.clamp(-most, most)).to(dtype)
    return replace(case, **parts)
