"""NaN and infinities everywhere they can enter: the output is what exact attention gives, or dense, or there is a typed error.

What exact attention makes of them is not promised anything; but no finite bound may stand beside a value that is not within it,
KV heads without them go on being certified, and once a crop has removed them everything is as if they had never been.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention import eager_attention
from ..certificate import StepRecord
from ..errors import CertKVError
from ..ladder import Rung
from . import kernel
from .cases import Case, call_on, judge, new_cache
from .faults_state import differences, quiet, state_of
from .parts import Clock, Part

DENSE = (Rung.DENSE_HEAD, Rung.DENSE_LAYER)
TOKENS, BLOCK, CHANNELS = 100, 16, 32
# Where a token may lie: in the sink block, in quantised ones, in the recent window, and the new one.
TOKENS_AT = {"sink": 3, "first block": 17, "last block": 79, "tail": 97, "new": TOKENS - 1}
BAD = (math.nan, math.inf, -math.inf)
LARGEST = 3.0e38  # finite in float32, but not its square


@dataclass(frozen=True)
class Poison:
    """One number that is no number, or too large.

    Attributes: reached: the KV heads whose outputs it may reach (batch row, KV head); newest_only: it goes with the last step;
        shared: it takes part in the bounds of other batch rows, which may go dense for it.
    """

    name: str
    case: Case
    reached: frozenset[tuple[int, int]]
    newest_only: bool = False
    shared: bool = False


def healthy(seed: int, **settings: Any) -> Case:
    """Two batch rows, two KV heads, four query heads, a hundred tokens."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 1, CHANNELS, generator=g)
    keys, values = (torch.randn(2, 2, TOKENS, CHANNELS, generator=g) for _ in range(2))
    return Case(query, keys, values, settings={"sink_blocks": 1, "recent_window": 4, "dense_layer_share": 0.9, **settings})


def poisons(seed: int, **settings: Any) -> Iterator[Poison]:
    """Every place once, with every bad number."""
    everyone = frozenset((row, head) for row in range(2) for head in range(2))
    case = healthy(seed, **settings)
    for bad in (*BAD, LARGEST):
        yield Poison(f"query {bad}", replace(case, query=_put(case.query, (0, 1, 0, 3), bad)), frozenset({(0, 0)}), True)
        for where, token in TOKENS_AT.items():
            for name in ("keys", "values"):
                changed: dict[str, Any] = {name: _put(getattr(case, name), (1, 1, token, 2), bad)}
                reached = frozenset({(1, 1)})
                yield Poison(f"{name}, {where}, {bad}", replace(case, **changed), reached, where == "new")
    mask = torch.zeros(2, 1, 1, TOKENS)
    for bad in (math.nan, math.inf):
        for where, token in TOKENS_AT.items():
            added = _put(mask, (0, 0, 0, token), bad)
            yield Poison(f"mask, {where}, {bad}", replace(case, mask=added), frozenset({(0, 0), (0, 1)}), True, True)
    for where, token in TOKENS_AT.items():  # what is bad may be masked: SDPA gives NaN all the same
        hidden = _put(mask, (1, 0, 0, token), -math.inf)
        bad_values = _put(case.values, (1, 1, token, 2), math.inf)
        masked = replace(case, values=bad_values, mask=hidden)
        yield Poison(f"values behind a mask, {where}", masked, frozenset({(1, 1)}), where == "new")
    for bad in BAD:
        sinks = _put(torch.zeros(4), (2,), bad)
        yield Poison(f"sink logit {bad}", replace(case, sinks=sinks), frozenset({(0, 1), (1, 1)}), True)
    for number in (*BAD, 0.0, 1e300):
        yield Poison(f"scaling {number}", replace(case, scale=number), everyone, True)
    for number in (math.nan, math.inf, 0.0, 1e-300):
        yield Poison(f"softcap {number}", replace(case, softcap=number), everyone, True)


def _put(x: Tensor, place: tuple[int, ...], number: float) -> Tensor:
    x = x.clone()
    x[place] = number
    return x


def expected_of(case: Case) -> Tensor:
    """What a dense cache gives."""
    if case.softcap is None and case.sinks is None:
        return call_on(case, case.keys, case.values)
    scale = case.query.shape[-1] ** -0.5 if case.scale is None else case.scale
    return eager_attention(case.query, case.keys, case.values, case.mask, scale, case.softcap, case.sinks)


def of_head(case: Case, record: StepRecord, output: Tensor, row: int, head: int) -> tuple[Case, Tensor, StepRecord]:
    """One batch row and KV head as a case of its own."""
    rows, mine, heads = slice(row, row + 1), slice(2 * head, 2 * head + 2), slice(head, head + 1)
    part = replace(
        case,
        query=case.query[rows, mine],
        keys=case.keys[rows, heads],
        values=case.values[rows, heads],
        mask=None if case.mask is None else case.mask[rows],
        sinks=None if case.sinks is None else case.sinks[mine],
    )
    arrays = {name: getattr(record, name)[rows, mine] for name in ("rung", "candidate", "bound", "expected", "norm", "error")}
    return part, output[rows, mine], replace(record, **arrays)


def examine(poison: Poison, counts: Counter[str]) -> Iterator[str]:
    """What is wrong about one."""
    case = poison.case
    cache = new_cache(case)
    try:
        cache.update(case.keys[:, :, :-1], case.values[:, :, :-1], 0)
        before = state_of(cache)
        output = call_on(case, *cache.update(case.keys[:, :, -1:], case.values[:, :, -1:], 0))
    except CertKVError as error:
        counts[f"{type(error).__name__}"] += 1
        if differences(state_of(cache), before):
            yield "the error left another state"
        return
    cache.recorder.commit()
    record, expected = cache.recorder.records[-1], expected_of(case)
    # A shared budget cannot be seen from one KV head: there only the bounds are judged.
    alone = cache.settings if cache.settings.scope == "head" else cache.settings.replace(scope="head", atol=1e30)
    for row in range(2):
        for head in range(2):
            part, mine, judged = of_head(case, record, output, row, head)
            theirs, dense = expected[row : row + 1, 2 * head : 2 * head + 2], np.isin(judged.rung, DENSE)
            if (row, head) not in poison.reached:
                counts["untouched, " + ("dense" if dense.any() else "certified")] += 2
                yield from judge(part, mine, judged, alone).breaches
                if cache.settings.scope == "head" and not poison.shared and dense.all():
                    yield f"batch row {row}, KV head {head}, which it does not reach, is dense"
                continue
            for i in range(2):
                ours, exact, bound = mine[0, i, 0], theirs[0, i, 0], float(judged.bound[0, i, 0])
                kind = "dense" if dense[0, i, 0] else "certified"
                counts[f"touched, {kind}, {'finite' if bool(torch.isfinite(exact).all()) else 'not finite'}"] += 1
                if not torch.equal(torch.isfinite(ours), torch.isfinite(exact)) or not torch.equal(ours.isnan(), exact.isnan()):
                    # A sum that overflows in one order of float32 operations need not in another.
                    if any([1e38 < float(part.abs().amax()) < math.inf for part in (case.query, case.keys, case.values)]):
                        wide = _in_float64(case)[row, 2 * head + i, 0]
                        if float((ours.double() - wide).norm()) <= _doubt(wide, 0.0):
                            counts[f"touched, {kind}, finite where float32 attention overflows"] += 1
                            continue
                    yield f"({row}, {2 * head + i}) {kind}: {ours.tolist()} where exact attention gives {exact.tolist()}"
                elif math.isfinite(bound) and not float((ours.double() - exact.double()).norm()) <= bound + _doubt(
                    exact, bound
                ):
                    yield f"({row}, {2 * head + i}) {kind}: finite bound {bound} beside {ours.tolist()}, exact {exact.tolist()}"
                elif kind == "certified" and not math.isfinite(bound):
                    yield f"({row}, {2 * head + i}): certified with the bound {bound}"
    if poison.newest_only:
        yield from _cropped(poison, cache)


def _in_float64(case: Case) -> Tensor:
    """What a dense cache of float64 numbers gives."""
    names = ("query", "keys", "values", "mask")
    parts: dict[str, Any] = {name: getattr(case, name).double() for name in names if getattr(case, name) is not None}
    return expected_of(replace(case, **parts))


def _doubt(exact: Tensor, bound: float) -> float:
    """What float32 attention itself may be off by, for the comparison of outputs that no oracle can judge."""
    return 1e-5 * (float(exact.double().norm()) + bound)


def _cropped(poison: Poison, cache: Any) -> Iterator[str]:
    """Without the step that brought it, the cache is as one that never met it: same state, same certified output."""
    cache.crop(-1)
    good = healthy(0, **poison.case.settings)
    clean = new_cache(good)
    clean.update(poison.case.keys[:, :, :-1], poison.case.values[:, :, :-1], 0)
    if wrong := differences(state_of(cache), state_of(clean)):
        yield f"after a crop: {wrong[:4]}"
    outputs = [call_on(good, *each.update(good.keys[:, :, -1:], good.values[:, :, -1:], 0)) for each in (cache, clean)]
    if not torch.equal(*outputs):
        yield "after a crop: another output"
    for each in (cache, clean):
        each.recorder.commit()
    rungs = cache.recorder.records[-1].rung
    if np.isin(rungs, DENSE).all() or not (rungs == clean.recorder.records[-1].rung).all():
        yield f"after a crop: rungs {rungs.tolist()}"


SETTINGS: tuple[dict[str, Any], ...] = (
    {"rtol": 0.3},
    {"rtol": 0.05, "value_bits": 8, "refine": "off"},
    {"rtol": 0.3, "scope": "layer", "refine": "device"},
    {"rtol": 0.3, "policy": "paper", "value_group": 0},
    {"rtol": 0.3, "audit": True, "hot_blocks": 2},
)


def run(clock: Clock, device: torch.device, seed: int) -> Part:
    """All places with all bad numbers, over formats and scopes."""
    part = Part("not_numbers", "NaN and infinities: exact attention's output, the dense rung or a typed error", "head-steps")
    counts: Counter[str] = Counter()
    for number, settings in enumerate(SETTINGS):
        if number and clock.over():
            break
        if kernel.chosen() == "triton" and (settings.get("scope") == "layer" or settings.get("policy") == "paper"):
            continue
        every = list(poisons(seed, **settings))
        if kernel.slow():  # all of them take many minutes: others first with another seed
            every = [every[i] for i in np.random.default_rng([seed, number]).permutation(len(every))]
        for poison in every:
            if kernel.slow() and part.checked and clock.over():
                break
            moved = replace(poison, case=poison.case.to(device))
            with quiet():
                try:
                    wrong = list(examine(moved, counts))
                except Exception as error:
                    wrong = [f"{type(error).__name__}: {error}"]
            part.checked += 8
            for what in wrong:
                part.fail(f"{settings}, {poison.name}: {what}")
        clock.tell(f"not numbers, {settings}")
    part.figures["outcomes"] = dict(sorted(counts.items()))
    part.seconds = clock.spent
    return part
