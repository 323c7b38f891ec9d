"""What the CPU kernel ought to say: its sums in float64, and its certificate by bounds.py from its own sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_certkv import bounds
from hf_certkv.attention import AttentionCall
from hf_certkv.codecs import EPSILON, ETA, KAPPA, KEY_SPECTRAL, TINY, VALUE_SPECTRAL, read_lengths, token_steps
from hf_certkv.decode import DecodeStep
from hf_certkv.kernels import reference
from hf_certkv.precision import full_precision
from hf_certkv.verify import cpu_arithmetic
from hf_certkv.verify.cases import Case, fill, new_cache

POWERS = (4, 5, 6, 7)  # of the eight sums: those of the weights, their squares, cubes and fourth powers


def started(case: Case) -> DecodeStep:
    """A step of a new cache after its first pass."""
    cache = new_cache(case)
    handles = fill(cache, case)
    (layer,) = cache.certified_layers
    call = AttentionCall(case.query, *handles, case.mask, scale=case.scale, softcap=case.softcap, sinks=case.sinks)
    with full_precision("cpu"):
        step = DecodeStep(layer, call)
        step.first_pass()
        if step.at_once and step.fused is not None:  # what is looked at here, and a settled step does without
            step.at_once = step.settled = False
    return step


def arrays(step: DecodeStep) -> dict[str, Tensor]:
    """What the kernel has left behind: sums `[B, H, R, N + 1, 8]` and so on, float64; `output` as `[B, H, N + 1, R, W]`."""
    fused: Any = step.fused
    batch, heads, used, width = fused.shape
    units, rows, blocks = fused.units, fused.rows, fused.blocks

    def of(name: str, *shape: int) -> Tensor:
        flat = fused.scratch(name, units * math.prod(shape), np.float32)[0]
        return torch.from_numpy(flat.copy()).view(batch, heads, *shape).double()

    return {
        "maximum": of("maximum", rows, blocks + 1)[:, :, :used],
        "sums": of("sums", rows, blocks + 1, 8)[:, :, :used],
        "output": of("output", blocks + 1, rows, width)[:, :, :, :used],
        "squares": of("squares", blocks).unsqueeze(2),
        "l1": of("l1", rows, blocks)[:, :, :used],
        "l2": of("l2", rows, blocks)[:, :, :used],
        "errors": of("errors", rows, blocks)[:, :, :used],
        "slips": of("slips", blocks).unsqueeze(2),
        **{
            name: torch.from_numpy(fused.scratch(name, units, np.float64)[0].copy()).view(batch, heads, 1)
            for name in ("key_norm", "value_norm", "exact_norm")
        },
        "top": of("top", rows)[:, :, :used].unsqueeze(-1),
    }


def kernel_slack(step: DecodeStep, made: dict[str, Tensor]) -> Tensor:
    """lambda of the kernel's weights, from what it says of scores of codes multiplied as integers: float64 `[B, H, R]`."""
    call, coded = step.call, None
    if step.fused is not None and step.fused.integers:
        coded = (made["errors"].amax(-1), made["key_norm" if step.fused.certified_again else "exact_norm"])
    width = step.layer.widths[0]
    error = bounds.score_rounding(call.scaling, step.query_norm, made["key_norm"], width, step.bias_size, call.softcap, coded)
    return bounds.weight_slack(error, reference.RESCALINGS)


def value_slips(step: DecodeStep, made: dict[str, Tensor]) -> Tensor:
    """How far what a block's values add may be off, in L2, where codes are multiplied as integers: `[B, H, R, N]`."""
    group = step.layer.value_codec.group_size(step.shape[3])
    slope = bounds.step_slip(step.layer.block, group) if step.fused is not None and step.fused.integers else 0.0
    return made["slips"] + slope * made["sums"][..., :-1, 0]


def read_values(step: DecodeStep) -> tuple[Tensor, Tensor]:
    """Keys and values of every block at its base level, as the reference reads them: float32 `[B, H, N, block, ...]`."""
    (keys, values), layer = step.encoded, step.layer
    read = layer.value_codec.decode(values.codes, None, values.scale, values.offset, step.shape[3])
    return layer.key_codec.decode(keys.codes, None, keys.scale, keys.offset), read


def float64_sums(step: DecodeStep, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """The eight sums of every segment and the values by weights, of scores in float64 less the kernel's own maxima."""
    block_keys, block_values = read_values(step)
    coded = step.encoded[1]
    lengths = read_lengths(coded.lengths, coded.numbers[..., -1]) if coded.lengths is not None else None
    segments = [
        (block_keys[:, :, i], block_values[:, :, i], token_steps(step.encoded[1].scale[:, :, i])) for i in range(step.blocks)
    ]
    segments.append((step.exact_keys, step.exact_values, torch.zeros(step.exact_keys.shape[:3])))
    sums, outputs = [], []
    for i, (keys, values, steps) in enumerate(segments):
        scores = (step.query.double() * step.call.scaling) @ keys.double().mT
        if step.call.softcap is not None:
            scores = torch.tanh(scores / step.call.softcap) * step.call.softcap
        bias = step.exact_bias if i == step.blocks else step.block_bias[..., i, :] if step.block_bias is not None else None
        if bias is not None:
            scores = scores + bias.double()
        base = maximum[..., i].where(maximum[..., i] > -math.inf, 0.0)
        w, sigma = torch.exp(scores - base.unsqueeze(-1)), steps.double().unsqueeze(2)
        norms = values.double().square().sum(-1)
        if i < step.blocks and lengths is not None:
            norms = lengths[:, :, i]
        n, zero = norms.unsqueeze(2), torch.zeros(())
        if i == step.blocks:  # of the exact tokens nobody asks these
            sigma, n = sigma * zero, n * zero
        parts = [w * sigma, (w * sigma) ** 2, w * n, w * w * n, w, w**2, w**3, w**4]
        sums.append(torch.stack([part.sum(-1) for part in parts], dim=-1))
        outputs.append(w @ values.double())
    return torch.stack(sums, dim=3), torch.stack(outputs, dim=2)


def raised_again(step: DecodeStep, made: dict[str, Tensor]) -> bool:
    """Whether raised blocks have the sums that the reference gives them at their levels."""
    layer, other = step.layer, of_the_reference(step)
    assert layer.shadow is not None
    index = torch.nonzero((step.key_level > 0) | (step.value_level > 0), as_tuple=True)
    parts = []
    for kind, level in ((0, step.key_level), (1, step.value_level)):
        levels = level[index].view(-1, 1, 1)
        part = layer.shadow.read_pages(kind, *index).float()
        for at in range((layer.key_codec, layer.value_codec)[kind].levels):
            decoded = layer.store.decode(("keys", "values")[kind], at, index, layer.widths[kind])
            part = torch.where(levels == at, decoded, part)
        parts.append(part)
    steps = token_steps(step.encoded[1].scale[index])
    reference.redo_blocks(other, index, step.scaled, parts[0], parts[1], steps, step.block_bias, step.call.softcap)
    room = torch.expm1(8 * step.slack.amax()) + 1e-5
    rows, heads, blocks = index
    for mine, theirs in (
        (made["sums"][..., 4], other.total),
        (made["sums"][..., 5], other.square),
        (made["sums"][..., 2], other.sums[..., 2]),
    ):
        x, y = (part[rows, heads, :, blocks].double() for part in (mine, theirs))
        if not bool(((x - y).abs() <= room * y.abs() + 1e-30).all() | y.isnan().any()):
            return False
    return True


def returned(step: DecodeStep, made: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The float32 output before it is rounded, each segment's factor over the normaliser, masses, and the sink's share."""
    maximum, total = made["maximum"].numpy(), made["sums"][..., 4].numpy()
    sink = None if step.sink_logit is None else step.sink_logit.expand(step.shape[:3]).double().numpy()
    output = torch.zeros(step.shape)
    factors, shares = np.zeros(maximum.shape), np.zeros(step.shape[:3])
    for at in np.ndindex(*step.shape[:3]):
        top = float(max(*maximum[at], -math.inf if sink is None else sink[at]))
        factor = np.array([math.exp(m - top) if m > -math.inf else 0.0 for m in maximum[at].tolist()])
        lifted = 0.0 if sink is None else math.exp(sink[at] - top)
        normaliser = sum((factor * total[at]).tolist()) + lifted
        factors[at], shares[at] = factor / normaliser, lifted / normaliser
        segments = made["output"][at[0], at[1], :, at[2]].float().contiguous()
        output[at] = torch.from_numpy(cpu_arithmetic.mixed(segments.numpy(), np.float32(factors[at])))
    found = torch.from_numpy(factors)
    return output, found, found * made["sums"][..., 4], torch.from_numpy(shares)


def by_bounds(step: DecodeStep) -> bounds.Certificate:
    """The certificate that bounds.py makes of the kernel's sums, with the bound of the second mean that the kernel has."""
    made, layer, call = arrays(step), step.layer, step.call
    # The largest norms are rounded up more than the reference's are: `test_largest_norms` looks at them.
    for name in ("slack", "rounding"):  # computed anew from these
        step.__dict__.pop(name, None)
    step.__dict__.update(key_norm=made["key_norm"], value_radius=made["value_norm"], slack=kernel_slack(step, made))
    output, factor, mass, sink = returned(step, made)
    norm = torch.linalg.vector_norm(output.to(layer.dtype).double(), dim=-1)
    sums, block = made["sums"][..., :-1, :], (..., slice(None, -1))
    total, square, cube, fourth = (sums[..., i] for i in POWERS)
    over, over_square = total.clamp_min(TINY), square.clamp_min(TINY)
    channels = layer.widths[0]
    up, root, hidden = 1 + (channels + 8) * 2.0**-23, channels**0.5, 2 * TINY * 65504.0 * (1 + made["top"])
    l1 = (made["l1"] + channels * TINY) * up * made["top"] + channels * hidden
    l2 = (made["l2"].sqrt() + root * 2.0**-60) * up * made["top"] + root * hidden
    level, shifts = step.key_level.unsqueeze(2), []
    for at in range(layer.key_codec.levels):
        numbers = step.key_numbers[..., 3 * at : 3 * at + 3].unsqueeze(2)
        shift = bounds.score_shift(call.scaling, numbers[..., KAPPA], l1, numbers[..., EPSILON], l2)
        shifts.append((shift, bounds.score_shift_l2(call.scaling, numbers[..., KEY_SPECTRAL], l2)))
    shift, shift_l2 = (torch.where(level == 1, a, b) for a, b in zip(shifts[-1], shifts[0], strict=True))
    size = output.double().square().sum(-1, keepdim=True)
    slips = value_slips(step, made)
    inner = dots_of(output, made["output"][:, :, :-1]) - 1.01 * size.sqrt() * slips
    slip = (factor[block] * slips).sum(-1) * bounds.mass_slack(step.slack, step.chain) * bounds.OUTWARD
    moment = (sums[..., 2] - 2 * inner + size * total) / over
    terms = layer.block + step.shape[3]

    def certificate(square_moment: Tensor) -> bounds.Certificate:
        return bounds.total(
            made["maximum"][block] > -math.inf,
            mass[block],
            factor[block] * square.sqrt(),
            mass[..., -1] + sink,
            shift,
            shift_l2,
            level < 2,
            step._value_number(ETA),
            step._value_number(VALUE_SPECTRAL),
            sums[..., 0] / over,
            (sums[..., 1] / over_square).sqrt(),
            moment,
            square_moment,
            step.value_numbers[..., -1].unsqueeze(2),
            step.value_radius,
            norm,
            step.slack,
            step.rounding + slip,
            bounds.output_rounding(norm, step.shape[3], layer.dtype),
            step.chain,
            terms,
        )

    first = certificate(torch.full_like(moment, math.inf))
    reach = step.value_numbers[..., -1].unsqueeze(2) + (norm + first.value_total + first.fixed).unsqueeze(-1)
    powers = (total, square, cube, fourth)
    return certificate(bounds.square_moment_bound(moment, powers, sums[..., 3], inner, size, made["squares"], reach, terms))


def dots_of(output: Tensor, added: Tensor) -> Tensor:
    """The kernel's own float32 dot products of the output `[B, H, R, W]` with what blocks add `[B, H, N, R, W]`."""
    found = torch.zeros(*output.shape[:3], added.shape[2], dtype=torch.float64)
    for b, h, r in np.ndindex(*output.shape[:3]):
        parts, mine = added[b, h, :, r].float().contiguous(), output[b, h, r].contiguous()
        found[b, h, r] = torch.from_numpy(cpu_arithmetic.inners(parts.numpy(), mine.numpy()))
    return found


def of_the_reference(step: DecodeStep) -> reference.Segments:
    """The same pass by the reference."""
    given = (step.scaled, *step.encoded, step.exact_keys, step.exact_values, step.block_bias, step.exact_bias)
    return reference.decode_pass(*given, step.layer.key_codec, step.layer.value_codec, step.call.softcap)


def discrepancies(step: DecodeStep) -> list[str]:
    """What the kernel has left behind, and its certificate, where they are not what float64 and bounds.py make of the step."""
    fused: Any = step.fused
    if fused is None:
        return ["the reference computed this"]
    made, found = arrays(step), list[str]()
    slack, width, sums = kernel_slack(step, made).amax() + 1e-30, step.layer.widths[0], made["sums"]
    for name, mine, exact in (
        ("key norm", made["key_norm"], step.key_norm),
        ("value norm", made["value_norm"], step.value_radius),
    ):
        if not bool((mine >= exact * (1 - 2.0**-29)).all()):
            found.append(f"the largest {name} is too small")
    raised = ((step.key_level > 0) | (step.value_level > 0)).unsqueeze(2)
    wanted, _ = float64_sums(step, made["maximum"])
    powers = torch.tensor([1, 2, 1, 2, 1, 2, 3, 4]).double()
    room = torch.expm1(2 * powers * slack) + 2 * bounds.gamma(step.layer.block + step.shape[3] + 64)
    off = ((sums - wanted).abs() > room * wanted + 1e-30)[..., :-1, :] & ~raised.unsqueeze(-1)
    found += [f"sum {i} of a block is wrong" for i in range(8) if bool(off[..., i].any())]
    if bool(raised.any()) and not raised_again(step, made):
        found.append("a raised block has the sums of before")
    squares = read_values(step)[1].double().square().sum((-1, -2)).unsqueeze(2)
    if not bool(((made["squares"] >= squares * (1 - 1e-4) - 1e-30) | made["squares"].isnan()).all()):  # NaN: not known
        found.append("the values of a block are longer")
    scale = step.encoded[0].scale.double().abs()
    l1 = (made["l1"] + width * TINY) * (1 + (width + 8) * 2.0**-23) * made["top"]
    if not bool((l1 >= step.query.double().abs() @ scale.mT * (1 - 1e-12)).all()):
        found.append("the query's weights are too small")
    exactly = returned(step, made)[0].to(step.layer.dtype)
    if not bool(((exactly == fused.result) | (exactly.isnan() & fused.result.isnan())).all()):
        found.append("the output is another one")
    mine, theirs = fused.certificate(), by_bounds(step)
    for name in ("total", "fixed", "key_total", "value_total", "key_parts", "value_parts"):
        x, y = getattr(mine, name), getattr(theirs, name)
        same = (x == y) | ~(x.isfinite() | y.isfinite())  # infinity and NaN are never within a budget
        # The kernel adds float64 numbers in another order, and a moment is what is left of larger ones: 2^-53 of these over the
        # gamma of them that is added below the root. OUTWARD is larger than that.
        if not bool((same | ((x >= y * (1 - 1e-10)) & (x <= y * (1 + 1e-10)))).all()):
            found.append(f"{name}: {x.flatten()[:4].tolist()}, by bounds.py {y.flatten()[:4].tolist()}")
    budget = (step.config.atol + step.config.rtol * step.norm) * (1 - 2.0**-30)
    if not torch.equal(fused.row_figure(6).bool(), bounds.meets(mine.total, budget)):
        found.append("another budget is met")
    return found
