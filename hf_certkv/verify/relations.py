"""Metamorphic relations: what a change of the problem must do to the output and its bound, and what it must leave alone.

Relations that one might expect, that do not hold, and why that is right:

- Masked tokens do not only add to a bound: their scores take part in products of another size, so masses may round either way.
- A tighter tolerance does not give every head a bound at most as large. What is promoted for one query head is used by all of
  its KV head, and raised keys move weight to other blocks: a head that had met the tighter tolerance already may end with a
  larger bound than before. It is within that tolerance all the same, and heads that had not met it do get a smaller bound.
- The bound of a float16 output does not scale with the values: omega of section 5 stays as it is. That of others does but for
  STEP_FLOOR, an absolute number that is added to steps: less than 2^-30 of a bound here.
- A constant added to all keys changes codes: offsets are rounded to float16, and everything is counted from them. What is known
  of kappa, epsilon and Sigma for any grid holds with and without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..codecs import EPSILON, KAPPA, KEY_SPECTRAL, PER_LEVEL, SLACK, TINY
from . import kernel
from .cases import DENSE, Case
from .draws import Draw, masked, moderate
from .generate import seeded
from .parts import Clock, Part
from .same import Seen, apart, identical, same_codes, same_exactly, serve

SMALLEST = 2.0**-14  # normal float16


def by_rows(case: Case, order: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows `[batch, kv_heads, rows, ...]` with the query heads of each KV head in another order."""
    new = case.query.shape[2]
    return lambda x: x.unflatten(2, (-1, new))[:, :, order].flatten(2, 3)


def blocks_permuted(draw: Draw) -> Iterator[str]:
    """Whole blocks in another order, the mask along with them."""
    case = masked(draw, draw.case())
    block = case.settings["block_size"]
    count = (case.keys.shape[2] - 1) // block
    order = draw.order(count)
    places = torch.cat(
        [torch.arange(count * block).view(count, block)[order].flatten(), torch.arange(count * block, case.keys.shape[2])]
    )
    mask = None if case.mask is None else case.mask[..., places]
    other = replace(case, keys=case.keys[:, :, places], values=case.values[:, :, places], mask=mask)
    one, two = serve(case, draw.device), serve(other, draw.device)
    yield from one.breaches + two.breaches
    for left, right in ((one.keys, two.keys), (one.values, two.values)):
        moved = replace(left, codes=left.codes[:, :, order], scale=left.scale[:, :, order], offset=left.offset[:, :, order])
        yield from same_codes(moved, right)
    yield from apart(one, two)
    yield from same_exactly(case, other)


def keys_shifted(draw: Draw) -> Iterator[str]:
    """A constant vector added to every key: exact attention is unchanged, and steps only by what offsets round."""
    case = masked(draw, draw.case(fast=draw.pick((True, False))))
    keys = draw.on_grid(case.keys)
    constant = draw.constant(keys.shape[-1], keys.dtype)
    moved = keys + constant
    one, two = replace(case, keys=keys), replace(case, keys=moved)
    yield from same_exactly(one, two)
    seen = serve(one, draw.device), serve(two, draw.device)
    # Where no offset was rounded, all is counted from the same place.
    if torch.equal(seen[0].keys.offset.double() + constant.double(), seen[1].keys.offset.double()):
        yield from same_codes(replace(seen[0].keys, offset=seen[1].keys.offset), seen[1].keys)
    block, channels = case.settings["block_size"], keys.shape[-1]
    for made, originals in zip(seen, (keys, moved), strict=True):
        yield from made.breaches
        blocks = made.keys.codes.shape[2]
        x = originals[:, :, : blocks * block].double().unflatten(2, (blocks, block))
        # The offset is at most two units in the last place below the smallest number, the step as much above its quotient.
        room = 4 * made.keys.offset.double().abs().mul(2.0**-10).clamp_min(2.0**-24)
        widest = (x.amax(-2) - x.amin(-2) + room) / (256 - 1 / 32) * (1 + 2.0**-9) + 2.0**-23
        if not bool((made.keys.scale <= widest).all()):
            yield "steps are larger than the range and the offset's rounding account for"
        for level, most in enumerate((0.5, 1 / 32)[: (made.keys.numbers.shape[-1] - 1) // PER_LEVEL]):
            numbers = made.keys.numbers[..., level * PER_LEVEL : (level + 1) * PER_LEVEL].double()
            limits = {KAPPA: most, EPSILON: most * math.sqrt(channels), KEY_SPECTRAL: most * math.sqrt(channels * block)}
            for column, limit in limits.items():
                if not bool((numbers[..., column] <= limit * SLACK**3 + TINY).all()):
                    largest = float(numbers[..., column].max())
                    yield f"key number {column} of level {level} is {largest:.6g}, at most {limit:.6g}"


def values_shifted(draw: Draw) -> Iterator[str]:
    """A constant vector added to every value: the exact output moves by it."""
    case = masked(draw, draw.case(fast=draw.pick((True, False))))
    values = draw.on_grid(case.values)
    shift = draw.constant(values.shape[-1], values.dtype)
    one, two = replace(case, values=values), replace(case, values=values + shift)
    yield from same_exactly(one, two, shift)
    yield from serve(one, draw.device).breaches + serve(two, draw.device).breaches


def tokens_doubled(draw: Draw) -> Iterator[str]:
    """Every token twice, side by side or one copy after the other: the exact output is unchanged."""
    case = masked(draw, draw.case(fast=draw.pick((True, False))))
    tokens = case.keys.shape[2]
    places = torch.arange(tokens).repeat_interleave(2) if draw.pick((True, False)) else torch.arange(tokens).repeat(2)
    mask = None if case.mask is None else case.mask[..., places]
    other = replace(case, keys=case.keys[:, :, places], values=case.values[:, :, places], mask=mask)
    yield from same_exactly(case, other)
    yield from serve(case, draw.device).breaches + serve(other, draw.device).breaches


def masked_tokens_added(draw: Draw) -> Iterator[str]:
    """Blocks that the mask hides: only the length of the chains counts, unless they are larger than what is seen."""
    case = draw.case()
    block, batch = case.settings["block_size"], case.keys.shape[0]
    huge, at, tokens = draw.pick((False, True)), draw.pick(range(2)) * block, case.keys.shape[2]
    places = torch.cat([torch.arange(at), torch.arange(draw.pick((1, 2)) * block), torch.arange(at, tokens)])
    kept = torch.ones(len(places), dtype=torch.bool)
    kept[at : at + len(places) - tokens] = False
    size = torch.where(kept, 1.0, 50.0 if huge else 1.0).view(-1, 1).to(case.keys.dtype)
    mask = kept.expand(batch, 1, case.query.shape[2], -1)
    other = replace(case, keys=case.keys[:, :, places] * size, values=case.values[:, :, places] * size, mask=mask)
    yield from same_exactly(case, other)
    one, two = serve(case, draw.device), serve(other, draw.device)
    yield from one.breaches + two.breaches
    if not huge:
        yield from apart(one, two, longer=True)


def normal(*coded: Tensor) -> bool:
    """Whether float16 steps and offsets are far from subnormal ones and from overflow."""
    return all(bool(((part == 0) | ((part.abs() >= 2 * SMALLEST) & (part.abs() < 30000))).all()) for part in coded)


def query_and_keys_scaled(draw: Draw) -> Iterator[str]:
    """The query times 2^j, keys by 2^-j: every number on the way is the same, or the same times a power of two."""
    case = draw.case(fast=False)
    power = 2.0 ** draw.pick((-5, -2, -1, 1, 2, 4))
    # Steps are 1/256 of a range: larger keys keep them in float16's normal range. Offsets of channels around 0 are kept off it.
    case = replace(case, query=moderate(case.query / 16), keys=moderate(case.keys * 4 + 32))
    one = serve(case, draw.device)
    two = serve(replace(case, query=case.query * power, keys=case.keys / power), draw.device)
    yield from one.breaches + two.breaches
    if normal(one.keys.scale, one.keys.offset, two.keys.scale, two.keys.offset):
        yield from same_codes(one.keys, two.keys, 1 / power)
        # The CPU kernel does not divide steps by the widest before it adds what squares may lose to underflow.
        yield from identical(one, two, near=0.0 if kernel.chosen() == "reference" else 2.0**-40)
    else:
        yield SKIPPED


def values_scaled(draw: Draw) -> Iterator[str]:
    """Values times 2^j: output and bound by as much."""
    case = draw.case(fast=False)
    power = 2.0 ** draw.pick((-3, -2, -1, 1, 2, 3))
    case = replace(case, values=moderate(case.values * 4 + 32))
    one, two = serve(case, draw.device), serve(replace(case, values=case.values * power), draw.device)
    yield from one.breaches + two.breaches
    parts = (one.values.scale, one.values.offset, two.values.scale, two.values.offset)
    if not normal(*parts):
        yield SKIPPED
        return
    yield from same_codes(one.values, two.values, power)
    if case.values.dtype != torch.float16:
        yield from identical(one, two, power, near=2.0**-30)


def tolerance_tightened(draw: Draw) -> Iterator[str]:
    """Tighter absolute tolerances on the same call, head by head."""
    case = draw.case()
    base = serve(case, draw.device)
    before: tuple[float, Seen] | None = None
    for share in (2.0, 1.01, 0.7, 0.4, 0.2, 0.05):
        atol = share * float(base.bound.max())
        seen = serve(replace(case, settings={**case.settings, "atol": atol}), draw.device)
        yield from seen.breaches
        dense = dense_rows(case, seen)
        if not bool((dense | (seen.bound <= atol)).all()):
            yield "a bound is above its tolerance"
        if before is not None:
            loose, was = before
            served = ~dense & ~dense_rows(case, was)
            if not bool((was.bound <= loose)[served].all() and (seen.bound < was.bound)[served & (was.bound > atol)].all()):
                yield "a head that did not meet the tighter tolerance got no smaller bound"
        if share >= 1.0:  # every head meets this at once: nothing may depend on the tolerance
            yield from identical(base, seen)
        before = atol, seen


def dense_rows(case: Case, seen: Seen) -> Tensor:
    """Which rows `[batch, kv_heads, rows]` were served densely."""
    dense = torch.isin(seen.rungs, torch.tensor([int(rung) for rung in DENSE]))
    return dense.unflatten(1, (case.keys.shape[1], -1)).flatten(2)


def heads_permuted(draw: Draw) -> Iterator[str]:
    """The query heads of every KV head in another order."""
    case = masked(draw, draw.case())
    heads, groups = case.keys.shape[1], case.query.shape[1] // case.keys.shape[1]
    order = draw.order(groups)
    places = (torch.arange(heads)[:, None] * groups + order).flatten()
    mask = case.mask if case.mask is None or case.mask.shape[1] == 1 else case.mask[:, places]
    one, two = serve(case, draw.device), serve(replace(case, query=case.query[:, places], mask=mask), draw.device)
    yield from one.breaches + two.breaches
    yield from apart(one.moved(by_rows(case, order)), two)


def batch_permuted(draw: Draw) -> Iterator[str]:
    """Batch rows in another order."""
    case = masked(draw, draw.case())
    order = draw.order(case.query.shape[0])
    mask = case.mask if case.mask is None or case.mask.shape[0] == 1 else case.mask[order]
    other = replace(case, query=case.query[order], keys=case.keys[order], values=case.values[order], mask=mask)
    one, two = serve(case, draw.device), serve(other, draw.device)
    yield from one.breaches + two.breaches
    yield from apart(one.moved(lambda x: x[order]), two)


def prefill_chunked(draw: Draw) -> Iterator[str]:
    """The prefill in pieces. Each block is encoded by itself: the same codes."""
    case = draw.case()
    one, two = serve(case, draw.device), serve(case, draw.device, chunk=draw.pick((1, 5, 16, 23)))
    yield from _same_cache(one, two)


def cropped_and_appended(draw: Draw) -> Iterator[str]:
    """Tokens removed and appended again: blocks come back from their originals, and are encoded once more."""
    case = draw.case()
    most = case.keys.shape[2] - case.query.shape[2] - 1
    one, two = serve(case, draw.device), serve(case, draw.device, again=draw.pick(range(1, most)))
    yield from _same_cache(one, two)


def _same_cache(one: Seen, two: Seen) -> Iterator[str]:
    yield from one.breaches + two.breaches
    yield from same_codes(one.keys, two.keys)
    yield from same_codes(one.values, two.values)
    if not torch.equal(one.keys.numbers[..., KAPPA], two.keys.numbers[..., KAPPA]):
        yield "kappa differs"  # a maximum of elementwise numbers
    yield from apart(one, two)


SKIPPED = "skipped"
RELATIONS: dict[str, Callable[[Draw], Iterator[str]]] = {
    "whole blocks permuted": blocks_permuted,
    "a constant added to keys": keys_shifted,
    "a constant added to values": values_shifted,
    "every token twice": tokens_doubled,
    "masked blocks added": masked_tokens_added,
    "query times 2^j, keys by 2^-j": query_and_keys_scaled,
    "values times 2^j": values_scaled,
    "tolerance tightened": tolerance_tightened,
    "query heads permuted": heads_permuted,
    "batch rows permuted": batch_permuted,
    "prefill in chunks": prefill_chunked,
    "cropped and appended again": cropped_and_appended,
}


def run(clock: Clock, device: torch.device, seed: int) -> Part:
    """All relations in turn until the clock is over, at least once each."""
    part = Part("relations", "what a change of the problem must do to output and bound, and must leave alone", "pairs of calls")
    checked: Counter[str] = Counter()
    skipped, index, names = 0, 0, list(RELATIONS)
    if kernel.slow():  # a round of all takes minutes: other ones first with another seed
        names = names[seed % len(names) :] + names[: seed % len(names)]
    while index == 0 or not clock.over():
        for name in names:
            if kernel.slow() and checked and clock.over():
                break
            words = list(RELATIONS[name](Draw(seeded(seed, index), device)))
            skipped += SKIPPED in words
            checked[name] += SKIPPED not in words
            for what in words:
                if what != SKIPPED:
                    part.fail(f"{name}, seed {seed}, index {index}: {what}")
        index += 1
        clock.tell(f"{index} rounds of {len(RELATIONS)} relations, {part.failed} failures")
    part.checked = sum(checked.values())
    part.figures = {"seed": seed, "rounds": index, "skipped": skipped, "checked_by_relation": dict(checked)}
    part.seconds = clock.spent
    return part
