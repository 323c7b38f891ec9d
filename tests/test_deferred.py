"""Attention scores that have not been computed behave as tensors do: writes, views, aliases, autocast, inference mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BareCache, random_states
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

from hf_certkv import GradientError, InputError

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 401, 64
exact_is_said = pytest.mark.filterwarnings("ignore:hf_certkv. .* is computed on the exact originals:UserWarning")
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
Steps = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def run(steps: Steps, mode: Callable[[], AbstractContextManager[Any]] = torch.no_grad, **settings: Any) -> Any:
    """What the steps give on handles, on plain tensors, and the cache. Arguments: query, keys, values, mask."""
    states = random_states(TOKENS, batch=BATCH)
    bare = BareCache(**{"rtol": 1e-3, **settings})
    found = []
    with mode():
        bare.update(states[0][:, :, :-1], states[1][:, :, :-1])
        handles = bare.update(states[0][:, :, -1:], states[1][:, :, -1:])
        for keys, values in (handles, (states[0].contiguous(), states[1].contiguous())):
            generator = torch.Generator().manual_seed(3)
            query = torch.randn(BATCH, HEADS, 1, WIDTH, generator=generator)
            mask = torch.where(torch.rand(BATCH, 1, 1, TOKENS, generator=generator) < 0.5, -1e9, 0.0)
            torch.manual_seed(5)
            found.append(steps(query, repeat_kv(keys, 2), repeat_kv(values, 2), mask))
    return *found, bare.cache


def written(change: Callable[[Tensor, Tensor], Any]) -> Steps:
    """Attention with a change of the scores in between, by what is done to them and not by what it returns."""

    def steps(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = (q @ k.mT) * 0.3
        change(scores, m)
        return torch.softmax(scores, -1) @ v

    return steps


def each_row(scores: Tensor, m: Tensor) -> None:
    for i in range(BATCH):
        scores[i].masked_fill_(m[i] < 0, -1e9)


def unbound(scores: Tensor, m: Tensor) -> None:
    for row in scores:
        row[..., :100] = -1e9


def clamped_then_scaled(scores: Tensor, m: Tensor) -> None:
    scores.clamp_(max=0.5)
    scores.mul_(2)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "slice filled": lambda s, m: s[..., :100].fill_(-1e9),
    "slice assigned": lambda s, m: s.__setitem__((Ellipsis, slice(0, 100)), -1e9),
    "row by row": each_row,
    "unbound": unbound,
    "narrowed": lambda s, m: s.narrow(-1, 0, 100).fill_(-1e9),
    "unsqueezed": lambda s, m: s.unsqueeze(0).mul_(3),
    "data": lambda s, m: s.data.mul_(4),
    "clamped, then scaled": clamped_then_scaled,
    "added out": lambda s, m: torch.add(s, m, out=s),
    "softmax out": lambda s, m: torch.softmax(s, -1, out=s),
    "dropped in place": lambda s, m: F.dropout(s, 0.5, training=True, inplace=True),
    "rectified in place": lambda s, m: F.relu(s, inplace=True),
    "added": lambda s, m: s.add_(m),
    "subtracted": lambda s, m: s.sub_(m),
    "index put": lambda s, m: s.index_put_((torch.tensor([0]),), torch.tensor(-1.0)),
}


@exact_is_said
@modes
@pytest.mark.parametrize("name", WRITES)
def test_writes_count(name: str, mode: Any) -> None:
    ours, theirs, _ = run(written(WRITES[name]), mode, rtol=0.0)
    assert torch.equal(ours, theirs)


@exact_is_said
def test_views_and_what_they_are_of_see_the_same() -> None:
    def steps(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = q @ k.mT
        scores.clamp_(max=0.5)
        view = scores[..., :3]
        scores.mul_(2)
        view.add_(1)
        return torch.cat([view.flatten(), scores.flatten()])

    ours, theirs, _ = run(steps)
    assert torch.equal(ours, theirs)


@exact_is_said
def test_another_lazy_view_is_refused_after_a_write_to_a_plain_one() -> None:
    def steps(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = q @ k.mT
        flat = scores.view(BATCH * HEADS, 1, TOKENS)
        scores[..., :9].fill_(0.0)
        return torch.softmax(flat, -1)

    with pytest.raises(InputError, match="through a view"):
        run(steps)


LATER: dict[str, Steps] = {}


def later(function: Steps) -> Steps:
    LATER[function.__name__] = function
    return function


@later
def query_changed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = (q @ k.mT) * 0.125
    q.mul_(3).add_(1)
    return torch.softmax(scores, -1) @ v


@later
def mask_changed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = (q @ k.mT) * 0.125 + m
    m.zero_()
    return torch.softmax(scores, -1) @ v


@later
def sinks_changed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    sinks = torch.ones(1, HEADS, 1, 1).expand(BATCH, -1, -1, -1)
    scores = torch.cat([q @ k.mT * 0.125, sinks], -1)
    sinks[0].zero_()
    return torch.softmax(scores, -1)[..., :-1] @ v


@later
def condition_changed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    hidden = m < 0
    scores = (q @ k.mT * 0.125).masked_fill(hidden, -1e9)
    hidden.zero_()
    return torch.softmax(scores, -1) @ v


@modes
@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("rtol", [0.0, 0.02])
def test_what_was_given_may_change_later(name: str, rtol: float, mode: Any) -> None:
    ours, theirs, cache = run(LATER[name], mode, rtol=rtol, audit=True)
    if rtol == 0:
        assert torch.equal(ours, theirs)
    off = torch.linalg.vector_norm(ours - theirs, dim=-1) / torch.linalg.vector_norm(theirs, dim=-1)
    assert float(off.max()) <= rtol * 1.01
    assert cache.report().to_dict()["overall"]["head_steps"] == (0 if rtol == 0 else BATCH * HEADS)


def shifted(scores: Tensor) -> Tensor:
    return scores - scores.max(-1, keepdim=True).values


def beside(scores: Tensor) -> Tensor:
    """With a column of sink logits."""
    return torch.cat([scores, torch.full((1, HEADS, 1, 1), 3.0).expand(BATCH, -1, -1, -1)], -1)


ALGEBRA: dict[str, Steps] = {
    "sinks scaled": lambda q, k, v, m: torch.softmax(beside(q @ k.mT) * 0.1, -1)[..., :-1] @ v,
    "sinks capped": lambda q, k, v, m: torch.softmax(torch.tanh(beside(q @ k.mT)), -1)[..., :-1] @ v,
    "sinks after the shift": lambda q, k, v, m: torch.softmax(beside(shifted(q @ k.mT)), -1)[..., :-1] @ v,
    "sinks floored": lambda q, k, v, m: torch.softmax(torch.max(beside(q @ k.mT), torch.tensor(-6e4)), -1)[..., :-1] @ v,
    "sinks left in": lambda q, k, v, m: torch.softmax(beside(q @ k.mT), -1)[..., 1:] @ v,
    "capped after the shift": lambda q, k, v, m: torch.softmax(5 * torch.tanh(shifted(q @ k.mT) / 5), -1) @ v,
    "floored, then scaled": lambda q, k, v, m: torch.softmax(torch.max(q @ k.mT + m, torch.tensor(-6e4)) * 1e-5, -1) @ v,
    "filled, then scaled": lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m < 0, -6e4) * 1e-5, -1) @ v,
    "masked, then lifted": lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m < 0, -1e9) + m.abs(), -1) @ v,
    "halved scores": lambda q, k, v, m: torch.softmax(((q @ k.mT) * 0.1).half().float(), -1) @ v,
    "coarse scores": lambda q, k, v, m: torch.softmax((q @ k.mT).to(torch.float8_e5m2).float(), -1) @ v,
    "coarse weights": lambda q, k, v, m: torch.softmax(q @ k.mT, -1).to(torch.float8_e5m2).float() @ v,
    "coarse keys": lambda q, k, v, m: torch.softmax(q @ k.to(torch.float8_e5m2).float().mT, -1) @ v,
    "softmax out of place": lambda q, k, v, m: torch.softmax(q @ k.mT, -1, out=torch.empty(BATCH, HEADS, 1, TOKENS)) @ v,
    "bits of keys": lambda q, k, v, m: k.view(torch.int32),
}  # fmt: skip


@exact_is_said
@pytest.mark.parametrize("name", ALGEBRA)
def test_what_means_something_else_is_carried_out(name: str) -> None:
    ours, theirs, cache = run(ALGEBRA[name], rtol=0.3)
    assert torch.equal(ours, theirs)
    assert cache.report().to_dict()["overall"]["head_steps"] == 0


@exact_is_said
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_autocast_is_that_of_each_step(inner: bool, outer: bool) -> None:
    def steps(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            with torch.autocast("cpu", torch.bfloat16, enabled=inner):
                scores = q @ k.mT
            return torch.softmax(scores * 0.1 + m, -1) @ v

    ours, theirs, _ = run(steps, rtol=0.0)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_bias_that_requires_a_gradient_is_refused() -> None:
    def steps(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.softmax(q @ k.mT + m.requires_grad_(), -1) @ v

    with pytest.raises(GradientError, match="mask"):
        run(steps)
