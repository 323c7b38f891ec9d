"""What the Triton kernels leave behind, beside float64 sums and the certificate that bounds.py makes of it."""

from __future__ import annotations

import math
from typing import Any

import cpu_twin
import quick_interpreter
import torch
from torch import Tensor

from hf_certkv import bounds
from hf_certkv.attention import AttentionCall
from hf_certkv.codecs import EPSILON, ETA, KAPPA, KEY_SPECTRAL, TINY, VALUE_SPECTRAL
from hf_certkv.inputs import StepInputs
from hf_certkv.kernels import reference, triton_certify
from hf_certkv.kernels.triton_step import DeviceStep
from hf_certkv.verify.cases import Case, fill, new_cache

quick_interpreter.install()


def inputs_of(case: Case) -> StepInputs:
    """A call on a new cache that holds the case's tokens."""
    cache = new_cache(case)
    handles = fill(cache, case)
    (layer,) = cache.certified_layers
    call = AttentionCall(case.query, *handles, case.mask, scale=case.scale, softcap=case.softcap, sinks=case.sinks)
    step = StepInputs(layer, call)
    step.cache = cache  # type: ignore[attr-defined]
    return step


def started(case: Case) -> DeviceStep:
    """The kernels' step over a new cache, run."""
    made = DeviceStep(inputs_of(case))
    made.run()
    return made


def arrays(device: DeviceStep) -> dict[str, Tensor]:
    """The pass's sums as float64, the exact tokens' segments put together into one, as `cpu_twin.arrays` has them."""
    batch, heads, rows, width = device.step.shape
    blocks = device.blocks
    maximum = device.maximum.view(batch, heads, rows, -1).double()
    sums = device.sums.view(batch, heads, rows, -1, 8).double()
    output = device.output.view(batch, heads, -1, rows, width).double()
    top = maximum[..., blocks:].amax(-1)
    base = top.where(top > -math.inf, 0.0)
    factor = torch.exp(maximum[..., blocks:] - base.unsqueeze(-1))
    powers = torch.tensor([1, 2, 1, 2, 1, 2, 3, 4])
    exact = (sums[..., blocks:, :] * factor.unsqueeze(-1) ** powers).sum(-2, keepdim=True)
    mixed = (output[:, :, blocks:] * factor.transpose(2, 3).unsqueeze(-1)).sum(2, keepdim=True)
    return {
        "maximum": torch.cat([maximum[..., :blocks], top.unsqueeze(-1)], -1),
        "sums": torch.cat([sums[..., :blocks, :], exact], -2),
        "output": torch.cat([output[:, :, :blocks], mixed], 2),
        "squares": device.squares.view(batch, heads, 1, blocks).double(),
        "slips": device.slips.view(batch, heads, 1, blocks).double(),
        **{name: getattr(device, name).view(batch, heads, rows, blocks).double() for name in ("l1", "l2", "errors")},
    }


def levels(device: DeviceStep) -> Tensor:
    """Levels of keys, values, and those that blocks began with: int64 `[3, B, H, N]`."""
    return device.levels.view(3, *device.step.shape[:2], device.blocks).long()


def slack_of(device: DeviceStep, made: dict[str, Tensor]) -> Tensor:
    """lambda of the kernels' weights: float64 `[B, H, R]`."""
    step, (keys, values, _) = device.step, levels(device)
    call, width = step.call, step.layer.widths[0]
    raised = step.key_numbers[..., -1].where((keys > 0) | (values > 0), 0.0).amax(-1)
    exact = torch.linalg.vector_norm(step.exact_keys.double(), dim=-1).amax(-1) * bounds.OUTWARD
    coded = (made["errors"].amax(-1), torch.maximum(raised, exact).unsqueeze(-1))
    error = bounds.score_rounding(call.scaling, step.query_norm, step.key_norm, width, step.bias_size, call.softcap, coded)
    return bounds.weight_slack(error, reference.RESCALINGS)


def slips_of(device: DeviceStep, made: dict[str, Tensor]) -> Tensor:
    """How far what a block's values add may be off, in L2: `[B, H, R, N]`."""
    group = device.layer.value_codec.group_size(device.step.shape[3])
    return made["slips"] + bounds.step_slip(device.layer.block, group, lanes=1) * made["sums"][..., :-1, 0]


def numbers_at(numbers: Tensor, level: Tensor, column: int) -> Tensor:
    """A number of blocks at their levels, 0 at the originals: `[B, H, 1, N]`."""
    refined = numbers[..., 3 + column] if numbers.shape[-1] > 4 else numbers[..., column]
    found = torch.where(level == 1, refined, numbers[..., column])
    return found.where(level < 2, 0.0).unsqueeze(2)


def by_bounds(device: DeviceStep) -> tuple[bounds.Certificate, Tensor]:
    """The certificate that bounds.py makes of the pass's sums, and the output before it is rounded: float32 `[B, H, R, W]`."""
    step, layer, call, made = device.step, device.layer, device.step.call, arrays(device)
    key_level, value_level, _ = levels(device)
    sink = torch.full(step.shape[:3], -math.inf).double()
    if step.sink_logit is not None:
        sink = step.sink_logit.expand(step.shape[:3]).double()
    maximum, sums = made["maximum"], made["sums"]
    top = torch.maximum(maximum.amax(-1), sink)
    factor = torch.exp(maximum - top.unsqueeze(-1)).where(maximum > -math.inf, 0.0)
    factor = factor.where(~maximum.isnan(), math.nan)
    lifted = torch.exp(sink - top).where(sink > -math.inf, 0.0)
    normaliser = (factor * sums[..., 4]).sum(-1) + lifted
    factor = factor / normaliser.unsqueeze(-1)
    output = (made["output"] * factor.transpose(2, 3).unsqueeze(-1)).sum(2).float()
    # The kernel's own, which may be the next float32: what it is certified with.
    mine = device.middle.view(step.shape)
    spacing = output.abs() * 2.0**-22 + 1e-37
    assert bool(((mine - output).abs() <= spacing).logical_or(mine.isnan() | output.isnan()).all())
    output = mine
    norm = torch.linalg.vector_norm(output.to(layer.dtype).double(), dim=-1)
    slack, tokens = slack_of(device, made), layer.sequence_length
    rounding = bounds.rounding_error(slack, step.value_radius, device.chain, reference.RESCALINGS, tokens, step.shape[3])
    total, square, cube, fourth = (sums[..., :-1, i] for i in cpu_twin.POWERS)
    over, over_square = total.clamp_min(TINY), square.clamp_min(TINY)
    channels = layer.widths[0]
    up, root, lean = 1 + (channels + 8) * 2.0**-23, channels**0.5, abs(call.scaling)
    lost = step.query_norm.unsqueeze(-1) if lean < TINY else 0.0
    hidden = 2 * TINY * 65504.0 * (2 + lean + lost)
    l1 = made["l1"] * up + channels * hidden
    l2 = (made["l2"].sqrt() + root * 2.0**-60) * up + root * hidden
    kappa, epsilon, spectral = (numbers_at(step.key_numbers, key_level, i) for i in (KAPPA, EPSILON, KEY_SPECTRAL))
    shift = bounds.score_shift(1.0, kappa, l1, epsilon, l2)
    shift_l2 = bounds.score_shift_l2(1.0, spectral, l2)
    size = output.double().square().sum(-1, keepdim=True)
    slips, mass = slips_of(device, made), factor * sums[..., 4]
    inner = torch.einsum("bhnrw,bhrw->bhrn", made["output"][:, :, :-1], output.double()) - 1.01 * size.sqrt() * slips
    inflate = bounds.mass_slack(slack, device.chain)
    slip = (factor[..., :-1] * slips).sum(-1) * inflate * bounds.OUTWARD
    moment = (sums[..., :-1, 2] - 2 * inner + size * total) / over
    terms = layer.block + step.shape[3]

    def certificate(square_moment: Tensor) -> bounds.Certificate:
        return bounds.total(
            maximum[..., :-1] != -math.inf,
            mass[..., :-1],
            factor[..., :-1] * square.sqrt(),
            mass[..., -1] + lifted / normaliser,
            shift,
            shift_l2,
            key_level.unsqueeze(2) < 2,
            numbers_at(step.value_numbers, value_level, ETA),
            numbers_at(step.value_numbers, value_level, VALUE_SPECTRAL),
            sums[..., :-1, 0] / over,
            (sums[..., :-1, 1] / over_square).sqrt(),
            moment,
            square_moment,
            step.value_numbers[..., -1].unsqueeze(2),
            step.value_radius,
            norm,
            slack,
            rounding + slip,
            bounds.output_rounding(norm, step.shape[3], layer.dtype),
            device.chain,
            terms,
        )

    first = certificate(torch.full_like(moment, math.inf))
    reach = step.value_numbers[..., -1].unsqueeze(2) + (norm + first.value_total + first.fixed).unsqueeze(-1)
    powers = (total, square, cube, fourth)
    squared = bounds.square_moment_bound(moment, powers, sums[..., :-1, 3], inner, size, made["squares"], reach, terms)
    return certificate(squared), output


def discrepancies(device: DeviceStep) -> list[str]:
    """What the kernels say, where it is not what float64 and bounds.py make of the step."""
    step, made, found = device.step, arrays(device), list[str]()
    slack, sums = slack_of(device, made).amax() + 1e-30, made["sums"]
    key_level, value_level, _ = levels(device)
    raised = ((key_level > 0) | (value_level > 0)).unsqueeze(2)
    wanted, output = cpu_twin.float64_sums(step, made["maximum"])
    powers = torch.tensor([1, 2, 1, 2, 1, 2, 3, 4]).double()
    room = torch.expm1(2 * powers * slack) + 2 * bounds.gamma(step.layer.block + step.shape[3] + 64)
    off = ((sums - wanted).abs() > room * wanted + 1e-30)[..., :-1, :] & ~raised.unsqueeze(-1)
    found += [f"sum {i} of a block is wrong" for i in range(8) if bool(off[..., i].any())]
    off = ((sums - wanted).abs() > room * wanted + 1e-30)[..., -1, 4:]
    found += ["a sum of the exact tokens is wrong"] if bool(off.any()) else []
    size = cpu_twin.float64_sums(sized(step), made["maximum"])[1]
    slips = torch.cat([slips_of(device, made), torch.zeros(*step.shape[:3], 1)], -1).transpose(2, 3).unsqueeze(-1)
    away = (made["output"] - output).abs() > room[4] * size + 1e-30 + slips
    keep = torch.cat([raised.expand(*step.shape[:3], -1), torch.zeros(*step.shape[:3], 1, dtype=torch.bool)], -1)
    found += ["an output of a segment is wrong"] if bool((away & ~keep.transpose(2, 3).unsqueeze(-1)).any()) else []
    scale = step.encoded[0].scale.double().abs()
    l1 = made["l1"] * (1 + (step.layer.widths[0] + 8) * 2.0**-23) + step.layer.widths[0] * TINY * 2**18
    exact = (step.query.double().abs() @ scale.mT) * abs(step.call.scaling)
    small = (l1 < exact * (1 - 1e-12)) & (key_level < 2).unsqueeze(2)
    found += ["the query's weights are too small"] if bool(small.any()) else []
    certificate, middle = by_bounds(device)
    shown = middle.to(step.layer.dtype)
    served = device.dense.view(*step.shape[:2], 1, 1) > 0  # by the dense rung, in place of this
    if not bool(((shown == device.result) | (shown.isnan() & device.result.isnan()) | served).all()):
        found.append("the output is another one")
    facts = {"total": "BOUND", "fixed": "FIXED", "key_total": "KEY_TOTAL", "value_total": "VALUE_TOTAL"}
    parts: dict[str, Tensor] = {name: device.row_figure(getattr(triton_certify, fact)) for name, fact in facts.items()}
    parts["key_parts"] = device.block_figure(2) * device.row_figure(triton_certify.OVER).unsqueeze(-1) * bounds.OUTWARD
    parts["value_parts"] = device.block_figure(3)
    for name, x in parts.items():
        y = getattr(certificate, name)
        same = (x == y) | ~(x.isfinite() | y.isfinite())  # infinity and NaN are never within a budget
        near = same | ((x >= y * (1 - 1e-8)) & (x <= y * (1 + 1e-8)))
        if name == "key_parts":
            near |= ~certificate.total.isfinite().unsqueeze(-1)
        if not bool(near.all()):
            found.append(f"{name}: {x[~near].flatten()[:4].tolist()}, by bounds.py {y[~near].flatten()[:4].tolist()}")
    return found


def sized(step: StepInputs) -> Any:
    """The same step with the sizes of the values in their place: what roundings are relative to."""
    codec = step.layer.value_codec

    class Sizes:
        bits, levels = codec.bits, codec.levels

        def decode(self, *given: Any) -> Tensor:
            return codec.decode(*given).abs()

    class Layer:
        key_codec, value_codec = step.layer.key_codec, Sizes()

    class Step:
        layer, encoded, shape, call, blocks, query = Layer(), step.encoded, step.shape, step.call, step.blocks, step.query
        exact_keys, exact_values = step.exact_keys, step.exact_values.abs()
        block_bias, exact_bias = step.block_bias, step.exact_bias

    return Step()
