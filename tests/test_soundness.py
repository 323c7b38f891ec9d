"""The promise end to end: every returned output against the exact oracle, without slack; and an adversary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings, target
from torch import Tensor

from hf_certkv import codecs
from hf_certkv.ladder import Rung
from hf_certkv.verify.cases import (
    BEYOND,
    BITS,
    REGIMES,
    Case,
    assert_sound,
    judge,
    run,
    tensors,
)
from hf_certkv.verify.generate import Story, random_story, walk
from hf_certkv.verify.worst_cases import (
    TIGHT,
)


@st.composite
def stories(draw: st.DrawFn, regimes: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Story:
    """A decode of any of these regimes and dtypes, of any format, policy, mask and shape: the laboratory's own list."""
    return random_story(lambda options: draw(st.sampled_from(options)), regimes, dtypes, most=40)


def assert_story_sound(story: Story) -> float:
    """Judge every call; the largest error / bound."""
    largest = 0.0
    for served in walk(story):
        verdict = judge(served.case, served.output, served.record, served.config)
        assert not verdict.breaches, verdict.breaches[:4]
        largest = max(largest, verdict.share)
    return largest


OPTIONS: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
}


@settings(max_examples=200, **OPTIONS)
@given(stories(REGIMES, tuple(BITS)))
def test_no_output_is_further_off_than_its_bound(story: Story) -> None:
    target(assert_story_sound(story))


@settings(max_examples=40, **OPTIONS)
@given(stories(BEYOND, (torch.bfloat16, torch.float32)))
def test_keys_that_no_float16_offset_can_hold(story: Story) -> None:
    assert_story_sound(story)


def one_head_overflows(scope: str, rtol: float) -> Case:
    """Values of KV head 1 near the dtype's largest number: its sums overflow, and head 0 shares a budget with it."""
    q, k, v = tensors("normal", torch.bfloat16, 81, 8, 8, 1, 1, 0)
    v[:, 1] = torch.finfo(torch.bfloat16).max * torch.where(v[:, 1] > 0, 1.0, 0.5)
    return Case(q * 0, k, v, settings={"scope": scope, "rtol": rtol})


@pytest.mark.parametrize("rtol", [1e-4, 0.3, 1.0])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_a_head_that_overflows_does_not_excuse_itself_or_others(scope: str, rtol: float) -> None:
    """An infinite norm makes an infinite budget; a bound that is not finite must not fit into it."""
    assert_sound(one_head_overflows(scope, rtol))


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("rtol", [1e-4, 1.0])
def test_audit_says_nothing_of_dense_outputs_without_a_bound(scope: str, rtol: float) -> None:
    """Scores or sums that overflow float32: the dense output is what it is, and no certificate is broken by it."""
    assert_sound(replace(one_head_overflows("head", rtol), settings={"scope": scope, "rtol": rtol, "audit": True}))
    q, k, v = tensors("normal", torch.float32, 81, 8, 8, 1, 1, 1)
    assert_sound(Case(q * 1e20, k * 1e19, v, settings={"scope": scope, "rtol": rtol, "audit": True}))


@pytest.mark.parametrize("name", TIGHT)
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_bounds_that_are_nearly_attained(name: str, scope: str) -> None:
    """Soundness where there is no room left, and that the construction does what it says."""
    case, least = TIGHT[name]
    share, record = assert_sound(replace(case, settings={**case.settings, "scope": scope, "audit": True}))
    assert share > least
    assert bool((record.rung == Rung.FAST).all())


def surrogate(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Distance between attention over the originals and over what level 0 reads, in float64, differentiable in q."""
    key, value = codecs.KeyCodec(False), codecs.ValueCodec(4, 0, False)
    with torch.no_grad():
        blocks = [part[:-1].unflatten(0, (-1, 16)) for part in (k, v)]
        coded = key.encode(blocks[0])
        k_hat = key.decode(coded.codes, None, coded.scale, coded.offset).flatten(0, 1).double()
        coded = value.encode(blocks[1])
        v_hat = value.decode(coded.codes, None, coded.scale, coded.offset, v.shape[1]).flatten(0, 1).double()
        k_hat, v_hat = torch.cat([k_hat, k[-1:].double()]), torch.cat([v_hat, v[-1:].double()])
    exact = torch.softmax(k.double() @ q + bias, dim=0) @ v.double()
    read = torch.softmax(k_hat @ q + bias, dim=0) @ v_hat
    return (exact - read).norm()


def bound_of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[float, float]:
    """The recorded bound, and the largest error / bound by the oracle."""
    case = Case(
        q.view(1, 1, 1, -1).expand(1, 2, 1, -1).contiguous(),
        k[None, None].expand(1, 2, -1, -1).contiguous(),
        v[None, None].expand(1, 2, -1, -1).contiguous(),
        bias.view(1, 1, 1, -1),
        scale=1.0,
        settings={"atol": 1e9, "value_group": 0, "refine": "off"},
    )
    output, record, cache = run(case)
    verdict = judge(case, output, record, cache.settings)
    assert not verdict.breaches, verdict.breaches
    return float(record.bound[0, 0, 0]), verdict.share


def test_an_adversary_that_climbs_does_not_reach_the_bound() -> None:
    """Gradient ascent in q and random moves in keys, values and biases, with restarts; every step is checked exactly."""
    best = 0.0
    for restart in range(5):
        g = torch.Generator().manual_seed(restart)
        channels, tokens = 4, 33
        q = torch.randn(channels, generator=g) * (1 + 3 * restart)
        k, v = torch.randn(tokens, channels, generator=g), torch.randn(tokens, 4, generator=g)
        bias = torch.zeros(tokens)
        _, share = bound_of(q, k, v, bias)
        for step in range(60):
            size = 0.5 * 0.95**step
            move = q, k, v, bias
            if step % 3 == 0:
                leaf = q.double().requires_grad_()
                (slope,) = torch.autograd.grad(surrogate(leaf, k, v, bias.double()), leaf)
                direction = (slope / slope.norm().clamp_min(1e-12)).float()
                move = (q + size * q.norm() * direction, k, v, bias)
            elif step % 3 == 1:
                where = torch.rand(tokens, 1, generator=g) < 0.3
                move = (q, k + where * size * torch.randn(k.shape, generator=g), v, bias)
            else:
                where = torch.rand(tokens, 1, generator=g) < 0.3
                towards = v[int(torch.randint(tokens, (1,), generator=g))]
                shifted = bias + 4 * size * torch.randn(tokens, generator=g)
                move = (q, k, torch.where(where, towards, v) * (1 + size * torch.randn((), generator=g)), shifted)
            _, new = bound_of(*move)
            if new > share:
                share, (q, k, v, bias) = new, move
        best = max(best, share)
    print(f"largest error / bound: {best:.4f}")
    assert 0.1 < best <= 1


@pytest.mark.parametrize("scale", [1e39, 1e30, 1e-43, 1e-46])
def test_scales_that_float32_hardly_holds(scale: float) -> None:
    """A softmax scale that overflows or vanishes in float32 makes every computed score wrong; the true ones are ordinary."""
    _, _, v = tensors("normal", torch.float32, 81, 8, 8, 1, 1, 0)
    size = (0.1 / scale) ** 0.5
    q, k = torch.full((1, 4, 1, 8), size), torch.full((1, 2, 81, 8), -size)
    assert_sound(Case(q, k, v, scale=scale, sinks=torch.full((4,), -12.0), settings={"rtol": 0.05, "atol": 0.01}))
