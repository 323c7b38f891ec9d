"""The proof's inequalities one by one, in float64, on what a step computed: a check of the parts and not only of their sum.

Nothing of the library's arithmetic is used: codes are read from the store and decoded here, scores and weights are those of
the case's own tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_certkv import bounds
from hf_certkv.decode import DecodeStep
from hf_certkv.verify.cases import Case, problems, run

EXACT = 1 - 2.0**-40  # norms in float64 are not further off
OWN = 1e-9  # relative: what this evaluation may be off by, scores of up to 1e5 included


def steps_of_the_proof(case: Case) -> list[str]:
    """Run a case; check every certificate that its step evaluated. Returns what does not hold, in words."""
    found: list[str] = []
    held: list[Tensor] = []
    certify, least_mass = DecodeStep.certify, bounds.least_mass

    def watched_mass(*args: Any) -> Tensor:
        held.append(least_mass(*args))
        return held[-1]

    def watched(step: DecodeStep) -> None:
        certify(step)
        found.extend(inequalities(step, case, held[-1]) + measurements(step, case))

    DecodeStep.certify, bounds.least_mass = watched, watched_mass  # type: ignore[method-assign]
    try:
        run(case)
    finally:
        DecodeStep.certify, bounds.least_mass = certify, least_mass  # type: ignore[method-assign]
    return found


def as_read(step: DecodeStep, originals: Tensor, kind: str) -> Tensor:
    """The tokens `[batch, kv_heads, tokens, channels]` at the step's levels, in float64."""
    layer = step.layer
    stored = layer.store.keys if kind == "keys" else layer.store.values
    level = step.key_level if kind == "keys" else step.value_level
    channels = originals.shape[-1]
    high, low = stored["codes"].view.long(), None
    if kind == "values" and layer.config.value_bits == 4:
        high = torch.cat([high % 16, high // 16], dim=-1)[..., :channels]
    elif kind == "values":
        high, low = high // 16, high % 16
    position = high.double() + (7.5 / 16 if low is None else low.double() / 16)
    if bool((level == 1).any()):
        plane = stored["plane"].view.long()
        plane = torch.cat([plane % 16, plane // 16], dim=-1)[..., :channels]
        position = torch.where((level == 1)[..., None, None], high.double() + plane.double() / 16, position)
    scale, offset = stored["scale"].view.double(), stored["offset"].view.double()
    if kind == "keys":
        scale, offset = scale.unsqueeze(-2), offset.unsqueeze(-2)
    else:
        group = min(layer.config.value_scale_channels or channels, channels)
        scale, offset = (part.repeat_interleave(group, dim=-1)[..., :channels] for part in (scale, offset))
    read = offset + scale * position
    first = layer.config.sink_blocks * layer.block
    last = first + step.blocks * layer.block
    out = originals.double().clone()
    blocks = out[:, :, first:last].unflatten(2, (step.blocks, layer.block))
    out[:, :, first:last] = torch.where((level == 2)[..., None, None], blocks, read).flatten(2, 3)
    return out


def measurements(step: DecodeStep, case: Case) -> list[str]:
    """What is stored of residuals at level 0, each against the residuals."""
    first = step.layer.config.sink_blocks * step.layer.block
    blocked = slice(first, first + step.blocks * step.layer.block)
    found = []
    for kind, originals, numbers, level in (
        ("keys", case.keys, step.key_numbers, step.key_level),
        ("values", case.values, step.value_numbers, step.value_level),
    ):
        residual = (as_read(step, originals, kind) - originals.double())[:, :, blocked].unflatten(2, (step.blocks, -1))
        at = level == 0
        if kind == "keys":
            step_size = step.layer.store.keys["scale"].view.double().unsqueeze(-2)
            residual = torch.where(step_size > 0, residual / step_size, 0.0)
            if not bool((residual.abs().amax(dim=(-1, -2)) * EXACT <= numbers[..., 0])[at].all()):
                found.append("kappa is below a residual")
        else:
            step_size = step.layer.store.values["scale"].view.double().norm(dim=-1, keepdim=True)
            residual = torch.where(step_size > 0, residual / step_size, 0.0)
        largest = residual.norm(dim=-1).amax(dim=-1) * EXACT
        if not bool((largest <= numbers[..., 1 if kind == "keys" else 0])[at].all()):
            found.append(f"the largest norm of residuals of {kind} is above what is stored")
        spectral = torch.linalg.matrix_norm(residual, ord=2) * EXACT
        if not bool((spectral <= numbers[..., 2 if kind == "keys" else 1])[at].all()):
            found.append(f"the spectral norm of residuals of {kind} is above what is stored")
    return found


def inequalities(step: DecodeStep, case: Case, held: Tensor) -> list[str]:
    """Score errors, masses, D_min, and the three parts of the bound, each against what it bounds."""
    found: list[str] = []
    certificate = step.certificate
    assert certificate is not None
    keys, values = as_read(step, case.keys, "keys"), as_read(step, case.values, "values")
    first = step.layer.config.sink_blocks * step.layer.block
    blocked = slice(first, first + step.blocks * step.layer.block)
    slack = bounds.mass_slack(step.slack, step.chain)
    for places, problem in problems(case):
        b, head = places[0][0], places[0][1] // step.groups
        query, originals = problem.query.double(), problem.values.double()
        bias = 0.0 if problem.bias is None else problem.bias
        true, read = (
            _capped(problem, (query @ part.mT) * problem.scaling) + bias for part in (problem.keys.double(), keys[b, head])
        )
        sink = torch.full((len(places), 1), -torch.inf, dtype=torch.float64)
        if problem.sinks is not None:
            sink[:, 0] = torch.tensor(problem.sinks, dtype=torch.float64)
        p = torch.softmax(torch.cat([read, sink], dim=-1), dim=-1)[:, :-1]
        a = torch.softmax(torch.cat([true, sink], dim=-1), dim=-1)[:, :-1]
        moved = torch.where(true > -torch.inf, (read - true).abs(), torch.zeros_like(true))
        worst = moved[:, blocked].unflatten(-1, (step.blocks, -1)).amax(dim=-1)
        mass = p[:, blocked].unflatten(-1, (step.blocks, -1)).sum(dim=-1)
        mean, quantised = p @ originals, p @ values[b, head]
        # sum of p * exp(true - read): what the weights add up to after the true score errors
        outside = torch.softmax(torch.cat([read, sink], dim=-1), dim=-1)[:, -1]
        kept = (p * torch.exp(torch.where(true > -torch.inf, true - read, torch.zeros_like(true)))).sum(dim=-1) + outside
        output, told, up = step.output[b, head].double(), step.mass[b, head], slack[b, head].unsqueeze(-1)
        size = OWN * float(originals.norm(dim=-1).amax())
        real = mass > 1e-290
        scores = OWN * (1 + true.nan_to_num(neginf=0.0).abs().amax())
        checks = {
            "a score is further off than Delta": worst <= step.shift[b, head] + scores,
            "a mass is further off than its slack": ~real | ((told <= mass * up * (1 + OWN)) & (told * up * (1 + OWN) >= mass)),
            "D is below D_min": held[b, head] <= kept * (1 + OWN),
            "the key error is above its bound": (a @ originals - mean).norm(dim=-1) <= certificate.key_total[b, head] + size,
            "the value error is above its bound": (quantised - mean).norm(dim=-1) <= certificate.value_total[b, head] + size,
            "rounding is above its bound": (output - quantised).norm(dim=-1) <= certificate.fixed[b, head] + size,
        }
        found += [f"batch row {b}, KV head {head}: {what}" for what, holds in checks.items() if not bool(holds.all())]
    return found


def _capped(problem: Any, scores: Tensor) -> Tensor:
    cap = problem.softcap
    return scores if cap is None else cap * torch.tanh(scores / cap)
