"""Planted bugs in codec, bound, ladder and kernel: each must show as a violation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_certkv import CertificateViolation, bounds, codecs
from hf_certkv import decode as decode_module
from hf_certkv.attention import AttentionCall
from hf_certkv.decode import DecodeStep
from hf_certkv.kernels import reference
from hf_certkv.store import BlockStore, HotSlots
from hf_certkv.verify.cases import (
    Case,
    call_on,
    examine,
    fill,
    judge,
    mask_of,
    new_cache,
    tensors,
)
from hf_certkv.verify.worst_cases import (
    clamped_keys,
    equal_values,
    exact_everything,
    offset_values,
    one_value,
    read_at_the_output,
    shifted_scores,
    two_blocks,
    unlike_heads,
    with_sink,
)

Plant = Callable[[pytest.MonkeyPatch], None]


def found_in(case: Case) -> list[str]:
    """Breaches found by the oracle, or by audit."""
    try:
        return examine(case).breaches
    except CertificateViolation as error:
        return [str(error)]


def scaled_numbers(which: type, change: Callable[[Tensor, int], Tensor]) -> Plant:
    """A codec that stores other numbers than it measured. `change(numbers, levels)` returns new ones."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = which.encode  # type: ignore[attr-defined]

        def encode(self: Any, x: Tensor) -> codecs.EncodedBlocks:
            made = original(self, x)
            return replace(made, numbers=change(made.numbers.clone(), self.levels))

        patch.setattr(which, "encode", encode)

    return plant


def relative_eta(numbers: Tensor, levels: int) -> Tensor:
    """Value errors divided by the values' norm."""
    return torch.cat([numbers[..., :-1] / numbers[..., -1:], numbers[..., -1:]], dim=-1)


def mean_eta(numbers: Tensor, levels: int) -> Tensor:
    """The mean residual where the largest is needed."""
    for level in range(levels):
        numbers[..., 3 * level] = numbers[..., 3 * level + 2]
    return numbers


def half_kappa(numbers: Tensor, levels: int) -> Tensor:
    """Half a step assumed, the L2 number left out, the spectral one what follows of it."""
    numbers[..., 0] = 0.5
    numbers[..., 1] = torch.inf
    numbers[..., 2] = 0.5 * (16 * 8) ** 0.5
    return numbers


def half_spectral(patch: pytest.MonkeyPatch) -> None:
    original = codecs.spectral_bound
    patch.setattr(codecs, "spectral_bound", lambda rows, norm: original(rows, norm) / 2)


def measured_before_rounding(patch: pytest.MonkeyPatch) -> None:
    """Codes and numbers against the scales as they were before they were rounded to 16 bits."""
    patch.setattr(codecs, "round_half_down", lambda x: x)
    patch.setattr(codecs, "round_half_up", lambda x: x)
    for which in (codecs.KeyCodec, codecs.ValueCodec):

        def encode(self: Any, x: Tensor, original: Any = which.encode) -> codecs.EncodedBlocks:
            made = original(self, x)
            return replace(made, scale=made.scale.half(), offset=made.offset.half())

        patch.setattr(which, "encode", encode)


def without_first_block(name: str) -> Plant:
    """A sum over blocks that leaves one out."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(bounds, name)

        def fewer(*args: Any) -> Tensor:
            parts = original(*args).clone()
            parts[..., 0] = 0
            return parts

        patch.setattr(bounds, name, fewer)

    return plant


def numbers_of_the_other_head(patch: pytest.MonkeyPatch) -> None:
    original = BlockStore.encoded

    def encoded(self: BlockStore) -> tuple[codecs.EncodedBlocks, codecs.EncodedBlocks]:
        keys, values = original(self)
        return replace(keys, numbers=keys.numbers.flip(1)), replace(values, numbers=values.numbers.flip(1))

    patch.setattr(BlockStore, "encoded", encoded)


def scaled_bound(name: str, factor: float) -> Plant:
    """One inequality that returns a share of what it should."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(bounds, name)
        patch.setattr(bounds, name, lambda *args, **kwargs: original(*args, **kwargs) * factor)

    return plant


def least_mass_is_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bounds, "least_mass", lambda mass, exact_mass, shift, slack: torch.ones_like(exact_mass))


def half_radius_in_the_cap(patch: pytest.MonkeyPatch) -> None:
    original = bounds.key_error_cap
    patch.setattr(bounds, "key_error_cap", lambda mass, shift, radius: original(mass, shift, radius / 2))


def radius_without_the_residual(patch: pytest.MonkeyPatch) -> None:
    original = bounds.mean_radius
    patch.setattr(bounds, "mean_radius", lambda moment, residual, *rest: original(moment, residual * 0, *rest))


def crossed_moments(patch: pytest.MonkeyPatch) -> None:
    """Squared distances from the output without what it is from zero."""
    original = reference.combine

    def combine(segments: reference.Segments, sink_logit: Tensor | None = None) -> reference.Combined:
        made = original(segments, sink_logit)
        size = made.output.double().square().sum(-1, keepdim=True)
        return replace(made, moment=made.moment - size, square_moment=made.square_moment - size)

    patch.setattr(reference, "combine", combine)


def mean_steps(patch: pytest.MonkeyPatch) -> None:
    """A block's mean step for every token."""
    patch.setattr(reference, "token_steps", lambda scale: codecs.token_steps(scale).mean(-1, True).expand(scale.shape[:-1]))


def radius_without_the_centre(patch: pytest.MonkeyPatch) -> None:
    original = bounds.total

    def total(*args: Any) -> bounds.Certificate:
        given = list(args)
        given[15] = torch.zeros_like(given[15])  # output_norm
        return original(*given)

    patch.setattr(bounds, "total", total)


def nan_passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bounds, "meets", lambda bound, budget: ~(bound > budget))


def codes_instead_of_originals(patch: pytest.MonkeyPatch) -> None:
    """Blocks counted as promoted whose originals were never fetched."""
    original = DecodeStep._load

    def load(self: DecodeStep, kind: int, index: Any, level: Tensor, before: Tensor) -> Tensor:
        return original(self, kind, index, torch.zeros_like(level), before)

    patch.setattr(DecodeStep, "_load", load)


def finer_numbers_at_the_base(patch: pytest.MonkeyPatch) -> None:
    original = DecodeStep._shift
    patch.setattr(DecodeStep, "_shift", lambda self, level: original(self, 1))


def sink_logit_ignored(patch: pytest.MonkeyPatch) -> None:
    original = reference.combine
    patch.setattr(reference, "combine", lambda segments, sink_logit=None: original(segments))


def mask_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decode_module, "split_bias", lambda bias, sink, blocks, block: (None, None))


def heads_interleaved(patch: pytest.MonkeyPatch) -> None:
    """Query head h on KV head h % kv_heads."""
    original = DecodeStep.__init__

    def init(self: DecodeStep, layer: Any, call: AttentionCall) -> None:
        order = torch.arange(call.query.shape[1]).view(-1, layer.heads).T.flatten()
        original(self, layer, replace(call, query=call.query[:, order]))
        self.call = call

    patch.setattr(DecodeStep, "__init__", init)


NAN_CASE = Case(*tensors("raw", torch.float32, 81, 8, 8, 1, 1, 3), settings={"rtol": 0.5})
NORMAL_CASE = Case(*tensors("normal", torch.float32, 90, 8, 8, 1, 1, 3), settings={"rtol": 0.5, "audit": True})
PROMOTING = equal_values(atol=0.0, rtol=1e-3, refine="off")

PLANTS: dict[str, tuple[Plant, Case]] = {
    "relative eta": (scaled_numbers(codecs.ValueCodec, relative_eta), equal_values(size=20.0)),
    "mean instead of max": (scaled_numbers(codecs.ValueCodec, mean_eta), one_value()),
    "measured before the scales are rounded": (measured_before_rounding, offset_values()),
    "kappa assumed": (scaled_numbers(codecs.KeyCodec, half_kappa), clamped_keys()),
    "a block forgotten in the value error": (without_first_block("value_error"), equal_values()),
    "a block forgotten in the key error": (without_first_block("key_error"), shifted_scores(0.1, 0.01)),
    "numbers of the other KV head": (numbers_of_the_other_head, unlike_heads()),
    "no rounding term": (scaled_bound("rounding_error", 0.0), exact_everything()),
    "no output rounding": (scaled_bound("output_rounding", 0.0), exact_everything(torch.bfloat16)),
    "NaN passes": (nan_passes, NAN_CASE),
    "promoted but not fetched": (codes_instead_of_originals, PROMOTING),
    "spectral norm halved, values": (half_spectral, equal_values()),
    "spectral norm halved, keys": (half_spectral, shifted_scores(0.1, 0.01)),
    "score shift halved": (scaled_bound("score_shift", 0.5), shifted_scores(0.1, 0.01)),
    "numbers of a finer level": (finer_numbers_at_the_base, shifted_scores(0.1, 0.01)),
    "D_min is 1": (least_mass_is_one, two_blocks(2.5, (1.0, 0.0), -3.5)),
    "cap with half the radius": (half_radius_in_the_cap, two_blocks(40.0, (1.0, -1.0), 20.0)),
    "radius without the centre": (radius_without_the_centre, shifted_scores(0.1, 0.01)),
    "radius halved": (scaled_bound("mean_radius", 0.5), shifted_scores(0.1, 0.01, centre=4.0)),
    "radius without the residual": (radius_without_the_residual, read_at_the_output(1.0, 0.05)),
    "moments half of them": (crossed_moments, shifted_scores(0.1, 0.01)),
    "mean instead of each token's step": (mean_steps, one_value()),
    "sink logit ignored": (sink_logit_ignored, with_sink()),
    "mask ignored": (mask_ignored, replace(NORMAL_CASE, mask=mask_of("bool", torch.float32, 1, 1, 90, 1))),
    "heads interleaved": (heads_interleaved, NORMAL_CASE),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, case = PLANTS[name]
    assert not found_in(case), "the case must be sound without the bug"
    plant(monkeypatch)
    assert found_in(case), "the planted bug was not noticed"


def refilled(case: Case, other: tuple[Tensor, Tensor]) -> list[str]:
    """Breaches of a step on a cache that held other tokens, was cropped, and was filled again."""
    cache = new_cache(case)
    first = replace(case, keys=other[0], values=other[1])
    keys, values = fill(cache, first)
    call_on(first, keys, values)
    for _ in range(2):  # what the first step promotes is hot from the next one on
        call_on(first, *cache.update(other[0][:, :, -1:], other[1][:, :, -1:], 0))
    cache.crop(-1 - case.keys.shape[2])
    cache.update(case.keys[:, :, 1:-1], case.values[:, :, 1:-1], 0)
    try:
        keys, values = cache.update(case.keys[:, :, -1:], case.values[:, :, -1:], 0)
        output = call_on(case, keys, values)
        cache.recorder.commit()
    except CertificateViolation as error:
        return [str(error)]
    return judge(case, output, cache.recorder.records[-1], cache.settings).breaches


def test_planted_numbers_that_outlive_a_crop_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = equal_values(size=50.0)
    other = (case.keys, case.values / 50)
    other[1][:, :, :1] = case.values[:, :, :1]
    assert not refilled(case, other)
    original = BlockStore.append
    kept: dict[int, Tensor] = {}

    def append(self: BlockStore, keys: Tensor, values: Tensor) -> None:
        original(self, keys, values)
        view = self.values["numbers"].view
        old = kept.setdefault(id(self), view.clone())
        view[:, :, : old.shape[2]] = old[:, :, : view.shape[2]]

    monkeypatch.setattr(BlockStore, "append", append)
    assert refilled(case, other)


def test_planted_hot_blocks_that_outlive_a_crop_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = equal_values(size=50.0, atol=0.0, rtol=1e-3, refine="off", hot_blocks=8)
    case = replace(case, keys=case.keys.clone().index_fill_(2, torch.tensor(20), 1.0))  # both kinds are raised
    other = (case.keys, -case.values)
    other[1][:, :, :1] = case.values[:, :, :1]
    assert not refilled(case, other)
    monkeypatch.setattr(HotSlots, "truncate", lambda self, blocks: None)
    assert refilled(case, other)
