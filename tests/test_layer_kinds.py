"""Certified layers of sliding and chunked attention, and of attention beside linear attention, against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import (
    assert_certified,
    assert_same,
    assert_same_generation,
    generate,
    layer_state,
    prompt,
    random_states,
    shared_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, FalconH1Config, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer

from hf_certkv import CacheStateError, CertifiedQuantizedCache, CertKVConfig
from hf_certkv.handle import Handle
from hf_certkv.layer_kinds import CertifiedHybridLayer, CertifiedSlidingLayer
from hf_certkv.store import BlockStore

SMALL = CertKVConfig(block_size=16, recent_window=16, exact_below=0, certify_sliding=True)


def sliding_cache(window: int, **changes: Any) -> tuple[CertifiedQuantizedCache, CertifiedSlidingLayer]:
    """A cache of one sliding layer."""
    config = MistralConfig(num_hidden_layers=1, sliding_window=window)
    cache = CertifiedQuantizedCache(config, settings=SMALL.replace(**changes))
    (layer,) = cache.layers
    assert isinstance(layer, CertifiedSlidingLayer)
    return cache, layer


def plain(x: Tensor) -> Tensor:
    return x.materialise() if isinstance(x, Handle) else x


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([2, 5, 16, 48, 100]),
    steps=st.lists(st.tuples(st.sampled_from([1, 1, 1, 3, 17, 70]), st.integers(0, 3)), min_size=1, max_size=25),
)
def test_it_shows_what_transformers_would_hold(window: int, steps: list[tuple[int, int]]) -> None:
    """Updates of any size, each followed by a crop of drafted tokens, as in assisted decoding."""
    cache, layer = sliding_cache(window)
    theirs = DynamicSlidingWindowLayer(window)
    for each in (layer, theirs):
        each.activate_past_recording()
    states, at = random_states(2000, seed=window), 0
    for count, back in steps:
        assert layer.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        new = [part[:, :, at : at + count] for part in states]
        for ours, other in zip(cache.update(*new, 0), theirs.update(*new), strict=True):
            assert torch.equal(plain(ours), other)
        back = min(back, count - 1)
        cache.crop(-back)
        theirs.crop(-back)
        at += count - back
        assert cache.get_seq_length() == theirs.get_seq_length() == at
        assert layer.dropped % 16 == 0 and layer.sequence_length == at - layer.dropped
        most = max(window - 1, 1) + layer.stride + count  # the last update is given up by the next one
        assert layer.sequence_length <= most and (layer.shadow is None or layer.shadow.blocks <= most // 16)


def test_memory_does_not_grow_with_the_text() -> None:
    sizes = {}
    states = random_states(3000)
    for tokens in (600, 3000):
        cache, layer = sliding_cache(200)
        cache.update(*[part[:, :, : tokens - 40] for part in states], 0)
        for at in range(tokens - 40, tokens):
            cache.update(*[part[:, :, at : at + 1] for part in states], 0)
        sizes[tokens] = sum(layer.nbytes().values())
    assert sizes[3000] <= 1.3 * sizes[600]


@pytest.mark.parametrize("where", ["slide", "append"])
def test_an_update_that_fails_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, layer = sliding_cache(48)
    states = random_states(400)
    at = 300
    cache.update(*[part[:, :, :at] for part in states], 0)
    while layer.start_of(at) == layer.dropped:
        cache.update(*[part[:, :, at : at + 1] for part in states], 0)
        at += 1
    before, place = layer_state(layer), (layer.dropped, layer.hidden, layer.get_seq_length())
    append, calls = BlockStore.append, []

    def fail(self: BlockStore, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if where == "slide" else 2):
            raise MemoryError("planted")
        return append(self, *args)

    monkeypatch.setattr(BlockStore, "append", fail)
    new = [part[:, :, at : at + 20] for part in states]
    with pytest.raises(MemoryError, match="planted"):
        cache.update(*new, 0)
    assert (layer.dropped, layer.hidden, layer.get_seq_length()) == place
    assert_same(layer_state(layer), before)
    monkeypatch.undo()
    keys, _ = cache.update(*new, 0)
    assert torch.equal(plain(keys), states[0][:, :, at + 20 - 47 - 20 : at + 20])


def test_a_crop_into_what_was_given_up_is_refused() -> None:
    cache, layer = sliding_cache(48)
    states = random_states(400)
    cache.update(*[part[:, :, :300] for part in states], 0)
    before = layer_state(layer)
    with pytest.raises(CacheStateError, match="given up"):
        cache.crop(-120)
    assert layer.get_seq_length() == 300
    assert_same(layer_state(layer), before)
    cache.crop(-(layer.sequence_length - 47))
    cache.update(*[part[:, :, :1] for part in states], 0)


def test_rows_copies_scrub_and_reset() -> None:
    states = random_states(200, batch=3)
    cache, layer = sliding_cache(48)
    cache.update(*[part[:, :, :190] for part in states], 0)
    cache.batch_select_indices(torch.tensor([2, 0]))
    other = copy.deepcopy(cache)
    for each in (cache, other):
        shown, _ = each.update(*[part[[2, 0], :, 190:] for part in states], 0)
        assert torch.equal(plain(shown), states[0][[2, 0], :, 200 - 57 :])
        assert each.scrub().repaired == 0
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.dropped == layer.hidden == 0 and layer.get_mask_sizes(3) == (3, 0)


@pytest.mark.parametrize("kind", ["mistral_sliding", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_zero_tolerance_bit_identical_and_else_certified(kind: str, dtype: torch.dtype) -> None:
    model, ids = shared_model(kind, dtype), prompt(250)
    expected = generate(model, ids, 40, DynamicCache(config=model.config))
    exactly = CertifiedQuantizedCache(model.config, settings=SMALL, rtol=0.0)
    assert_same_generation(generate(model, ids, 40, exactly), expected)
    cache = CertifiedQuantizedCache(model.config, settings=SMALL, rtol=0.05, audit=True)
    generate(model, ids, 40, cache)
    assert len(cache.certified_layers) == len(cache.layers)
    report = cache.report().to_dict()
    assert report["overall"]["head_steps"] == len(cache.layers) * 39 * 4
    assert report["exact_head_steps"] == 0 and report["materialised_operations"] == {}
    assert report["overall"]["rungs"]["dense_layer"] < report["overall"]["head_steps"]
    assert_certified(cache)


def test_without_the_setting_sliding_layers_stay_transformers_own() -> None:
    with pytest.warns(UserWarning, match="No layer of MistralConfig"):
        cache = CertifiedQuantizedCache(MistralConfig(num_hidden_layers=1, sliding_window=96))
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer
    full = CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=1), certify_sliding=True)
    assert not isinstance(full.layers[0], CertifiedSlidingLayer)


def hybrids() -> tuple[CertifiedQuantizedCache, DynamicCache]:
    """Two caches of one layer of attention beside linear attention, with the same content."""
    config = FalconH1Config(num_hidden_layers=1)
    caches = CertifiedQuantizedCache(config, settings=SMALL), DynamicCache(config=config)
    states = random_states(100, batch=2)
    generator = torch.Generator().manual_seed(1)
    conv, recurrent = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 3, 5, generator=generator)
    for cache in caches:
        cache.update_conv_state(conv, 0)
        cache.update_recurrent_state(recurrent, 0)
        cache.update(*states, 0)
    assert isinstance(caches[0].layers[0], CertifiedHybridLayer)
    assert type(caches[1].layers[0]) is LinearAttentionAndFullAttentionLayer
    return caches


def assert_alike(ours: CertifiedQuantizedCache, theirs: DynamicCache) -> None:
    for name in ("conv_states", "recurrent_states"):
        assert torch.equal(getattr(ours.layers[0], name)[0], getattr(theirs.layers[0], name)[0])
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
    assert ours.get_seq_length() == theirs.get_seq_length() and ours.is_linear == theirs.is_linear == [False]


def test_linear_states_beside_attention_follow() -> None:
    ours, theirs = hybrids()
    assert_alike(ours, theirs)
    assert ours.is_croppable == theirs.is_croppable
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([1, 0]))
    assert_alike(ours, theirs)
    copied = copy.deepcopy(ours)
    new = random_states(1, batch=2, seed=5)
    for each in (ours, theirs, copied):
        each.update_conv_state(torch.ones(2, 6, 1), 0)
        each.update_recurrent_state(torch.full((2, 3, 5), 2.0), 0)
        each.update(*new, 0)
    assert_alike(ours, theirs)
    assert_alike(copied, theirs)
    assert ours.memory().parts["exact_layers"] == (2 * 6 * 4 + 2 * 3 * 5) * 4


def test_linear_states_are_cropped_or_refuse_as_transformers_do() -> None:
    ours, theirs = hybrids()
    for cache in (ours, theirs):
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)
    assert ours.get_seq_length() == 100
    ours.reset()
    assert ours.get_seq_length() == 0 and not ours.layers[0].has_previous_state[0]
    config = FalconH1Config(num_hidden_layers=1)
    states, conv = random_states(10), torch.randn(1, 6, 4)
    made = CertifiedQuantizedCache(config, settings=SMALL), DynamicCache(config=config)
    for cache in made:
        cache.activate_past_recording()
        cache.update_conv_state(conv, 0)
        cache.update(*states, 0)
        cache.update_conv_state(torch.arange(18.0).view(1, 6, 3), 0)
        cache.update(*[part[:, :, :3] for part in states], 0)
        cache.crop(-2)
    assert torch.equal(made[0].layers[0].conv_states[0], made[1].layers[0].conv_states[0])
    assert torch.equal(made[0].layers[0].keys, made[1].layers[0].keys)
