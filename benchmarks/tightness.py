"""How far each part of the bound is from the error that it bounds, on real traces, and what is promoted because of it.

The three true parts are those of docs/certificate.md, section 5, in float64: the weights moved by the keys as they were read,
the values as they were read, and everything that float32 and the output's type added.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.audit import decode
from benchmarks.common import make_cache, passages, save, timed
from hf_certkv import CertKVConfig, codecs
from hf_certkv import decode as decode_module
from hf_certkv.decode import DecodeStep
from hf_certkv.embedded import load_embedded, make_haystack
from hf_certkv.handle import KEYS, VALUES
from hf_certkv.kernels import reference
from hf_certkv.report import rung_shares

TOKENS, STEPS = 2048, 8
ROWS = {"prose": 2, "retriever": 3}
TOLERANCES = (0.02, 0.05)
SHAPES = [{"value_bits": bits, "block_size": block} for bits in (4, 8) for block in (16, 32, 64)]
PARTS = ("key", "value", "rounding", "total")


def as_read(step: DecodeStep, kind: int) -> Tensor:
    """Keys or values at the levels at which they were last computed: float64 `[B, H, tokens, channels]`, exact on the grid."""
    layer = step.layer
    store, level = layer.store, (step.value_level if kind == VALUES else step.key_level)
    buffers, originals = (store.values if kind == VALUES else store.keys), layer.materialise(kind).double()
    out, sink = originals.clone(), layer.sink_tokens
    span = slice(sink, sink + step.blocks * layer.block)
    blocks = originals[:, :, span].unflatten(2, (step.blocks, layer.block)).clone()
    levels = (layer.value_codec if kind == VALUES else layer.key_codec).levels
    for at in range(levels):
        codes, scale, offset = (buffers[name].view for name in ("codes", "scale", "offset"))
        low = codecs.unpack_nibbles(buffers["plane"].view, blocks.shape[-1]) if at else None
        if kind == KEYS:
            scale, offset = scale.unsqueeze(-2), offset.unsqueeze(-2)
        else:
            if layer.value_codec.bits == 8:
                codes, low = codes >> codecs.LOW_BITS, codes & 15
            else:
                codes = codecs.unpack_nibbles(codes, blocks.shape[-1])
            size = layer.value_codec.group_size(blocks.shape[-1])
            scale, offset = (part.repeat_interleave(size, -1)[..., : blocks.shape[-1]] for part in (scale, offset))
        read = codecs._decode_exact(codes, low, scale, offset)
        blocks = torch.where((level == at)[..., None, None], read, blocks)
    out[:, :, span] = blocks.flatten(2, 3)
    return out


def true_parts(step: DecodeStep) -> dict[str, Tensor]:
    """L2 norms of the key, value and rounding parts of the error, and of their sum: float64 `[B, H, R]`. No masks."""
    call, query = step.call, step.query.double()
    assert call.mask is None and step.sink_logit is None and call.softcap is None
    keys, values = (step.layer.materialise(kind).double() for kind in (KEYS, VALUES))
    exact = torch.softmax(query @ keys.mT * call.scaling, dim=-1) @ values
    weights = torch.softmax(query @ as_read(step, KEYS).mT * call.scaling, dim=-1)
    middle, read = weights @ values, weights @ as_read(step, VALUES)
    apart = (exact - middle, middle - read, read - step.output.double(), exact - step.output.double())
    return {name: part.norm(dim=-1) for name, part in zip(PARTS, apart, strict=True)}


def bound_parts(step: DecodeStep) -> dict[str, Tensor]:
    """The same of the bound."""
    made = step.certificate
    assert made is not None
    return {"key": made.key_total, "value": made.value_total, "rounding": made.fixed, "total": made.total}


def winners(step: DecodeStep) -> dict[str, Tensor]:
    """Shares `[B, H, R]`: of the value bound that came from the spectral entry, of the key bound likewise (from the blocks'
    sum), of scores' shifts from the L2 entry; and whether the cap was the smaller key bound."""
    made = step.certificate
    assert made is not None
    combined = reference.combine(step.segments, step.sink_logit)
    root, root_step = combined.root_square_mass[..., :-1], combined.root_square_step[..., :-1]
    moment, square_moment = combined.moment[..., :-1].clamp_min(0), combined.square_moment[..., :-1].clamp_min(0)
    shift, shift_l2 = step._shift(0)
    if step.shift1 is not None:
        finer = step.key_level.unsqueeze(2) == 1
        shift, shift_l2 = (torch.where(finer, a, b) for a, b in zip(step.shift1, (shift, shift_l2), strict=True))
    spectral = root * root_step * step._value_number(codecs.VALUE_SPECTRAL)
    spectral = spectral < step.mass * step.step * step._value_number(codecs.ETA)
    l2 = root * square_moment.sqrt() * shift_l2 < step.mass * moment.sqrt() * shift  # to first order
    numbers = step.key_numbers.unsqueeze(2)
    wide = numbers[..., codecs.EPSILON] * step.query_weights[1] < numbers[..., codecs.KAPPA] * step.query_weights[0]

    def of(parts: Tensor, where: Tensor) -> Tensor:
        return (parts * where).sum(-1) / parts.sum(-1).clamp_min(1e-300)

    return {
        "value_spectral": of(made.value_parts, spectral),
        "key_spectral": of(made.key_parts, l2),
        "shift_l2": of(made.key_parts, wide),
        "cap": (made.key_total < made.key_parts.sum(-1)).double(),
    }


@contextmanager
def observed(found: list[dict[str, Tensor]]) -> Iterator[None]:
    """Within this, every audited call that has a certificate adds its parts, for the heads that are not dense."""
    original = decode_module.audit_step

    def audit_step(step: DecodeStep) -> Tensor:
        if step.certificate is not None and not step.whole_layer:
            kept = ~step.dense.unsqueeze(-1).expand_as(step.bound)
            parts = {f"true_{name}": part for name, part in true_parts(step).items()}
            parts |= {f"bound_{name}": part for name, part in bound_parts(step).items()}
            parts |= winners(step) | {"norm": step.norm}
            found.append({name: part[kept] for name, part in parts.items()})
        return original(step)

    decode_module.audit_step = audit_step  # type: ignore[assignment]
    try:
        yield
    finally:
        decode_module.audit_step = original


def medians(found: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Medians over head-steps: bound / error of each part, bounds and errors over the output's norm, entries' mean shares."""
    if not found or sum(len(part["norm"]) for part in found) == 0:
        return {"certified": 0}
    parts = {name: torch.cat([one[name] for one in found]).numpy() for name in found[0]}
    out: dict[str, Any] = {"certified": len(parts["norm"]), "ratio": {}, "bound": {}, "error": {}}
    for name in PARTS:
        bound, true = parts[f"bound_{name}"], parts[f"true_{name}"]
        there = (bound > 0) & (true > 0)  # a part that is exactly 0 (all promoted) has no ratio
        out["ratio"][name] = float(np.median(bound[there] / true[there])) if there.any() else None
        out["bound"][name] = float(np.median(bound / parts["norm"]))
        out["error"][name] = float(np.median(true / parts["norm"]))
    out["winner"] = {name: float(parts[name].mean()) for name in ("value_spectral", "key_spectral", "shift_l2", "cap")}
    return out


@torch.inference_mode()
def run(model: Any, prompts: Tensor, following: Tensor, settings: CertKVConfig) -> dict[str, Any]:
    """One format and tolerance over one batch."""
    found: list[dict[str, Tensor]] = []
    out: dict[str, Any] = {}
    cache = make_cache(model.config, settings)
    with timed(out), observed(found):
        decode(model, cache, prompts, following)
    cache.recorder.commit()
    overall = cache.recorder.overall()
    out["rung_share"] = rung_shares(overall)
    out["host_bytes_per_token"] = overall.bytes_moved / following.numel()
    return {**out, **medians(found)}


def measure(text: Path) -> None:
    """All formats on both embedded models: with nothing promoted ("naive"), and at two tolerances by where the planes are."""
    result: dict[str, Any] = {"tokens": TOKENS, "steps": STEPS, "runs": []}
    prose, tokenizer = load_embedded("prose")
    rows = passages(tokenizer, text, ROWS["prose"], TOKENS + STEPS)
    retriever, _ = load_embedded("retriever")
    hay = [make_haystack(None, TOKENS, STEPS, seed) for seed in range(ROWS["retriever"])]
    keys = torch.tensor([[needle.key_id for needle in one.needles] for one in hay])
    traces = {
        "prose": (prose, rows[:, :TOKENS], rows[:, TOKENS:]),
        "retriever": (retriever, torch.cat([one.input_ids for one in hay]), keys),
    }
    for name, (model, prompts, following) in traces.items():
        for shape in SHAPES:
            plans: list[tuple[str, float | None, str]] = [("naive", None, "off")]
            plans += [("budget", rtol, refine) for rtol in TOLERANCES for refine in ("device", "host", "off")]
            for policy, rtol, refine in plans:
                common: dict[str, Any] = {**shape, "refine": refine, "audit": True}
                settings = CertKVConfig.naive(**common) if rtol is None else CertKVConfig(rtol=rtol, **common)
                line = {"model": name, "policy": policy, "rtol": rtol, "refine": refine, **shape}
                result["runs"].append({**line, **run(model, prompts, following, settings)})
                save("tightness", result)
