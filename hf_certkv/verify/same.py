"""Whether two calls came to the same: bit by bit, or within the certificate's own rounding terms; exactly, as balls.

- Bit by bit, where every operation sees the same shapes and commutes with the change: multiplying by a power of two, in any
  order of summation, as long as nothing leaves the range of normal numbers; and what is elementwise, a minimum or a maximum
  (codes, steps, offsets), whatever it is batched with.
- Within rounding terms, where tokens, heads or batch rows change their places. Products and sums are then in another order,
  which no library promises to be without effect. Both outputs are within `fixed` (E_fp + E_out) of the same real number, so
  they are at most the sum of the two apart. Masses as computed are within mu of the real ones [section 5, Masses]: inflated
  ones, and D_min, differ by at most mu^2. The radii differ by what the outputs are apart and by sqrt(2 off), where the moment
  is known within `off` [section 5, Moments]; that is multiplied by e^Delta (e^Delta - 1) at most. Spectral norms and the
  query's weights differ by `Seen.measured` (for Delta below 4).
- Exact values are equal if their balls overlap at 2^-80 of their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import bounds, device_decode
from ..attention import AttentionCall
from ..codecs import UNIT_ROUNDOFF, EncodedBlocks
from ..decode import DecodeStep
from ..inputs import StepInputs
from ..layers import CertifiedLayer
from ..precision import full_precision
from . import kernel
from .cases import Case, fill, judge, new_cache, problems
from .oracle import exact_outputs, first_bits, flint, norm

AGREE = 80  # bits to which exact values are compared


@dataclass(frozen=True)
class Seen:
    """A call that was served, and what its rounding terms allow. `[batch, kv_heads, rows]`, output with its channels.

    Attributes: output, bound; fixed: E_fp + E_out; inflate: mu; blur: sqrt(2 off); rise: e^Delta (e^Delta - 1); measured: what
        stored norms and the query's weights may differ by, as a factor; keys, values: the codes; rungs: `[batch, query_heads,
        positions]`; breaches: of the promise, in words.
    """

    output: Tensor
    bound: Tensor
    fixed: Tensor
    inflate: Tensor
    blur: Tensor
    rise: Tensor
    measured: float
    keys: EncodedBlocks
    values: EncodedBlocks
    rungs: Tensor
    breaches: list[str]

    def moved(self, change: Callable[[Tensor], Tensor]) -> Seen:
        """The same with rows at other places."""
        inflate, blur, rise = change(self.inflate), change(self.blur), change(self.rise)
        made = replace(self, output=change(self.output), bound=change(self.bound), fixed=change(self.fixed))
        return replace(made, inflate=inflate, blur=blur, rise=rise)


def serve(case: Case, device: torch.device, chunk: int | None = None, again: int = 0) -> Seen:
    """Run and judge a case. Args: chunk: tokens of the prefill at a time; again: tokens to crop and to append once more."""
    case = case.to(device)
    cache, new = new_cache(case), case.query.shape[2]
    if chunk is None and not again:
        handles = fill(cache, case)
    else:
        start = case.keys.shape[2] - new
        step = chunk or start
        for a, b in [(i, min(i + step, start)) for i in range(0, start, step)]:
            cache.update(case.keys[:, :, a:b], case.values[:, :, a:b], 0)
        if again:
            cache.crop(-again)
            cache.update(case.keys[:, :, start - again : start], case.values[:, :, start - again : start], 0)
        handles = cache.update(case.keys[:, :, start:], case.values[:, :, start:], 0)
    (layer,) = cache.certified_layers
    call = AttentionCall(case.query, *handles, case.mask, scale=case.scale, softcap=case.softcap, sinks=case.sinks)
    with full_precision(device.type):
        terms, output = (_on_the_device if device_decode.supports(layer, call) else _by_the_host)(layer, call)
    cache.recorder.commit()
    record = cache.recorder.records[-1]
    block, channels = layer.block, layer.widths[0]
    widths = [(max(block, width), min(block, width)) for width in layer.widths]
    spectral = max((4 * (n + 3) * r + 3 * r * r) * UNIT_ROUNDOFF / 8 for n, r in widths)
    keys, values = layer.store.encoded()
    breaches = judge(case, output, record, cache.settings).breaches
    if missed := kernel.missed(record, cache.settings):
        breaches.append(missed)
    return Seen(
        **terms,
        measured=1 + 3 * spectral + 16 * (channels + 8) * 2.0**-23,
        keys=_on_cpu(keys),
        values=_on_cpu(values),
        rungs=torch.from_numpy(record.rung.copy()),
        breaches=breaches,
    )


def _terms(step: StepInputs, **found: Tensor) -> dict[str, Tensor]:
    """Fields of `Seen` from an output, bound, E_fp + E_out, mu, and the largest shifts."""
    worst, layer = found.pop("worst"), step.layer
    rise = torch.exp(worst) * torch.expm1(worst)
    blur = (2.02 * bounds.gamma(layer.block + layer.widths[1] + 8)) ** 0.5 * 3 * step.value_radius.expand_as(found["bound"])
    return {name: part.cpu() for name, part in {**found, "rise": rise, "blur": blur}.items()}


def _by_the_host(layer: CertifiedLayer, call: AttentionCall) -> tuple[dict[str, Tensor], Tensor]:
    step = DecodeStep(layer, call)
    step.first_pass()
    step.climb()
    step.details()
    output, made = step.finish(), step.certificate
    assert made is not None
    inflate, worst = bounds.mass_slack(step.slack, step.chain), step.shift.amax(dim=-1)
    return _terms(step, output=step.output, bound=step.bound, fixed=made.fixed, inflate=inflate, worst=worst), output


def _on_the_device(layer: CertifiedLayer, call: AttentionCall) -> tuple[dict[str, Tensor], Tensor]:
    """The same of the Triton kernels, from what they leave on the device."""
    from ..kernels.triton_certify import FIXED, INFLATE

    step = device_decode.DeviceDecode(layer, call)
    step.device.run()
    layer.cache.recorder.add(device_decode.DeviceRecord(step, None))
    fixed, inflate = (step.device.row_figure(fact).clone() for fact in (FIXED, INFLATE))
    worst = step.device.block_figure(1).amax(dim=-1)
    output = step.output.reshape(step.shape[0], call.query.shape[1], -1, step.shape[3])
    return _terms(step, output=step.output, bound=step.bound, fixed=fixed, inflate=inflate, worst=worst), output


def _on_cpu(coded: EncodedBlocks) -> EncodedBlocks:
    return EncodedBlocks(
        **{name: part.cpu().clone() for name, part in vars(coded).items() if part is not None} | {"plane": None}
    )


def apart(one: Seen, two: Seen, longer: bool = False) -> Iterator[str]:
    """Whether outputs and bounds of the same problem differ by more than rounding allows. Args: longer: two's chains are."""
    room = (one.fixed + two.fixed) * bounds.OUTWARD
    distance = torch.linalg.vector_norm(one.output.double() - two.output.double(), dim=-1)
    if not bool((distance <= room).all()):
        yield f"outputs differ by {float((distance / room).max()):.6g} of their rounding terms"
    # E_fp comes from norms, E_out from the norm of the output, which moves by at most `room`.
    same = (one.fixed - two.fixed).abs() <= 2.0**-8 * room + 2.0**-20 * one.fixed
    if not bool((same | (longer & (two.fixed >= one.fixed))).all()):
        yield "rounding terms differ"
    mu = torch.maximum(one.inflate, two.inflate)
    factor = mu**6 * max(one.measured, two.measured) ** 2
    radii = mu**3 * torch.maximum(one.rise, two.rise) * (room + torch.maximum(one.blur, two.blur))
    for a, b in ((one, two), (two, one)):
        allowed = (b.bound - b.fixed) * factor + radii + a.fixed
        if not bool((a.bound <= allowed * bounds.OUTWARD).all()):
            yield f"bounds differ by a factor of {float((a.bound / b.bound).max()):.9g}"


def identical(one: Seen, two: Seen, power: float = 1.0, near: float = 0.0) -> Iterator[str]:
    """Whether two results are the same bits, up to a power of two. Args: near: what bounds may differ by, relatively."""
    if not torch.equal(one.output * power, two.output):
        yield "outputs differ"
    if not bool(((one.bound * power - two.bound).abs() <= near * two.bound).all()):
        yield "bounds differ"
    if not torch.equal(one.rungs, two.rungs):
        yield "rungs differ"


def same_codes(one: EncodedBlocks, two: EncodedBlocks, step: float = 1.0) -> Iterator[str]:
    """Whether codes are the same, and steps and offsets too, up to a power of two."""
    if not torch.equal(one.codes, two.codes):
        yield "codes differ"
    if not (torch.equal(one.scale * step, two.scale) and torch.equal(one.offset * step, two.offset)):
        yield "steps or offsets differ"


def same_exactly(one: Case, two: Case, shift: Tensor | None = None) -> Iterator[str]:
    """Whether exact outputs are the same, as balls. Args: shift: `[value channels]`, added to the first's."""
    before = flint.ctx.prec
    added = [flint.arb(0)] * one.values.shape[-1] if shift is None else [flint.arb(x) for x in shift.double().tolist()]
    try:
        for (_, a), (_, b) in zip(problems(one), problems(two), strict=True):
            flint.ctx.prec = max(first_bits(a), first_bits(b)) + AGREE
            for left, right in zip(exact_outputs(a), exact_outputs(b), strict=True):
                assert left is not None and right is not None
                gap = [x + s - y for x, s, y in zip(left, added, right, strict=True)]
                if not (all(x.contains(0) for x in gap) and norm(gap) < norm(right) * 2.0**-AGREE + 2.0**-200):
                    yield "exact outputs differ"
    finally:
        flint.ctx.prec = before
