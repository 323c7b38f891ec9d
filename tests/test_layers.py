"""The state of a layer: how it grows, shrinks, is reordered, copied and forgotten. All comparisons are exact."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BareCache, assert_same, layer_state, random_states
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from hf_certkv import CachePicklingError, CertifiedQuantizedCache, InputError
from hf_certkv.handle import KEYS, VALUES, Handle

SMALL: dict[str, Any] = {"block_size": 16, "recent_window": 16, "exact_below": 40}
SMALL_TOKENS = 120

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"block_size": 16},
    {"block_size": 32},
    {"block_size": 128, "exact_below": 0},
    {"block_size": 16, "sink_blocks": 0, "recent_window": 0, "exact_below": 0},
    {"block_size": 16, "sink_blocks": 3, "recent_window": 5, "exact_below": 100},
    {"block_size": 32, "sink_blocks": 0, "recent_window": 1},
    {"value_bits": 8},
    {"value_group": 0},
    {"value_group": 16},
    {"value_group": 48},
    {"refine": "device"},
    {"refine": "off"},
    {"hot_blocks": 4},
]
SHAPES: list[dict[str, Any]] = [
    {"widths": (64, 64)},
    {"widths": (80, 80), "batch": 3},
    {"widths": (96, 96)},
    {"widths": (100, 100), "batch": 3},
    {"widths": (20, 20)},
    {"widths": (33, 33), "batch": 3},
    {"widths": (64, 32)},
    {"widths": (20, 100), "heads": 1},
    {"widths": (33, 64), "heads": 3},
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def filled(states: tuple[Tensor, Tensor], count: int, **changes: Any) -> BareCache:
    """A cache that got the first `count` tokens in one call."""
    bare = BareCache(**changes)
    if count:
        bare.update(states[0][:, :, :count], states[1][:, :, :count])
    return bare


def feed(bare: BareCache, states: tuple[Tensor, Tensor], start: int, counts: list[int]) -> None:
    """Append tokens from `start` on, in chunks."""
    for count in counts:
        bare.update(states[0][:, :, start : start + count], states[1][:, :, start : start + count])
        start += count


def assert_holds(bare: BareCache, states: tuple[Tensor, Tensor], count: int) -> None:
    """The exact originals are those that were given."""
    for kind in (KEYS, VALUES):
        assert_same(bare.layer.materialise(kind), states[kind][:, :, :count].contiguous())
    assert_same(bare.layer.keys, states[0][:, :, :count].contiguous())
    assert_same(bare.layer.values, states[1][:, :, :count].contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_by_token_is_one_prefill_in_every_shape(shape: dict[str, Any], dtype: torch.dtype) -> None:
    states = random_states(SMALL_TOKENS, dtype=dtype, **shape)
    whole = filled(states, SMALL_TOKENS, **SMALL)
    assert whole.layer.store.blocks == 5
    single = BareCache(**SMALL)
    feed(single, states, 0, [1] * SMALL_TOKENS)
    assert_same(layer_state(single.layer), layer_state(whole.layer))
    assert_holds(single, states, SMALL_TOKENS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_chunks_are_one_prefill_in_every_layout(layout: dict[str, Any]) -> None:
    states = random_states(600, batch=2)
    whole = filled(states, 600, **layout)
    assert whole.layer.store.blocks > 0
    for counts in ([1] * 300 + [300], [600 - 64, 64], [17, 255, 1, 1, 300, 26], [256, 1, 343], [257, 343]):
        assert sum(counts) == 600
        chunked = BareCache(**layout)
        feed(chunked, states, 0, counts)
        assert_same(layer_state(chunked.layer), layer_state(whole.layer))
    assert_holds(whole, states, 600)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_crop_by_every_number(dtype: torch.dtype) -> None:
    states = random_states(SMALL_TOKENS, widths=(20, 33), dtype=dtype)
    whole = layer_state(filled(states, SMALL_TOKENS, **SMALL).layer)
    for removed in range(SMALL_TOKENS):
        bare = filled(states, SMALL_TOKENS, **SMALL)
        bare.cache.crop(-removed)
        assert_same(layer_state(bare.layer), layer_state(filled(states, SMALL_TOKENS - removed, **SMALL).layer))
        assert bare.cache.get_seq_length() == SMALL_TOKENS - removed
        if removed % 8 == 5:  # what follows is as if nothing had been there
            feed(bare, states, SMALL_TOKENS - removed, [removed])
            assert_same(layer_state(bare.layer), whole)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_crop_in_every_layout(layout: dict[str, Any]) -> None:
    states = random_states(500)
    for removed in [1, 51, 52, 53, 64, 115, 116, 117, 180, 243, 244, 245, 300, 400, 436, 437, 470, 499]:
        bare = filled(states, 500, **layout)
        bare.cache.crop(-removed)
        fresh = filled(states, 500 - removed, **layout)
        assert_same(layer_state(bare.layer), layer_state(fresh.layer))
        assert bare.layer.nbytes()["host_originals"] == fresh.layer.nbytes()["host_originals"]


@pytest.mark.parametrize("layout", [SMALL, {**SMALL, "sink_blocks": 0}], ids=str)
def test_crop_to_nothing(layout: dict[str, Any]) -> None:
    states = random_states(SMALL_TOKENS)
    bare = filled(states, SMALL_TOKENS, **layout)
    bare.cache.crop(-SMALL_TOKENS)
    assert bare.cache.get_seq_length() == 0
    assert bare.layer.store.blocks == 0 and bare.layer.sink_tokens == 0 and bare.layer.keys is None
    assert bare.layer.nbytes()["host_originals"] == 0
    returned = bare.update(*states)
    assert not isinstance(returned[0], Handle)  # an empty layer hands back the plain tensors
    assert_same(layer_state(bare.layer), layer_state(filled(states, SMALL_TOKENS, **layout).layer))


def test_crop_of_nothing_changes_nothing() -> None:
    states = random_states(SMALL_TOKENS)
    bare = filled(states, SMALL_TOKENS, **SMALL)
    before = layer_state(bare.layer)
    bare.cache.crop(0)
    assert_same(layer_state(bare.layer), before)
    empty = BareCache(**SMALL)
    for removed in (0, -5):
        empty.cache.crop(removed)  # as DynamicCache: an empty layer has nothing to remove
    assert empty.cache.get_seq_length() == 0


@pytest.mark.parametrize("removed", [1, 7, SMALL_TOKENS, -SMALL_TOKENS - 1, -(10**6)])
def test_crop_refuses_what_makes_no_sense(removed: int) -> None:
    states = random_states(SMALL_TOKENS)
    bare = filled(states, SMALL_TOKENS, **SMALL)
    before = layer_state(bare.layer)
    with pytest.raises(InputError, match="crop"):
        bare.cache.crop(removed)
    assert_same(layer_state(bare.layer), before)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 70)),
        st.tuples(st.just("crop"), st.floats(0.0, 1.0)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("copy"), st.none()),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(operations, st.sampled_from([SMALL, {**SMALL, "sink_blocks": 0, "recent_window": 0, "exact_below": 0}]))
def test_any_history_ends_in_the_state_of_its_tokens(history: list[tuple[str, Any]], layout: dict[str, Any]) -> None:
    """Append, crop, select, copy, reset in any order: the state is that of one prefill of the tokens that are left."""
    source = random_states(1000, batch=2, widths=(20, 20), seed=1)
    bare, used = BareCache(**layout), 0
    held = (source[0][:, :, :0], source[1][:, :, :0])
    for name, argument in history:
        length = held[0].shape[2]
        if name == "append":
            new = (source[0][:, :, used : used + argument], source[1][:, :, used : used + argument])
            used += argument
            bare.update(*new)
            held = (torch.cat([held[0], new[0]], 2), torch.cat([held[1], new[1]], 2))
        elif name == "crop":
            removed = int(argument * length)
            bare.cache.crop(-removed)
            held = (held[0][:, :, : length - removed], held[1][:, :, : length - removed])
        elif name == "select":
            bare.cache.reorder_cache(torch.tensor(argument))
            held = (held[0][argument], held[1][argument])
        elif name == "copy":
            duplicate = copy.deepcopy(bare.cache)
            bare.cache, (bare.layer,) = duplicate, duplicate.certified_layers
        else:
            bare.cache.reset()
            held = (held[0][:, :, :0], held[1][:, :, :0])
    length = held[0].shape[2]
    assert bare.cache.get_seq_length() == length
    if length:
        assert_same(layer_state(bare.layer), layer_state(filled(held, length, **layout).layer))
    else:
        assert bare.layer.keys is None and bare.layer.store.blocks == 0


def decode_output(bare: BareCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Append one token and attend to everything: `[batch, query_heads, 1, channels]`."""
    keys, values = bare.update(key, value)
    assert isinstance(keys, Handle) and isinstance(values, Handle)
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


@pytest.mark.parametrize("rtol", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [0, 2, 2], [0, 1, 2]], ids=str)
def test_reorder_gives_each_row_the_output_of_its_source(order: list[int], dtype: torch.dtype, rtol: float) -> None:
    states = random_states(400, batch=3, dtype=dtype)
    new_key, new_value = random_states(1, batch=3, dtype=dtype, seed=1)
    query = torch.randn(3, 4, 1, 64).to(dtype)
    source, moved = (filled(states, 400, rtol=rtol, record="full") for _ in range(2))
    expected = decode_output(source, query, new_key, new_value)
    moved.cache.reorder_cache(torch.tensor(order))
    assert_same(layer_state(moved.layer), layer_state(filled((states[0][order], states[1][order]), 400).layer))
    actual = decode_output(moved, query[order], new_key[order], new_value[order])
    assert torch.equal(actual, expected[order])
    source.cache.report(), moved.cache.report()
    (ours,), (theirs,) = moved.cache.recorder.records, source.cache.recorder.records
    assert (ours.rung == theirs.rung[order]).all() and (ours.bound == theirs.bound[order]).all()
    assert (ours.rung < 3).any() == (rtol > 0)


@pytest.mark.parametrize("hot_blocks", [0, 2])
def test_hot_blocks_move_with_their_rows(hot_blocks: int) -> None:
    """After promotions have filled the hot slots, a reordered cache still certifies the reordered originals."""
    states = random_states(400, batch=3)
    bare = filled(states, 400, rtol=0.01, hot_blocks=hot_blocks, audit=True, refine="off", dense_head_share=1.0)
    query = torch.randn(3, 4, 1, 64, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        decode_output(bare, query, *random_states(1, batch=3, seed=step + 1))
    assert (bare.layer.hot.lookup(10**6) is not None) == (hot_blocks > 0)
    bare.cache.reorder_cache(torch.tensor([2, 2, 0]))
    decode_output(bare, query, *random_states(1, batch=3, seed=9))  # audit compares with the originals
    bare.cache.crop(-130)
    decode_output(bare, query, *random_states(1, batch=3, seed=10))


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_repeat_interleave(repeats: int) -> None:
    states = random_states(SMALL_TOKENS, batch=2)
    bare = filled(states, SMALL_TOKENS, **SMALL)
    bare.cache.batch_repeat_interleave(repeats)
    repeated = (states[0].repeat_interleave(repeats, 0), states[1].repeat_interleave(repeats, 0))
    assert_same(layer_state(bare.layer), layer_state(filled(repeated, SMALL_TOKENS, **SMALL).layer))


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([0]),
        torch.tensor([2, 1]),
        torch.tensor([1, 1, 0, 2], dtype=torch.int32),
        torch.tensor([-1, 0]),
        torch.tensor([True, False, True]),
        torch.tensor([False, True, False]),
        torch.tensor([True, True, True]),
    ],
    ids=str,
)
def test_select_indices(indices: Tensor) -> None:
    states = random_states(SMALL_TOKENS, batch=3)
    bare = filled(states, SMALL_TOKENS, **SMALL)
    bare.cache.batch_select_indices(indices)
    chosen = (states[0][indices], states[1][indices])
    assert_same(layer_state(bare.layer), layer_state(filled(chosen, SMALL_TOKENS, **SMALL).layer))


@pytest.mark.parametrize("indices", [torch.tensor([3]), torch.tensor([-4]), torch.tensor([[0]])], ids=str)
def test_select_refuses_rows_that_are_not_there(indices: Tensor) -> None:
    states = random_states(SMALL_TOKENS, batch=3)
    bare = filled(states, SMALL_TOKENS, **SMALL)
    before = layer_state(bare.layer)
    for operation in (bare.cache.batch_select_indices, bare.cache.reorder_cache):
        with pytest.raises(InputError, match="rows"):
            operation(indices)
    assert_same(layer_state(bare.layer), before)


def test_selecting_an_empty_layer_does_nothing() -> None:
    bare = BareCache()
    bare.cache.reorder_cache(torch.tensor([0]))
    bare.cache.batch_repeat_interleave(2)
    bare.cache.batch_select_indices(torch.tensor([0]))
    assert bare.cache.get_seq_length() == 0


def test_reset_forgets_everything() -> None:
    bare = filled(random_states(SMALL_TOKENS, batch=2), SMALL_TOKENS, **SMALL)
    bare.cache.reset()
    assert bare.cache.get_seq_length() == 0 and bare.layer.keys is None and bare.layer.values is None
    assert sum(bare.layer.nbytes().values()) == 0
    other = random_states(SMALL_TOKENS, batch=1, heads=3, widths=(33, 20), dtype=torch.bfloat16, seed=2)
    bare.update(*other)
    assert_same(layer_state(bare.layer), layer_state(filled(other, SMALL_TOKENS, **SMALL).layer))


def test_deepcopy_is_independent() -> None:
    states = random_states(300, batch=2)
    bare = filled(states, 200, **SMALL)
    before = layer_state(bare.layer)
    duplicate = copy.deepcopy(bare.cache)
    (layer,) = duplicate.certified_layers
    assert layer.cache is duplicate and bare.layer.cache is bare.cache
    assert_same(layer_state(layer), before)
    duplicate.update(states[0][:, :, 200:], states[1][:, :, 200:], 0)
    duplicate.reorder_cache(torch.tensor([1, 0]))
    assert_same(layer_state(bare.layer), before)
    grown = layer_state(layer)
    bare.cache.crop(-150)
    feed(bare, random_states(300, batch=2, seed=4), 0, [150, 10])
    assert_same(layer_state(layer), grown)


def test_deepcopy_outlives_the_original() -> None:
    states = random_states(300)
    bare = filled(states, 200, audit=True, **SMALL)
    duplicate = copy.deepcopy(bare.cache)
    del bare
    gc.collect()
    keys, values = duplicate.update(states[0][:, :, 200:201], states[1][:, :, 200:201], 0)
    output = F.scaled_dot_product_attention(torch.randn(1, 2, 1, 64), keys, values)
    assert torch.isfinite(output).all()
    assert duplicate.report().to_dict()["overall"]["head_steps"] == 2
    duplicate.crop(-100)
    assert_same(layer_state(duplicate.certified_layers[0]), layer_state(filled(states, 101, **SMALL).layer))


def test_deepcopy_keeps_checksums() -> None:
    """A page that was corrupted before the copy is not signed anew by it."""
    bare = filled(random_states(SMALL_TOKENS), SMALL_TOKENS, **SMALL)
    assert bare.layer.shadow is not None
    bare.layer.shadow.slabs[0].memory[0] ^= 1
    duplicate = copy.deepcopy(bare.cache)
    with pytest.raises(RuntimeError, match="checksum"):
        duplicate.certified_layers[0].materialise(KEYS)


def test_pickling_is_refused() -> None:
    bare = filled(random_states(SMALL_TOKENS), SMALL_TOKENS, **SMALL)
    for thing in (bare.cache, bare.layer):
        with pytest.raises(CachePicklingError):
            pickle.dumps(thing)


@pytest.mark.parametrize("tokens", [0, 1, 39, 40, 41, SMALL_TOKENS])
def test_bookkeeping_is_that_of_a_dynamic_cache(tokens: int) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    ours, oracle = CertifiedQuantizedCache(config, **SMALL), DynamicCache(config=config)
    assert ours is not None and len(ours) == len(oracle) == 2
    states = random_states(max(tokens, 1))
    for cache in (ours, oracle):
        if tokens:
            for layer_idx in range(2):
                cache.update(*states, layer_idx)
    for layer_idx in range(2):
        assert ours.get_seq_length(layer_idx) == oracle.get_seq_length(layer_idx) == tokens
        for new in (1, 5, 200):
            assert ours.get_mask_sizes(new, layer_idx) == oracle.get_mask_sizes(new, layer_idx)
        assert ours.get_query_offset(layer_idx) == oracle.get_query_offset(layer_idx)
    assert ours.get_seq_length() == oracle.get_seq_length()
    # `is_dummy` came after the oldest transformers that is supported.
    shared = [
        name for name in ("is_sliding", "is_linear", "is_dummy", "is_compileable", "is_croppable") if hasattr(oracle, name)
    ]
    assert len(shared) >= 4
    for name in shared:
        assert getattr(ours, name) == getattr(oracle, name), name
    assert ours.get_max_length() == oracle.get_max_length()
    assert ours.get_seq_length(7) == oracle.get_seq_length(7) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "layout",
    [{}, {"value_group": 0}, {"value_group": 48, "block_size": 32}, {"value_bits": 8, "refine": "off"}],
    ids=str,
)
def test_every_shape_and_format_is_certified(shape: dict[str, Any], dtype: torch.dtype, layout: dict[str, Any]) -> None:
    """Audit compares with float64 over the originals; the output is within the tolerance of SDPA's."""
    states = random_states(400, dtype=dtype, **shape)
    bare = filled(states, 400, audit=True, rtol=0.1, **layout)
    new = random_states(1, dtype=dtype, seed=1, **shape)
    heads, width = states[0].shape[1], states[0].shape[3]
    query = torch.randn(states[0].shape[0], 2 * heads, 1, width).to(dtype)
    output = decode_output(bare, query, *new)
    keys, values = (torch.cat([old, part], 2).double() for old, part in zip(states, new, strict=True))
    exact = F.scaled_dot_product_attention(query.double(), keys, values, enable_gqa=True)
    off = torch.linalg.vector_norm(output.double() - exact, dim=-1)
    assert (off <= 0.11 * torch.linalg.vector_norm(exact, dim=-1)).all()
    report = bare.cache.report().to_dict()
    assert report["overall"]["head_steps"] == query.shape[0] * query.shape[1]


def test_float64_stays_exact_and_unquantised() -> None:
    states = random_states(400, dtype=torch.float64)
    bare = filled(states, 400)
    assert bare.layer.store.blocks == 0
    keys, values = bare.update(*random_states(1, dtype=torch.float64, seed=1))
    assert not isinstance(keys, Handle) and keys.dtype == values.dtype == torch.float64
    assert torch.equal(keys[:, :, :400], states[0])


def test_nothing_is_quantised_up_to_the_threshold() -> None:
    states = random_states(SMALL_TOKENS)
    bare = BareCache(**{**SMALL, "exact_below": 60})
    for length in range(1, SMALL_TOKENS + 1):
        feed(bare, states, length - 1, [1])
        assert (bare.layer.store.blocks > 0) == (length > 60)
    with_handles = bare.update(*random_states(1, seed=2))
    assert all(isinstance(part, Handle) for part in with_handles)


def test_given_tensors_are_not_kept_or_changed() -> None:
    """Writing into the tensors after `update` must not reach the cache, nor the other way round."""
    states = random_states(SMALL_TOKENS)
    originals = (states[0].clone(), states[1].clone())
    bare = filled(states, SMALL_TOKENS, **SMALL)
    assert torch.equal(states[0], originals[0]) and torch.equal(states[1], originals[1])
    states[0].fill_(7.0)
    states[1].zero_()
    assert_holds(bare, originals, SMALL_TOKENS)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_memory_layout_is_taken(layout: str) -> None:
    states = random_states(SMALL_TOKENS, batch=2)
    if layout == "transposed":
        given = tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in states)
    elif layout == "strided":
        given = tuple(torch.stack([part, part + 1], dim=-1)[..., 0] for part in states)
    else:
        states = (states[0][:1].expand(2, -1, -1, -1), states[1][:1].expand(2, -1, -1, -1))
        given = states
    assert not given[0].is_contiguous()
    bare = BareCache(**SMALL)
    bare.update(given[0], given[1])
    plain = (states[0].contiguous(), states[1].contiguous())
    assert_same(layer_state(bare.layer), layer_state(filled(plain, SMALL_TOKENS, **SMALL).layer))
