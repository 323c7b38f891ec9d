"""Attention written out step by step, as models do it, is certified; whatever is no step of it is carried out exactly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BareCache, random_states
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv

from hf_certkv import InputError, StaleHandleError
from hf_certkv.deferred import Deferred

BATCH, HEADS, GROUPS, TOKENS, WIDTH = 2, 2, 2, 401, 64
QUERY_HEADS = HEADS * GROUPS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Inputs:
    """A cache, its handles, what they stand for, a query, and masks that leave every row its newest tokens."""

    def __init__(self, dtype: torch.dtype = torch.float32, positions: int = 1, **settings: Any) -> None:
        states = random_states(TOKENS, batch=BATCH, dtype=dtype)
        self.bare = BareCache(**{"audit": True, "rtol": 0.05, "certify_queries": 4, **settings})
        self.bare.update(states[0][:, :, :-1], states[1][:, :, :-1])
        self.keys, self.values = self.bare.update(states[0][:, :, -1:], states[1][:, :, -1:])
        self.plain = (states[0].contiguous(), states[1].contiguous())
        generator = torch.Generator().manual_seed(7)
        self.query = torch.randn(BATCH, QUERY_HEADS, positions, WIDTH, generator=generator).to(dtype)
        hidden = torch.rand(BATCH, 1, positions, TOKENS, generator=generator) < 0.2
        self.hidden = hidden & (torch.arange(TOKENS) < TOKENS - 3)
        self.mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(self.hidden, torch.finfo(dtype).min)
        self.position_bias = torch.randn(QUERY_HEADS, positions, TOKENS, generator=generator).to(dtype)

    def both(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Keys and values with a head for each query head: handles, and plain ones."""
        return tuple(tuple(repeat_kv(part, GROUPS) for part in pair) for pair in ((self.keys, self.values), self.plain))  # type: ignore[return-value]

    def widened(self) -> tuple[Tensor, Tensor, Inputs]:
        """Plain keys and values, and the rest, in float64: for the exact result."""
        other = object.__new__(Inputs)
        other.query, other.hidden, other.position_bias = self.query.double(), self.hidden, self.position_bias.double()
        other.mask = self.mask.double()
        keys, values = (repeat_kv(part, GROUPS).double() for part in self.plain)
        return keys, values, other

    @property
    def head_steps(self) -> int:
        return int(self.bare.cache.report().to_dict()["overall"]["head_steps"])

    @property
    def materialised(self) -> dict[str, int]:
        return dict(self.bare.cache.recorder.materialised)


def eager(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """transformers' eager_attention_forward."""
    scores = torch.matmul(x.query, keys.transpose(2, 3)) * WIDTH**-0.5
    scores = scores + x.mask
    wide = torch.float64 if x.query.dtype == torch.float64 else torch.float32
    weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(x.query.dtype)
    weights = nn.functional.dropout(weights, p=0.3, training=False)
    return torch.matmul(weights, values)


def capped(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """With a softcap, as Gemma 2."""
    scores = (x.query @ keys.mT) * 0.3
    scores = torch.tanh(scores / 2.5) * 2.5
    return torch.softmax(scores + x.mask, -1) @ values


def widened_first(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """Query and keys in float32, the scale a tensor, as GPT-J; the mask before the scale, as CodeGen."""
    wide = torch.float64 if x.query.dtype == torch.float64 else torch.float32
    scores = torch.matmul(x.query.to(wide), keys.to(wide).transpose(-1, -2))
    scores = (scores + x.mask) / torch.tensor(8.0)
    weights = nn.Softmax(dim=-1)(scores).to(values.dtype)
    return torch.matmul(nn.Dropout(0.1).eval()(weights), values)


def where_masked(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """As GPT-Neo: without a scale."""
    scores = torch.matmul(x.query * 0.25, keys.transpose(-1, -2))
    lowest = torch.full((), torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return torch.matmul(F.softmax(torch.where(~x.hidden, scores, lowest), dim=-1).to(values.dtype), values)


def filled(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """As MPT: a position bias, then masked_fill."""
    scores = torch.matmul(x.query, keys.transpose(-1, -2)) * 0.1
    scores = scores + x.position_bias
    scores = scores.masked_fill(x.hidden, torch.finfo(x.query.dtype).min)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return torch.matmul(F.softmax(wide, dim=-1).to(values.dtype), values)


def filled_twice(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """As CPM-Ant: masked before softmax and after it."""
    scores = torch.matmul(x.query, keys.transpose(-1, -2)) / math.sqrt(WIDTH)
    scores = torch.masked_fill(scores, x.hidden == torch.tensor(True), torch.scalar_tensor(-torch.inf, dtype=scores.dtype))
    weights = nn.Softmax(-1)(scores)
    weights = torch.masked_fill(weights, x.hidden == torch.tensor(True), torch.scalar_tensor(0, dtype=scores.dtype))
    return torch.matmul(weights, values)


def flat_bmm(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """As XGLM: batch and heads one axis, the mask added in between, a floor."""
    shape = (BATCH * QUERY_HEADS, -1, WIDTH)
    query, keys, values = (x.query * WIDTH**-0.5).reshape(*shape), keys.reshape(*shape), values.reshape(*shape)
    scores = torch.bmm(query, keys.transpose(1, 2))
    assert scores.size() == (BATCH * QUERY_HEADS, x.query.shape[2], TOKENS)
    scores = scores.view(BATCH, QUERY_HEADS, -1, TOKENS) + x.mask
    scores = torch.max(scores, torch.full((), torch.finfo(scores.dtype).min, dtype=scores.dtype))
    weights = F.softmax(scores.view(BATCH * QUERY_HEADS, -1, TOKENS), dim=-1)
    return torch.bmm(weights, values).view(BATCH, QUERY_HEADS, -1, WIDTH)


def added_product(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """As BLOOM: a position bias within baddbmm."""
    shape = (BATCH * QUERY_HEADS, -1, WIDTH)
    bias = x.position_bias.repeat(BATCH, 1, 1)
    scores = bias.baddbmm(
        batch1=x.query.reshape(*shape), batch2=keys.reshape(*shape).transpose(-1, -2), beta=0.7, alpha=WIDTH**-0.5
    )
    scores = scores.view(BATCH, QUERY_HEADS, -1, TOKENS) + x.mask
    weights = F.softmax(scores, dim=-1).to(values.dtype)
    return torch.bmm(weights.view(BATCH * QUERY_HEADS, -1, TOKENS), values.reshape(*shape)).view(BATCH, QUERY_HEADS, -1, WIDTH)


def in_place(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """Each step into the same tensor."""
    scores = x.query @ keys.transpose(-2, -1)
    scores *= 0.25
    scores.div_(2)
    scores += x.mask
    scores.masked_fill_(x.hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=3) @ values


def with_sinks(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """As gpt-oss: a logit a head that attends to nothing, and the largest score taken off."""
    scores = torch.matmul(x.query, keys.transpose(2, 3)) * WIDTH**-0.5 + x.mask
    logits = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=x.query.dtype)
    sinks = logits.reshape(1, -1, 1, 1).expand(x.query.shape[0], -1, x.query.shape[-2], -1)
    scores = torch.cat([scores, sinks], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    weights = F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, p=0.1, training=False).to(values.dtype), values)


PATTERNS = [eager, capped, widened_first, where_masked, filled, filled_twice, flat_bmm, added_product, in_place, with_sinks]
by_name = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
Pattern = Callable[[Inputs, Tensor, Tensor], Tensor]


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [1, 3])
def test_certified_within_its_bound(pattern: Pattern, dtype: torch.dtype, positions: int) -> None:
    x = Inputs(dtype, positions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = pattern(x, *x.both()[0])
    expected = pattern(x, *x.both()[1])
    assert type(actual) is Tensor and (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    report = x.bare.cache.report().to_dict()
    assert x.head_steps == BATCH * QUERY_HEADS * positions and x.materialised == {} and report["exact_head_steps"] == 0
    keys, values, wide = x.widened()
    exact = pattern(wide, keys, values)
    off = torch.linalg.vector_norm(actual.double() - exact, dim=-1) / torch.linalg.vector_norm(actual.double(), dim=-1)
    assert not torch.equal(actual, expected)
    assert 0 < float(off.max()) <= report["overall"]["relative"]["bound"]["max"] <= 0.05
    assert float(off.max()) == pytest.approx(report["overall"]["relative"]["error"]["max"], rel=1e-3)


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_tolerance_is_what_the_model_wrote(pattern: Pattern, dtype: torch.dtype) -> None:
    x = Inputs(dtype, rtol=0.0)
    assert torch.equal(pattern(x, *x.both()[0]), pattern(x, *x.both()[1]))
    assert x.head_steps == 0 and x.bare.cache.report().to_dict()["exact_head_steps"] == BATCH * QUERY_HEADS


@by_name
def test_many_queries_are_exact(pattern: Pattern) -> None:
    x = Inputs(positions=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pattern(x, *x.both()[0]), pattern(x, *x.both()[1]))
    assert x.head_steps == 0 and x.bare.cache.report().to_dict()["exact_head_steps"] == BATCH * QUERY_HEADS * 5


UNKNOWN: dict[str, Callable[[Inputs, Tensor, Tensor], Any]] = {
    "minus a mask": lambda x, k, v: torch.softmax(x.query @ k.mT - x.mask.abs(), -1) @ v,
    "negative scale": lambda x, k, v: torch.softmax((x.query @ k.mT) * -0.5, -1) @ v,
    "scale by head": lambda x, k, v: torch.softmax((x.query @ k.mT) * torch.rand(QUERY_HEADS, 1, 1), -1) @ v,
    "a number added": lambda x, k, v: torch.softmax(x.query @ k.mT + 3.0, -1) @ v,
    "softmax over queries": lambda x, k, v: torch.softmax(x.query @ k.mT, -2) @ v,
    "no softmax": lambda x, k, v: (x.query @ k.mT) @ v,
    "softmax twice": lambda x, k, v: torch.softmax(torch.softmax(x.query @ k.mT, -1), -1) @ v,
    "weights scaled": lambda x, k, v: (torch.softmax(x.query @ k.mT, -1) * 0.5) @ v,
    "weights masked": lambda x, k, v: torch.softmax(x.query @ k.mT, -1).masked_fill(x.hidden, 0.0) @ v,
    "another mask": lambda x, k, v: torch.softmax((x.query @ k.mT).masked_fill(x.hidden, -1e9), -1).masked_fill(~x.hidden, 0),
    "replaced by what weighs": lambda x, k, v: torch.softmax((x.query @ k.mT).masked_fill(x.hidden, -1.0), -1) @ v,
    "a row without tokens": lambda x, k, v: torch.softmax((x.query @ k.mT).masked_fill(x.mask < 1, -1e9), -1) @ v,
    "tanh after a bias": lambda x, k, v: torch.softmax(torch.tanh(x.query @ k.mT + x.mask) * 3, -1) @ v,
    "tanh twice": lambda x, k, v: torch.softmax(torch.tanh(torch.tanh(x.query @ k.mT)), -1) @ v,
    "keys scaled": lambda x, k, v: torch.softmax(x.query @ (k * 0.5).mT, -1) @ v,
    "keys not transposed": lambda x, k, v: torch.softmax(torch.ones(BATCH, QUERY_HEADS, 2, TOKENS) @ k, -1),
    "values in place of keys": lambda x, k, v: torch.softmax(x.query @ v.mT, -1) @ v,
    "keys in place of values": lambda x, k, v: torch.softmax(x.query @ k.mT, -1) @ k,
    "a sink column": lambda x, k, v: torch.softmax(torch.cat([x.query @ k.mT, x.query[..., :1]], -1), -1)[..., :-1] @ v,
    "largest of another": lambda x, k, v: torch.softmax(x.query @ k.mT - (x.query @ v.mT).max(-1, keepdim=True).values, -1) @ v,
    "where the largest is": lambda x, k, v: (x.query @ k.mT).max(dim=-1, keepdim=True).indices,
    "a column of a mask": lambda x, k, v: torch.cat([x.query @ k.mT, x.mask[..., :1].expand(-1, 4, -1, -1)], -1).softmax(-1),
    "einsum": lambda x, k, v: torch.einsum("abcd,abde->abce", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", x.query, k), 3), v),
    "dropout": lambda x, k, v: F.dropout(torch.softmax(x.query @ k.mT, -1), 0.5, True) @ v,
    "scores": lambda x, k, v: (x.query @ k.mT).sum(-1),
    "weights": lambda x, k, v: torch.softmax(x.query @ k.mT, -1).amax(-1),
    "weights, sorted": lambda x, k, v: torch.softmax(x.query @ k.mT, -1).sort(-1).values,
    "log_softmax": lambda x, k, v: torch.log_softmax(x.query @ k.mT, -1),
    "float64": lambda x, k, v: torch.softmax(x.query.double() @ k.double().mT / 3, -1) @ v.double(),
    "clamped in place": lambda x, k, v: torch.softmax((x.query @ k.mT).clamp_(max=0.1), -1) @ v,
    "out of another shape": lambda x, k, v: torch.softmax((x.query @ k.mT).view(-1, 8), -1),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:hf_certkv. .* is computed on the exact originals:UserWarning")
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_step_of_attention_is_exact(name: str) -> None:
    x = Inputs()
    made = []
    for keys, values in x.both():
        torch.manual_seed(3)
        made.append(UNKNOWN[name](x, keys, values))
    assert torch.equal(made[0], made[1])
    assert x.head_steps == 0


def test_a_query_that_16_bits_do_not_hold_is_exact() -> None:
    x = Inputs(torch.bfloat16)
    keys, values = x.both()[0]
    query = x.query.float() + 2.0**-12
    found = torch.softmax(query @ keys.float().mT, -1).to(values.dtype) @ values
    expected = torch.softmax(query @ x.both()[1][0].float().mT, -1).to(values.dtype) @ x.both()[1][1]
    assert torch.equal(found, expected) and x.head_steps == 0


def test_questions_are_answered_and_copies_are_plain() -> None:
    x = Inputs()
    keys = x.both()[0][0]
    scores = x.query @ keys.transpose(2, 3)
    assert isinstance(scores, Deferred) and scores.shape == (BATCH, QUERY_HEADS, 1, TOKENS) and scores.dtype == torch.float32
    assert scores.dim() == 4 and scores.size(-1) == TOKENS and "Scores" in repr(scores) and x.materialised == {}
    with pytest.warns(UserWarning, match="`clone` on cached keys or values of layer 0"):
        assert type(scores.clone()) is Tensor


@pytest.mark.filterwarnings("ignore:hf_certkv. .* is computed on the exact originals:UserWarning")
def test_what_was_computed_before_a_write_stays() -> None:
    x = Inputs()
    made = []
    for keys, values in x.both():
        scores = x.query @ keys.mT
        doubled = scores * 2
        scores += x.mask
        made.append((scores.clone(), doubled.clone(), torch.softmax(scores, -1).clone(), values.clone()))
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:hf_certkv. .* is computed on the exact originals:UserWarning")
def test_a_write_through_a_view_is_followed_or_refused() -> None:
    x = Inputs()
    scores = x.query @ x.both()[0][0].mT
    flat = scores.view(BATCH * QUERY_HEADS, 1, TOKENS)
    flat += 1.0
    assert torch.equal(flat.clone(), (x.query @ x.both()[1][0].mT).view_as(flat) + 1.0)
    with pytest.raises(InputError, match="through a view"):
        scores.clone()


def test_the_cache_cannot_be_written_to_through_a_view() -> None:
    x = Inputs()
    for view in (x.keys.transpose(2, 3), x.keys.view(BATCH * HEADS, TOKENS, WIDTH)):
        with pytest.raises(InputError, match="would write into the cached keys"):
            view += 1.0
    assert torch.equal(x.keys.materialise(), x.plain[0])


@pytest.mark.filterwarnings("ignore:hf_certkv. .* is computed on the exact originals:UserWarning")
def test_a_cast_copy_may_be_written_to() -> None:
    x = Inputs(torch.bfloat16)
    wide, expected = x.keys.float(), x.plain[0].float()
    wide += 1.0
    assert torch.equal(wide.clone(), expected + 1.0) and torch.equal(x.keys.materialise(), x.plain[0])


def test_after_a_crop_scores_are_stale() -> None:
    x = Inputs()
    keys, values = x.both()[0]
    weights = torch.softmax(x.query @ keys.mT, -1)
    x.bare.cache.crop(-1)
    with pytest.raises(StaleHandleError, match="latest `update`"):
        weights @ values
