"""The random part of the laboratory: what it draws, that it finds breaches and says how to see them again; and its oracle."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from conftest import assert_same
from torch import Tensor

from hf_certkv import bounds
from hf_certkv.cache import CertifiedQuantizedCache
from hf_certkv.handle import Handle
from hf_certkv.store import HotSlots
from hf_certkv.verify import fuzz, generate
from hf_certkv.verify.cases import BEYOND, BITS, MASKS, REGIMES, Case, call_on, judge, problems
from hf_certkv.verify.generate import BLOCK_SIZES, VALUE_GROUPS, Story, random_story, seeded, walk
from hf_certkv.verify.oracle import FIRST_BITS, decided, exact_outputs, first_bits, flint
from hf_certkv.verify.parts import Clock

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many() -> list[Story]:
    """The first stories of a seed, drawn and not told."""
    return [random_story(seeded(1, index)) for index in range(1200)]


COVERED: dict[str, tuple[Callable[[Story], Any], set[Any]]] = {
    "value bits": (lambda s: s.settings["value_bits"], {4, 8}),
    "block size": (lambda s: s.settings["block_size"], set(BLOCK_SIZES)),
    "value group": (lambda s: s.settings["value_group"], set(VALUE_GROUPS)),
    "plane": (lambda s: s.settings["refine"], {"device", "host", "off"}),
    "format": (
        lambda s: (s.settings["value_bits"], s.settings["block_size"], s.settings["refine"]),
        {(bits, block, refine) for bits in (4, 8) for block in (16, 32, 64, 128) for refine in ("device", "host", "off")},
    ),
    "policy": (lambda s: s.settings["policy"], {"budget", "paper", "naive"}),
    "scope": (lambda s: s.settings["scope"], {"head", "layer"}),
    "sinks blocks": (lambda s: s.settings["sink_blocks"], {0, 1, 2}),
    "recent window": (lambda s: s.settings["recent_window"], {0, 1, 7, 32}),
    "hot blocks": (lambda s: s.settings["hot_blocks"], {0, 1, 4}),
    "audit": (lambda s: s.settings["audit"], {False, True}),
    "rtol": (lambda s: s.settings["rtol"] == 0, {False, True}),
    "atol": (lambda s: s.settings["atol"] == 0, {False, True}),
    "dtype": (lambda s: s.keys.dtype, set(BITS)),
    "regime": (lambda s: s.regime, {*REGIMES, *BEYOND}),
    "mask": (lambda s: s.mask, set(MASKS)),
    "KV heads": (lambda s: s.keys.shape[1], {1, 2, 3, 4}),
    "query heads a KV head": (lambda s: s.calls[0].case.query.shape[1] // s.keys.shape[1], {1, 2, 4, 8}),
    "positions": (lambda s: s.calls[0].case.query.shape[2], set(range(1, 17))),
    "batch": (lambda s: s.keys.shape[0], {1, 2, 3, 4}),
    "packed": (lambda s: s.packed, {False, True}),
    "calls": (lambda s: len(s.calls), {1, 2, 3, 6}),
    "widths differ": (lambda s: s.keys.shape[3] != s.values.shape[3], {False, True}),
    "softcap": (lambda s: s.calls[0].case.softcap, {None, 0.7, 5.0, 50.0}),
    "sink logits": (lambda s: s.calls[0].case.sinks is not None, {False, True}),
    "scale": (lambda s: s.calls[0].case.scale, {None, 1.0, 0.1, 1 / 3, -0.25}),
    "crop": (lambda s: any(call.crop for call in s.calls), {False, True}),
    "reorder": (lambda s: any(call.order for call in s.calls), {False, True}),
    "rows twice": (lambda s: any(call.order and len(set(call.order)) < len(call.order) for call in s.calls), {False, True}),
}


@pytest.mark.parametrize("name", COVERED)
def test_everything_is_drawn(name: str, many: list[Story]) -> None:
    feature, wanted = COVERED[name]
    assert {feature(story) for story in many} >= wanted


def test_blocks_are_finished_and_unfinished_at_every_place(many: list[Story]) -> None:
    """Partial blocks of every length, and caches that cross a block's end between two calls."""
    rest = {story.keys.shape[2] % 16 for story in many if story.settings["block_size"] == 16}
    assert rest == set(range(16))
    grown = [sum(call.case.query.shape[2] for call in story.calls[1:]) / story.settings["block_size"] for story in many]
    assert sum(blocks >= 1 for blocks in grown) > 25


def test_a_story_is_what_its_seed_and_index_say() -> None:
    first, again, other = fuzz.reproduce(3, 7), fuzz.reproduce(3, 7), fuzz.reproduce(3, 8)
    assert first.settings == again.settings and torch.equal(first.keys, again.keys)
    for one, two in zip(first.calls, again.calls, strict=True):
        assert torch.equal(one.case.query, two.case.query) and (one.crop, one.order) == (two.crop, two.order)
    assert first.settings != other.settings


def test_a_story_keeps_the_originals_of_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the oracle is given is what the cache says it holds, through crops and reorders."""
    held: list[list[Tensor]] = []

    def watched(case: Case, *parts: Tensor) -> Tensor:
        held.append([part.materialise() if isinstance(part, Handle) else part for part in parts])
        return call_on(case, *parts)

    monkeypatch.setattr(generate, "call_on", watched)
    cropped = reordered = 0
    for index in range(120):
        story = random_story(seeded(5, index), most=8)
        if not any(call.crop or call.order for call in story.calls):
            continue
        held.clear()
        for served in walk(story):
            assert_same([served.case.keys, served.case.values], held[-1])
            assert served.case.mask is None or served.case.mask.shape[-1] == held[-1][0].shape[2]
            cropped += story.calls[served.number].crop > 0
            reordered += story.calls[served.number].order is not None
    assert cropped > 5 and reordered > 5


def test_a_run_is_clean_reproducible_and_worth_it() -> None:
    part = fuzz.run(Clock(600.0), CPU, seed=2, head_steps=2500)
    assert part.passed, part.failures
    found = json.loads(json.dumps(part.figures, allow_nan=False))
    assert part.checked >= 2500 and found["certified_and_tight_share"] > 0.5
    assert sum(found["head_steps_by"]["rung"].values()) == part.checked
    for kind in ("format", "dtype", "policy", "regime", "mask", "call"):
        assert sum(found["head_steps_by"][kind].values()) == part.checked
    largest = found["largest_share_of_bound"]["served"]
    assert 0.5 < largest["share"] <= 1
    for served in walk(fuzz.reproduce(largest["seed"], largest["index"])):
        if served.number == largest["call"]:
            verdict = judge(served.case, served.output, served.record, served.config)
            place = (largest["batch_row"], largest["query_head"], largest["position"])
            assert verdict.shares[place] == largest["share"]


def test_several_processes_find_what_one_finds() -> None:
    alone = fuzz.run(Clock(600.0), CPU, seed=4, head_steps=600)
    shared = fuzz.run(Clock(600.0), CPU, seed=4, head_steps=600, workers=2)
    assert alone.figures == shared.figures and alone.checked == shared.checked > 0


def test_a_clock_that_is_over_leaves_the_least_amount_of_work() -> None:
    told: list[str] = []
    part = fuzz.run(Clock(0.0, lambda share, text: told.append(text)), CPU, seed=6)
    assert part.figures["stories"] == fuzz.CHUNK and part.checked > 0 and len(told) == 1


def test_a_breach_is_found_again_by_its_seed_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that leaves most of the value error out."""
    right = bounds.value_error
    monkeypatch.setattr(bounds, "value_error", lambda *given: 0.05 * right(*given))
    part = fuzz.run(Clock(600.0), CPU, seed=1, head_steps=500)
    assert not part.passed and part.failed == part.figures["breaches"]
    found = [re.match(r"seed 1, index (\d+)", words) for words in part.failures]
    index = int(found[0].group(1))  # type: ignore[union-attr]
    assert any(words in part.failures for words in fuzz.told(1, index, CPU).breaches)
    monkeypatch.undo()
    assert not fuzz.told(1, index, CPU).breaches


def no_reorder(patch: pytest.MonkeyPatch) -> None:
    """Batch rows are not reordered."""
    patch.setattr(CertifiedQuantizedCache, "reorder_cache", lambda *_: None)


def stale_hot(patch: pytest.MonkeyPatch) -> None:
    """Hot originals stay with the batch row they were fetched for."""
    patch.setattr(HotSlots, "selected", lambda self, _: self)


@pytest.mark.parametrize("plant", [no_reorder, stale_hot])
def test_bugs_between_calls_are_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only decodes of several calls can show these."""
    plant(monkeypatch)
    for index in range(1000):
        story = random_story(seeded(9, index), most=16)
        between = any(call.order and len(set(call.order)) > 1 for call in story.calls)
        if not between or (plant is stale_hot and not story.settings["hot_blocks"]):
            continue
        for served in walk(replace(story, settings={**story.settings, "audit": False})):
            if judge(served.case, served.output, served.record, served.config).breaches:
                return
    pytest.fail("not found")


def test_an_exception_counts_as_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise ValueError("planted")

    monkeypatch.setattr(bounds, "total", broken)
    part = fuzz.run(Clock(0.0), CPU, seed=6)
    assert not part.passed and "seed 6, index 0: ValueError: planted" in part.failures


def by_mpmath(case: Case, row: Tensor, bias: Tensor | None, sink: float | None) -> list[mpmath.mpf]:
    """One output of batch row 0 and KV head 0 from the definition, at 400 digits."""
    with mpmath.workdps(400):
        tau = mpmath.mpf(case.scale or 0.5)
        weights = [] if sink is None else [mpmath.exp(mpmath.mpf(sink))]
        summed = [mpmath.mpf(0)] * case.values.shape[3]
        for t in range(case.keys.shape[2]):
            pairs = zip(row.double().tolist(), case.keys[0, 0, t].double().tolist(), strict=True)
            score = tau * mpmath.fsum(mpmath.mpf(a) * mpmath.mpf(b) for a, b in pairs)
            if case.softcap is not None:
                score = case.softcap * mpmath.tanh(score / case.softcap)
            b = 0.0 if bias is None else float(bias[t])
            if b == -math.inf:
                continue
            weights.append(mpmath.exp(score + mpmath.mpf(b)))
            values = case.values[0, 0, t].double().tolist()
            summed = [s + weights[-1] * mpmath.mpf(x) for s, x in zip(summed, values, strict=True)]
        return [s / mpmath.fsum(weights) for s in summed]


@pytest.mark.parametrize("size", [1.0, 1e4, 1e30])
@pytest.mark.parametrize(("softcap", "sinks", "masked"), [(None, False, False), (5.0, True, True), (None, True, True)])
def test_the_oracle_contains_what_mpmath_says(size: float, softcap: float | None, sinks: bool, masked: bool) -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, n, 4, generator=g) for n in (2, 9, 9))
    mask = torch.randn(1, 1, 2, 9, generator=g) if masked else None
    if mask is not None:
        mask[0, 0, 0, 2:5], mask[0, 0, 1, 3] = -math.inf, -1e9
    logits = torch.tensor([0.7]) if sinks else None
    case = Case(q * size, k, v, mask, None if size == 1 else 0.3, softcap, logits)
    ((_, problem),) = problems(case)
    before = flint.ctx.prec
    try:
        for bits in (first_bits(problem), 700):
            flint.ctx.prec = bits
            for place, balls in enumerate(exact_outputs(problem)):
                bias = None if mask is None else mask[0, 0, place]
                wanted = by_mpmath(case, q[0, 0, place] * size, bias, None if logits is None else float(logits[0]))
                assert balls is not None
                for ball, exact in zip(balls, wanted, strict=True):
                    near = flint.arb(mpmath.nstr(exact, 300))  # more digits than 700 bits have
                    assert ball.overlaps(near) and bool(ball.rad() < 2.0 ** (20 - FIRST_BITS))
    finally:
        flint.ctx.prec = before


def test_a_row_that_attends_nothing_has_no_exact_output() -> None:
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    mask = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    mask[0, 0, 1] = False
    ((_, problem),) = problems(Case(q, k, v, mask))
    assert [row is None for row in exact_outputs(problem)] == [False, True]


def test_an_undecided_comparison_is_asked_again_with_more_bits() -> None:
    asked: list[int] = []

    def question() -> list[bool | None]:
        asked.append(flint.ctx.prec)
        return [True, None if len(asked) < 3 else False]

    assert decided(question, 100) == [True, False]
    assert asked == [100, 200, 400]
    with pytest.raises(ArithmeticError, match="still open"):
        decided(lambda: [None])
