"""The metamorphic relations hold; and each finds a bug that it is there for, often a sound one that nothing else shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_certkv import bounds, codecs, inputs, ladder, store
from hf_certkv.kernels import reference
from hf_certkv.verify import relations
from hf_certkv.verify.draws import Draw
from hf_certkv.verify.generate import seeded
from hf_certkv.verify.kernel import using
from hf_certkv.verify.parts import Clock
from hf_certkv.verify.relations import RELATIONS, SKIPPED
from hf_certkv.verify.same import apart, identical, same_exactly, serve

CPU = torch.device("cpu")


def told(name: str, draws: int) -> Iterator[list[str]]:
    """What a relation says of several draws, one after the other."""
    return (list(RELATIONS[name](Draw(seeded(1, index), CPU))) for index in range(draws))


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_hold(name: str) -> None:
    words = list(told(name, 7))
    assert [what for found in words for what in found if what != SKIPPED] == []
    assert sum(SKIPPED in found for found in words) <= 3


def test_a_run_counts_every_relation_and_says_how_to_see_a_failure_again(monkeypatch: pytest.MonkeyPatch) -> None:
    part = relations.run(Clock(0.0), CPU, seed=3)
    assert part.passed and part.checked == sum(part.figures["checked_by_relation"].values())
    assert set(part.figures["checked_by_relation"]) == set(RELATIONS)
    assert json.loads(json.dumps(part.figures, allow_nan=False)) == relations.run(Clock(0.0), CPU, seed=3).figures
    monkeypatch.setitem(RELATIONS, "batch rows permuted", lambda _: iter(["planted"]))
    broken = relations.run(Clock(0.0), CPU, seed=3)
    assert broken.failures == ["batch rows permuted, seed 3, index 0: planted"] and not broken.passed


def patched(patch: pytest.MonkeyPatch, where: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(original, *arguments)`."""
    original = getattr(where, name)
    patch.setattr(store, "COMPILED", where is not codecs and store.COMPILED)  # else it would write the blocks
    patch.setattr(where, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def order_matters(patch: pytest.MonkeyPatch) -> None:
    """The first block's mass counts twice in the bound."""

    def combine(original: Any, *args: Any) -> Any:
        made = original(*args)
        made.mass[..., 0] *= 2
        return made

    patched(patch, reference, "combine", combine)


def crude_offsets(patch: pytest.MonkeyPatch) -> None:
    """Offsets are rounded far too coarsely: sound, since everything is measured, and wasteful far from 0."""

    def coarse(original: Any, x: Tensor) -> Tensor:
        rounded = original(x)
        return (rounded.double() - 0.02 * rounded.double().abs()).half()

    patched(patch, codecs, "round_half_down", coarse)


def late_offsets(patch: pytest.MonkeyPatch) -> None:
    """Codes are computed before the offset is rounded: kappa grows with the distance from 0."""

    def codes(original: Any, x: Tensor, low: Tensor, high: Tensor, high_bits: int) -> Any:
        high_code, low_code, scale, _ = original(x - low, low - low, high - low, high_bits)
        return high_code, low_code, scale, codecs.round_half_down(low)

    patched(patch, codecs, "grid_codes", codes)


def by_call(patch: pytest.MonkeyPatch) -> None:
    """Steps are wider where several blocks are encoded at once."""

    def codes(original: Any, x: Tensor, low: Tensor, high: Tensor, high_bits: int) -> Any:
        return original(x, low, high + (0.1 if x.shape[2] > 1 else 0.0), high_bits)

    patched(patch, codecs, "grid_codes", codes)


def absolute_slack(patch: pytest.MonkeyPatch) -> None:
    """An absolute constant in every value error: sound, and right for one size of values only."""
    patched(patch, bounds, "value_error", lambda original, *args: original(*args) + 1e-3)


def absolute_norm(patch: pytest.MonkeyPatch) -> None:
    """As much in the largest norm of keys."""
    patched(patch, bounds, "score_rounding", lambda original, tau, q, k, *args: original(tau, q, k + 1e-3, *args))


def row_matters(patch: pytest.MonkeyPatch) -> None:
    """The first row of a KV head has ten times its rounding of scores."""

    def slack(original: Any, error: Tensor, times: int) -> Tensor:
        return original(error * (1 + 9.0 * (torch.arange(error.shape[-1]) == 0)), times)

    patched(patch, bounds, "weight_slack", slack)


def batch_matters(patch: pytest.MonkeyPatch) -> None:
    """The first batch row counts all value errors twice."""

    def twice(original: Any, *args: Any) -> Tensor:
        made = original(*args)
        made[0] *= 2
        return made

    patched(patch, bounds, "value_error", twice)


def no_mask(patch: pytest.MonkeyPatch) -> None:
    """The mask is not looked at."""
    patched(patch, inputs, "row_bias", lambda original, mask, *args: original(None, *args))


def generous(patch: pytest.MonkeyPatch) -> None:
    """Budgets are thrice what was asked for."""
    patched(patch, ladder, "head_budget", lambda original, rtol, atol, norm: 3 * original(rtol, atol, norm))


def small_values(patch: pytest.MonkeyPatch) -> None:
    """Most of the error of values is forgotten."""
    patched(patch, bounds, "value_error", lambda original, *args: 0.02 * original(*args))


PLANTED: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("whole blocks permuted", order_matters),
    ("a constant added to keys", crude_offsets),
    ("a constant added to keys", late_offsets),
    ("a constant added to values", small_values),
    ("every token twice", small_values),
    ("masked blocks added", no_mask),
    ("query times 2^j, keys by 2^-j", absolute_norm),
    ("values times 2^j", absolute_slack),
    ("tolerance tightened", generous),
    ("query heads permuted", row_matters),
    ("batch rows permuted", batch_matters),
    ("prefill in chunks", by_call),
    ("cropped and appended again", by_call),
]


@pytest.mark.parametrize(("name", "plant"), PLANTED)
def test_each_relation_finds_a_bug(
    name: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with using("reference"):  # compiled code has none of them
        assert any(what != SKIPPED for found in told(name, 8) for what in found)


def test_on_a_cpu_pieces_and_crops_leave_the_same_bits() -> None:
    """More than a relation asks for: products of one block do not depend on how many blocks are encoded with it."""
    for index in range(6):
        draw = Draw(seeded(7, index), CPU)
        case = draw.case(fast=index % 2 == 0)
        one = serve(case, CPU)
        for two in (serve(case, CPU, chunk=5 + index), serve(case, CPU, again=18 + index)):
            assert list(identical(one, two)) == []
            assert torch.equal(one.keys.numbers, two.keys.numbers) and torch.equal(one.values.numbers, two.values.numbers)


def test_what_is_further_apart_than_rounding_is_seen() -> None:
    draw = Draw(seeded(1), CPU)
    seen = serve(draw.case(dtypes=(torch.float32,)), CPU)
    assert list(apart(seen, seen)) == [] and list(identical(seen, seen)) == []
    further = replace(seen, output=seen.output + 3 * seen.fixed.unsqueeze(-1).float())
    assert list(apart(seen, further)) and list(identical(seen, further))
    for factor in (0.9, 1.1):
        other = replace(seen, bound=seen.bound * factor)
        assert list(apart(seen, other)) and list(identical(seen, other)) == ["bounds differ"]
    assert list(identical(seen, replace(seen, rungs=seen.rungs + 1))) == ["rungs differ"]


def test_exact_outputs_that_differ_are_seen() -> None:
    case = Draw(seeded(2), CPU).case(dtypes=(torch.float32,))
    assert list(same_exactly(case, case)) == []
    values = case.values.clone()
    values[-1, -1, 3] *= 1 + 2.0**-20
    assert "exact outputs differ" in list(same_exactly(case, replace(case, values=values)))
