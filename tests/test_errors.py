"""Every failure is a typed error before anything is returned, and the cache is as it was before the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BareCache,
    assert_same,
    assert_same_generation,
    cache_state,
    generate,
    layer_state,
    new_cache,
    prompt,
    random_states,
    served,
    shared_model,
)
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

import hf_certkv.shadow
from hf_certkv import (
    CertifiedQuantizedCache,
    CorruptedPageError,
    GradientError,
    HostMemoryError,
    InputError,
)
from hf_certkv.handle import KEYS, VALUES
from hf_certkv.ladder import Rung

LENGTH = 330


class Allocator:
    """Stands in for the host allocator: serves `serves` allocations, then refuses until told otherwise."""

    def __init__(self, serves: int) -> None:
        self.serves, self.refused = serves, 0
        self.real = hf_certkv.shadow.allocate_host

    def __call__(self, count: int, pinned: bool) -> Tensor:
        """Allocate, or refuse as torch does."""
        if self.serves == 0:
            self.refused += 1
            raise RuntimeError("out of host memory")
        self.serves -= 1
        return self.real(count, pinned)


def refuse_after(monkeypatch: pytest.MonkeyPatch, serves: int) -> Allocator:
    """Let the allocator fail after some allocations."""
    allocator = Allocator(serves)
    monkeypatch.setattr(hf_certkv.shadow, "allocate_host", allocator)
    return allocator


def forward(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Logits of one forward without gradients."""
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("rtol", [0.0, 0.05])
@pytest.mark.parametrize("serves", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_host_memory_refused_in_prefill(kind: str, serves: int, rtol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = shared_model(kind), prompt(LENGTH)
    cache = new_cache(model, rtol=rtol)
    before = cache_state(cache)
    with monkeypatch.context() as patch:
        allocator = refuse_after(patch, serves)
        with pytest.raises(HostMemoryError, match="Layer"):
            forward(model, ids, cache)
        assert allocator.refused == 1
    assert cache.get_seq_length() == 0
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * len(cache.layers)
    assert_same(cache_state(cache), before)
    expected = generate(model, ids, 8, new_cache(model, rtol=rtol))
    assert_same_generation(generate(model, ids, 8, cache), expected)


def test_smaller_batch_after_host_memory_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's own advice works on the same cache: try a smaller batch."""
    model = shared_model("llama")
    cache = new_cache(model, rtol=0.0)
    with monkeypatch.context() as patch:
        refuse_after(patch, 1)
        with pytest.raises(HostMemoryError, match="smaller batch"):
            forward(model, prompt(LENGTH, 3), cache)
    expected = generate(model, prompt(LENGTH), 8, DynamicCache(config=model.config))
    assert_same_generation(generate(model, prompt(LENGTH), 8, cache), expected)


@pytest.mark.parametrize("chunk", [1, 40, 400])
@pytest.mark.parametrize("serves", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_host_memory_refused_later(kind: str, serves: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slab is full, or the first one is needed: decoding, or a chunk, fails in a later layer."""
    model = shared_model(kind)
    small = {"block_size": 16, "rtol": 0.0, "record": "full"}
    # One token short of finishing the first block of a new slab, or of the first slab of all.
    for settings in ({**small, "exact_below": 340}, {**small, "exact_below": 100}):
        cache, oracle = new_cache(model, **settings), DynamicCache(config=model.config)
        ids = prompt(800)
        forward(model, ids[:, :330], cache)
        forward(model, ids[:, :330], oracle)
        done, failed = 330, 0
        with monkeypatch.context() as patch:
            allocator = refuse_after(patch, serves)
            while done + chunk <= 790 and not failed:
                before = cache_state(cache)
                try:
                    logits = forward(model, ids[:, done : done + chunk], cache)
                except HostMemoryError:
                    failed += 1
                    break
                assert torch.equal(logits, forward(model, ids[:, done : done + chunk], oracle))
                done += chunk
            assert allocator.refused == failed == 1
        assert_same(cache_state(cache), before)
        assert cache.get_seq_length() == done
        for _ in range(2):
            part = ids[:, done : done + 1]
            assert torch.equal(forward(model, part, cache), forward(model, part, oracle))
            done += 1
        cache.report()
        steps = [record.step for record in cache.recorder.records]
        assert len(steps) == len(set(steps)) * len(cache.certified_layers)  # the failed step left no records


MOVES: dict[str, Callable[[CertifiedQuantizedCache], None]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("operation", MOVES)
def test_host_memory_refused_while_rows_move(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying the pages of the second layer fails: the first layer is not left reordered."""
    model = shared_model("llama")
    cache = new_cache(model)
    forward(model, prompt(LENGTH, 2), cache)
    before = cache_state(cache)
    with monkeypatch.context() as patch:
        refuse_after(patch, 1)
        with pytest.raises(HostMemoryError):
            MOVES[operation](cache)
    assert_same(cache_state(cache), before)


def corrupt(cache: CertifiedQuantizedCache, layer: int, kind: int = KEYS) -> Callable[[], None]:
    """Flip one bit of the first page of a layer; returns what flips it back."""
    shadow = cache.layers[layer].shadow  # type: ignore[attr-defined]
    offset = 0 if kind == KEYS else shadow.slabs[0].pages[0].numel() * shadow.dtype.itemsize
    memory = shadow.slabs[0].memory

    def flip() -> None:
        memory[offset + 5] ^= 16

    flip()
    return flip


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", [KEYS, VALUES])
@pytest.mark.parametrize("count", [1, 3, 30])
def test_corrupted_page_raises_and_changes_nothing(layer: int, kind: int, count: int) -> None:
    model, ids = shared_model("llama"), prompt(LENGTH + 60)
    cache, oracle = new_cache(model, rtol=0.0, record="full"), DynamicCache(config=model.config)
    for past in (cache, oracle):
        forward(model, ids[:, :LENGTH], past)
        forward(model, ids[:, LENGTH : LENGTH + 1], past)
    before = cache_state(cache)
    restore = corrupt(cache, layer, kind)
    part = ids[:, LENGTH + 1 : LENGTH + 1 + count]
    for _ in range(2):
        with pytest.raises(CorruptedPageError, match=f"Layer {layer}"):
            forward(model, part, cache)
    assert cache.get_seq_length() == LENGTH + 1
    restore()
    assert_same(cache_state(cache), before)
    assert torch.equal(forward(model, part, cache), forward(model, part, oracle))
    cache.report()
    assert len(cache.recorder.records) == (4 if count <= 16 else 2)


@pytest.mark.parametrize("kind", [KEYS, VALUES])
def test_corrupted_page_raises_wherever_it_is_read(kind: int) -> None:
    states = random_states(400)
    bare = BareCache(rtol=0.05)
    bare.update(*states)
    handles = bare.update(*random_states(1, seed=1))
    before = layer_state(bare.layer)
    restore = corrupt(bare.cache, 0, kind)
    for read in (
        lambda: bare.layer.materialise(kind),
        lambda: (bare.layer.keys, bare.layer.values),
        lambda: bare.layer.unit_originals(kind, 0, 0),
        lambda: bare.cache.crop(-390),
    ):
        with pytest.raises(CorruptedPageError, match=("keys", "values")[kind]):
            read()
    restore()
    assert_same(layer_state(bare.layer), before)
    assert torch.equal(handles[kind].clone()[:, :, :400], states[kind])


def test_corrupted_page_is_not_promoted() -> None:
    """At a tolerance that promotes blocks to their originals, the pages are read, checked and refused."""
    bare = BareCache(rtol=0.004, refine="off", dense_head_share=1.0, dense_layer_share=1.0)
    bare.update(*random_states(400))
    query = torch.randn(1, 4, 1, 64)
    F.scaled_dot_product_attention(query, *bare.update(*random_states(1, seed=1)), enable_gqa=True)
    before = served(bare.cache)
    assert before["values"] > 0
    assert bare.layer.shadow is not None
    for slab in bare.layer.shadow.slabs:
        slab.pages[VALUES].view(torch.uint8)[..., 0, 0] ^= 16  # one bit of every page
    handles = bare.update(*random_states(1, seed=2))
    with pytest.raises(CorruptedPageError, match="values"):
        F.scaled_dot_product_attention(query, *handles, enable_gqa=True)
    assert bare.cache.get_seq_length() == 401
    assert served(bare.cache) == before


@pytest.mark.parametrize("corrupted", [0, 1])
def test_failed_crop_leaves_all_layers_alike(corrupted: int) -> None:
    model = shared_model("llama")
    cache = new_cache(model)
    forward(model, prompt(LENGTH), cache)
    before = cache_state(cache)
    restore = corrupt(cache, corrupted)
    with pytest.raises(CorruptedPageError):
        cache.crop(-300)
    restore()
    assert_same(cache_state(cache), before)


def test_crop_of_too_much_leaves_sliding_layers_alone() -> None:
    model = shared_model("gemma3")
    cache = new_cache(model)
    cache.activate_past_recording()
    forward(model, prompt(LENGTH), cache)
    before = cache_state(cache)
    with pytest.raises(InputError, match="crop"):
        cache.crop(-LENGTH - 1)
    assert_same(cache_state(cache), before)


PLANTS = {"early block": 70, "middle block": 200, "tail": 380, "sink": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("kind", [KEYS, VALUES])
@pytest.mark.parametrize("place", PLANTS)
def test_not_a_number_is_never_certified(place: str, kind: int, bad: float, dtype: torch.dtype) -> None:
    """A NaN or Inf in one KV head: that head is dense and what SDPA makes of the originals; the other is as without."""
    states = random_states(400, dtype=dtype)
    states[kind][0, 1, PLANTS[place], 5] = bad
    new = random_states(1, dtype=dtype, seed=1)
    query = torch.randn(1, 4, 1, 64).to(dtype)
    bare = BareCache(record="full", audit=True, dense_layer_share=1.0)
    bare.update(*states)
    assert_same(bare.layer.materialise(kind), states[kind])
    handles = bare.update(*new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = F.scaled_dot_product_attention(query, *handles, enable_gqa=True)
    plain = [torch.cat([old, part], 2) for old, part in zip(states, new, strict=True)]
    expected = F.scaled_dot_product_attention(query, *plain, enable_gqa=True)
    bare.cache.report()
    (record,) = bare.cache.recorder.records
    assert (record.rung[0, 2:] >= Rung.DENSE_HEAD).all()
    own = F.scaled_dot_product_attention(query[:, 2:], *(part[:, 1:].expand(-1, 2, -1, -1) for part in plain))
    assert_same(actual[:, 2:], own)
    torch.testing.assert_close(actual[:, 2:], expected[:, 2:], equal_nan=True)
    assert (record.rung[0, :2] < Rung.DENSE_HEAD).all()
    assert torch.isfinite(actual[:, :2]).all()
    text = str(bare.cache.report())
    assert "certificate" in text


@pytest.mark.parametrize("kind", [KEYS, VALUES])
def test_not_a_number_behind_a_mask_does_no_harm_that_sdpa_would_not_do(kind: int) -> None:
    states = random_states(400)
    states[kind][0, 0, 100, 0] = math.nan
    new, query = random_states(1, seed=1), torch.randn(1, 4, 1, 64)
    mask = torch.ones(1, 1, 1, 401, dtype=torch.bool)
    mask[..., :150] = False
    bare = BareCache(record="full", rtol=0.05)
    bare.update(*states)
    actual = F.scaled_dot_product_attention(query, *bare.update(*new), attn_mask=mask, enable_gqa=True)
    plain = [torch.cat([old, part], 2) for old, part in zip(states, new, strict=True)]
    expected = F.scaled_dot_product_attention(query, *plain, attn_mask=mask, enable_gqa=True)
    bare.cache.report()
    (record,) = bare.cache.recorder.records
    assert (record.rung[0, :2] >= Rung.DENSE_HEAD).all()
    torch.testing.assert_close(actual[:, :2], expected[:, :2], equal_nan=True)


def test_not_a_number_in_the_query_is_dense() -> None:
    bare = BareCache(record="full")
    bare.update(*random_states(400))
    query = torch.randn(1, 4, 1, 64)
    query[0, 0, 0, 0] = math.nan
    actual = F.scaled_dot_product_attention(query, *bare.update(*random_states(1, seed=1)), enable_gqa=True)
    bare.cache.report()
    (record,) = bare.cache.recorder.records
    assert (record.rung[0, :2] >= Rung.DENSE_HEAD).all()
    assert torch.isnan(actual[:, 0]).all() and torch.isfinite(actual[:, 1:]).all()


def test_tolerance_below_the_dtypes_rounding() -> None:
    model, ids = shared_model("llama", torch.bfloat16), prompt(LENGTH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = new_cache(model, rtol=1e-9)
        actual = generate(model, ids, 12, cache)
    ours = [str(warning.message) for warning in caught if "every step will be dense" in str(warning.message)]
    assert len(ours) == 1 and "1e-09" in ours[0] and "bfloat16" in ours[0]
    assert_same_generation(actual, generate(model, ids, 12, DynamicCache(config=model.config)))
    rungs = served(cache)
    assert rungs["dense_layer"] == sum(rungs.values()) == 11 * 2 * 4


@pytest.mark.parametrize(("rtol", "said"), [(0.0, False), (0.05, False), (2.0**-8, True), (1e-4, True)])
def test_warning_only_where_it_is_true(rtol: float, said: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new_cache(shared_model("llama", torch.bfloat16), rtol=rtol)
    assert bool(caught) == said


def test_gradients_are_refused() -> None:
    model = shared_model("llama")
    cache = new_cache(model)
    forward(model, prompt(LENGTH), cache)
    before = cache_state(cache)
    with pytest.raises(GradientError, match="no_grad"):
        model(prompt(1), past_key_values=cache, use_cache=True)
    assert_same(cache_state(cache), before)
    fresh = new_cache(model)
    with pytest.raises(GradientError, match="no_grad"):
        model(prompt(LENGTH), past_key_values=fresh, use_cache=True)
    assert fresh.get_seq_length() == 0
    forward(model, prompt(1), cache)
    assert cache.get_seq_length() == LENGTH + 1


def _shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


WRONG: dict[str, tuple[Tensor, Tensor]] = {
    "batch": (_shaped(3, 2, 1, 64), _shaped(3, 2, 1, 64)),
    "heads": (_shaped(2, 4, 1, 64), _shaped(2, 4, 1, 64)),
    "key channels": (_shaped(2, 2, 1, 32), _shaped(2, 2, 1, 64)),
    "value channels": (_shaped(2, 2, 1, 64), _shaped(2, 2, 1, 65)),
    "dtype": (_shaped(2, 2, 1, 64, dtype=torch.float16), _shaped(2, 2, 1, 64, dtype=torch.float16)),
    "two dtypes": (_shaped(2, 2, 1, 64), _shaped(2, 2, 1, 64, dtype=torch.float16)),
    "lengths differ": (_shaped(2, 2, 1, 64), _shaped(2, 2, 2, 64)),
    "heads differ": (_shaped(2, 2, 1, 64), _shaped(2, 1, 1, 64)),
    "three axes": (_shaped(2, 1, 64), _shaped(2, 1, 64)),
    "five axes": (_shaped(2, 2, 1, 1, 64), _shaped(2, 2, 1, 1, 64)),
    "device": (torch.ones(2, 2, 1, 64, device="meta"), torch.ones(2, 2, 1, 64, device="meta")),
}


@pytest.mark.parametrize("tokens", [20, 400])
@pytest.mark.parametrize("name", WRONG)
def test_keys_and_values_that_do_not_fit(name: str, tokens: int) -> None:
    bare = BareCache()
    bare.update(*random_states(tokens, batch=2))
    before = layer_state(bare.layer)
    with pytest.raises(InputError, match="Layer 0"):
        bare.update(*WRONG[name])
    assert_same(layer_state(bare.layer), before)
    bare.update(*random_states(1, batch=2, seed=1))
    assert bare.cache.get_seq_length() == tokens + 1


@pytest.mark.parametrize("name", ["two dtypes", "lengths differ", "heads differ", "three axes", "five axes"])
def test_first_keys_and_values_that_make_no_sense(name: str) -> None:
    bare = BareCache()
    with pytest.raises(InputError, match="Layer 0"):
        bare.update(*WRONG[name])
    assert not bare.layer.is_initialized and bare.cache.get_seq_length() == 0
    bare.update(*random_states(3, batch=1))
    assert bare.cache.get_seq_length() == 3


def test_wrong_keys_in_a_later_layer_undo_the_step() -> None:
    cache = CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=3))
    for layer in range(3):
        cache.update(*random_states(300, seed=layer), layer)
    before = cache_state(cache)
    cache.update(*random_states(1, seed=7), 0)
    cache.update(*random_states(1, seed=8), 1)
    with pytest.raises(InputError, match="Layer 2"):
        cache.update(*random_states(1, heads=4), 2)
    assert_same(cache_state(cache), before)


def test_keys_and_values_cannot_be_assigned() -> None:
    bare = BareCache()
    bare.update(*random_states(300))
    before = layer_state(bare.layer)
    for name in ("keys", "values"):
        with pytest.raises(InputError, match="update"):
            setattr(bare.layer, name, torch.ones(1, 2, 300, 64))
    assert_same(layer_state(bare.layer), before)
