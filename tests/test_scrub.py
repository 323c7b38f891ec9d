"""Checksums of quantised blocks, `cache.scrub()`, and `cache.rollback()`: what they notice, repair and report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, new_cache, prompt
from torch import Tensor
from transformers import LlamaConfig

from hf_certkv import CacheStateError, CertifiedQuantizedCache, CorruptedPageError, FaultyMemoryError
from hf_certkv.checksums import block_checksum
from hf_certkv.scrub import ScrubReport
from hf_certkv.store import BlockStore

CONFIG = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size=64)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values `[2, 2, tokens, 16]`."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, tokens, 16, generator=generator) for _ in range(2))  # type: ignore[return-value]


def filled(**settings: Any) -> CertifiedQuantizedCache:
    """One layer of 400 tokens: four blocks of 64 for each of two batch rows and two KV heads."""
    cache = CertifiedQuantizedCache(CONFIG, **settings)
    cache.update(*states(400), 0)
    return cache


def step(cache: CertifiedQuantizedCache, seed: int = 5) -> Tensor:
    """One decode step of one token."""
    keys, values = cache.update(*states(1, seed), 0)
    query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(seed))
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def flip(x: Tensor, place: tuple[int, ...], bit: int) -> None:
    """Flip one bit of one entry, in place."""
    bits = x.view(INTEGERS[x.element_size()])
    mask = torch.tensor(1, dtype=torch.int64) << bit
    bits[place] = (bits[place].to(torch.int64) ^ mask).to(bits.dtype)


def test_every_single_bit_changes_the_checksum() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (2, 16, 3), generator=generator, dtype=torch.uint8)
    numbers = torch.randn(2, 7, generator=generator)
    odd = torch.randint(0, 256, (2, 5), generator=generator, dtype=torch.uint8)  # not a multiple of four bytes
    parts = [codes, None, numbers, odd]
    before = block_checksum(parts, 1, codes.device)
    for part in (codes, numbers, odd):
        for place in torch.cartesian_prod(*(torch.arange(size) for size in part.shape)).tolist():
            for bit in range(8 * part.element_size()):
                flip(part, tuple(place), bit)
                changed = block_checksum(parts, 1, codes.device) != before
                assert changed.tolist() == [place[0] == 0, place[0] == 1]
                flip(part, tuple(place), bit)
    assert torch.equal(block_checksum(parts, 1, codes.device), before)


def test_bytes_that_change_places_change_the_checksum() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 16, 4)
    before = block_checksum([codes], 1, codes.device)
    assert block_checksum([codes.flip(1)], 1, codes.device) != before
    assert block_checksum([None, codes], 1, codes.device) != before
    assert block_checksum([codes[:, :8], codes[:, 8:]], 1, codes.device) != before


@pytest.mark.parametrize("refine", ["device", "host", "off"])
@pytest.mark.parametrize("value_bits", [4, 8])
def test_a_scrub_repairs_what_is_damaged_and_counts_it(refine: str, value_bits: int) -> None:
    cache = filled(refine=refine, value_bits=value_bits)
    clean = filled(refine=refine, value_bits=value_bits)
    assert cache.scrub() == ScrubReport(16, 0, 32, 0, 0)
    stores = [one.certified_layers[0].store for one in (cache, clean)]
    flip(stores[0].keys["codes"].view, (0, 1, 2, 5, 3), 7)
    flip(stores[0].values["scale"].view, (1, 0, 3, 9, 0), 14)
    flip(stores[0].values["numbers"].view, (1, 0, 3, 0), 30)
    flip(stores[0].keys["checksum"].view, (1, 1, 0), 63)
    with pytest.warns(UserWarning, match="3 quantised block"):
        report = cache.scrub()
    assert report == ScrubReport(16, 3, 32, 0, 0)
    assert cache.report().to_dict()["repaired_blocks"] == 3
    assert "3 damaged block(s)" in str(cache.report())
    for name in ("codes", "scale", "offset", "numbers", "checksum"):
        for kind in ("keys", "values"):
            assert torch.equal(getattr(stores[0], kind)[name].view, getattr(stores[1], kind)[name].view)
    assert cache.scrub().repaired == 0
    assert torch.equal(step(cache), step(clean))


def test_a_promoted_block_that_is_damaged_does_not_reach_the_output() -> None:
    settings = {"rtol": 0.001, "dense_head_share": 1.0, "dense_layer_share": 1.0, "record": "full"}
    cache, clean = filled(**settings), filled(**settings)
    expected = step(clean)
    (record,) = clean.recorder._pending
    assert bool((record.key_blocks > 0).all())
    flip(cache.certified_layers[0].store.keys["codes"].view, (0, 0, 3, 5, 3), 7)
    with pytest.warns(UserWarning, match="repaired"):
        output = step(cache)
    assert torch.equal(output, expected)
    assert cache.report().to_dict()["repaired_blocks"] == 1
    assert cache.report().to_dict()["records"] == clean.report().to_dict()["records"]


def test_an_audited_step_looks_at_every_block() -> None:
    cache, clean = (filled(rtol=10.0, audit=True) for _ in range(2))  # nothing is promoted
    flip(cache.certified_layers[0].store.values["offset"].view, (1, 1, 0, 2, 0), 3)
    with pytest.warns(UserWarning, match="repaired"):
        output = step(cache)
    assert torch.equal(output, step(clean))


def test_a_damaged_original_raises_and_nothing_changes() -> None:
    cache = filled()
    layer = cache.certified_layers[0]
    assert layer.shadow is not None
    flip(layer.shadow.slabs[0].pages[0], (2, 0, 1, 0, 0), 0)
    with pytest.raises(CorruptedPageError, match="block 2"):
        cache.scrub()
    flip(layer.store.keys["codes"].view, (0, 1, 2, 5, 3), 7)
    damaged = layer.store.keys["codes"].view.clone()
    with pytest.raises(CorruptedPageError, match="block 2"):
        cache.scrub()
    assert torch.equal(layer.store.keys["codes"].view, damaged) and cache.recorder.repaired == 0


def test_memory_that_does_not_hold_what_is_written_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled()
    store = cache.certified_layers[0].store
    flip(store.keys["codes"].view, (0, 1, 2, 5, 3), 7)
    monkeypatch.setattr(BlockStore, "rewrite", lambda self, index, keys, values: None)
    with pytest.raises(FaultyMemoryError, match="1 quantised block"):
        cache.scrub()


def test_hot_blocks_are_compared_with_their_pages() -> None:
    cache = filled(rtol=0.001, hot_blocks=3, dense_head_share=1.0, dense_layer_share=1.0, recent_window=32)
    for seed in range(3):
        step(cache, seed)
    layer = cache.certified_layers[0]
    held = cache.scrub().hot
    assert held > 0 and layer.hot.keys is not None
    rows, heads, slots = torch.nonzero(layer.hot.blocks >= 0, as_tuple=True)
    flip(layer.hot.keys, (int(rows[0]), int(heads[0]), int(slots[0]), 1, 1), 22)
    report = cache.scrub()
    assert (report.hot, report.hot_damaged) == (held, 1)
    assert cache.scrub().hot == 0


def test_an_empty_or_unquantised_cache_has_nothing_to_scrub() -> None:
    cache = CertifiedQuantizedCache(CONFIG)
    assert cache.scrub() == ScrubReport(0, 0, 0, 0, 0)
    cache.update(*states(20), 0)
    assert cache.scrub().to_dict() == {"blocks": 0, "repaired": 0, "pages": 0, "hot": 0, "hot_damaged": 0}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("at", [0, 1])
def test_rollback_after_an_interrupt_in_the_models_own_code(kind: str, at: int) -> None:
    model = build_model(kind)
    cache, clean, ids = new_cache(model), new_cache(model), prompt(330)
    with torch.no_grad():
        for one in (cache, clean):
            model(ids, past_key_values=one, use_cache=True)

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[at].mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        hook.remove()
        layers = len(model.model.layers)
        if at + 1 < layers:
            with pytest.raises(CacheStateError, match="rollback"):
                model(ids[:, :1], past_key_values=cache, use_cache=True)
        held = cache.rollback()
        assert held == (330 if at + 1 < layers else 331)
        assert cache.rollback() == held
        if held == 330:
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        model(ids[:, :1], past_key_values=clean, use_cache=True)
        logits = [model(ids[:, 1:2], past_key_values=one, use_cache=True).logits for one in (cache, clean)]
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("at_once", [True, False])
def test_an_interrupt_behind_a_sliding_layer_is_noticed(at_once: bool) -> None:
    """Layers of transformers' own count too: one that is ahead of the quantised ones must not go on."""
    model = build_model("gemma2", attention="certkv")
    assert model.config.layer_types[0] == "sliding_attention"
    cache, clean, ids = new_cache(model, rtol=0.0), new_cache(model, rtol=0.0), prompt(330)
    with torch.no_grad():
        for one in (cache, clean):
            model(ids, past_key_values=one, use_cache=True)

        def fail(*_: Any) -> None:
            raise ValueError("of the model's own")

        hook = model.model.layers[0].mlp.register_forward_hook(fail)
        with pytest.raises(ValueError, match="own"):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        hook.remove()
        if at_once:
            assert cache.rollback() == 330
            logits = [model(ids[:, 1:2], past_key_values=one, use_cache=True).logits for one in (cache, clean)]
            assert torch.equal(logits[0], logits[1])
        else:
            with pytest.raises(CacheStateError, match="rollback"):
                model(ids[:, :1], past_key_values=cache, use_cache=True)
            with pytest.raises(CacheStateError, match="reset"):  # a full window cannot go back
                cache.rollback()
