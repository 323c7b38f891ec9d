"""Exact tokens as a view of one buffer, and what a layer remembers of its finished blocks: right on every path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_same, layer_state, random_states
from transformers import LlamaConfig

from hf_certkv import CertifiedQuantizedCache, CorruptedPageError, HostMemoryError, InputError
from hf_certkv.handle import KEYS, VALUES
from hf_certkv.layers import CertifiedLayer
from hf_certkv.scrub import every_block, repair
from hf_certkv.store import BlockStore

CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size=64)
SMALL: dict[str, Any] = {"block_size": 16, "exact_below": 0, "recent_window": 16}
LENGTH = 150  # with a sink block: 7 blocks finished and 22 exact tokens behind the sink; 10 more finish the next one


def states(tokens: int, batch: int = 2, seed: int = 0) -> Any:
    return random_states(tokens, batch=batch, heads=2, widths=(16, 16), seed=seed)


def filled(tokens: int = LENGTH, **settings: Any) -> CertifiedQuantizedCache:
    """Two layers with the same tokens."""
    cache = CertifiedQuantizedCache(CONFIG, **{**SMALL, **settings})
    for layer in range(2):
        cache.update(*states(tokens), layer)
    return cache


def append(cache: CertifiedQuantizedCache, tokens: int, seed: int = 1) -> None:
    batch = cache.certified_layers[0].batch
    for layer in range(2):
        cache.update(*states(tokens, batch, seed), layer)


def numbers(layer: CertifiedLayer) -> torch.Tensor:
    """Something that follows from finished blocks: their sizes, as they are stored now."""
    if layer.store.keys["numbers"].data is None:
        return torch.zeros(0)
    return torch.cat([layer.store.keys["numbers"].view, layer.store.values["numbers"].view], dim=-1).clone()


def remembered(layer: CertifiedLayer) -> torch.Tensor:
    return layer.memo("numbers", lambda: numbers(layer))


def failed_step(cache: CertifiedQuantizedCache) -> None:
    """The first layer finishes a block, the second is given something that does not fit."""
    cache.update(*states(20, seed=5), 0)
    remembered(cache.certified_layers[0])
    with pytest.raises(InputError):
        cache.update(*states(20, batch=3), 1)


def rolled_back(cache: CertifiedQuantizedCache) -> None:
    cache.update(*states(20, seed=5), 0)
    remembered(cache.certified_layers[0])
    cache.rollback()


def failed_append(cache: CertifiedQuantizedCache) -> None:
    """The originals of finished blocks find no room, after the store has grown."""
    shadow = cache.certified_layers[0].shadow
    assert shadow is not None

    def refuse(*_: Any) -> None:
        raise HostMemoryError("none left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shadow, "append", refuse)
        with pytest.raises(HostMemoryError):
            cache.update(*states(100, seed=5), 0)


def failed_crop(cache: CertifiedQuantizedCache) -> None:
    """The first layer could be cropped, the second has lost a page."""
    shadow = cache.certified_layers[1].shadow
    assert shadow is not None
    shadow.slabs[0].memory[:] ^= 1
    with pytest.raises(CorruptedPageError):
        cache.crop(-60)
    shadow.slabs[0].memory[:] ^= 1


def failed_carrying_out(cache: CertifiedQuantizedCache) -> None:
    """Beams are reordered in one layer and fail in the other: every attribute of both is put back."""
    second = cache.certified_layers[1]

    def fail(index: Any) -> None:
        remembered(cache.certified_layers[0])
        raise RuntimeError("injected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second, "_select_batch", fail)
        with pytest.raises(RuntimeError):
            cache.reorder_cache(torch.tensor([1, 0]))


def refilled(cache: CertifiedQuantizedCache) -> None:
    """As many blocks as before, of other tokens."""
    cache.crop(-100)
    append(cache, 100, seed=9)


def begun_again(cache: CertifiedQuantizedCache) -> None:
    cache.reset()
    for layer in range(2):
        cache.update(*states(LENGTH, seed=9), layer)


def repaired(cache: CertifiedQuantizedCache) -> None:
    """A number is damaged, and someone has taken it at its word."""
    for layer in cache.certified_layers:
        layer.store.keys["numbers"].view[0, 1, 2, 3] += 1
        layer.forget()
        remembered(layer)
        with pytest.warns(UserWarning, match="repaired"):
            assert repair(layer, every_block(layer)) == 1


def repaired_while_computing(cache: CertifiedQuantizedCache) -> None:
    """What was being computed when a block was repaired is returned, and not kept."""
    for layer in cache.certified_layers:
        layer.forget()
        layer.store.keys["numbers"].view[0, 1, 2, 3] += 1

        def compute(layer: CertifiedLayer = layer) -> torch.Tensor:
            before = numbers(layer)
            with pytest.warns(UserWarning, match="repaired"):
                repair(layer, every_block(layer))
            return before

        layer.memo("numbers", compute)


def damaged_and_scrubbed(cache: CertifiedQuantizedCache) -> None:
    for layer in cache.certified_layers:
        layer.store.values["numbers"].view[1, 0, 0, 0] += 1
        layer.forget()
        remembered(layer)
    with pytest.warns(UserWarning, match="repaired"):
        assert cache.scrub().repaired == 2


PATHS: list[Callable[[CertifiedQuantizedCache], None]] = [
    lambda cache: append(cache, 1),
    lambda cache: append(cache, 10),
    lambda cache: append(cache, 200),
    lambda cache: cache.crop(-1),
    lambda cache: cache.crop(-30),
    lambda cache: cache.crop(-140),
    lambda cache: cache.crop(-LENGTH),
    refilled,
    begun_again,
    lambda cache: cache.reset(),
    lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    lambda cache: cache.batch_repeat_interleave(2),
    lambda cache: cache.batch_select_indices(torch.tensor([1])),
    failed_step,
    rolled_back,
    failed_append,
    failed_crop,
    failed_carrying_out,
    repaired,
    repaired_while_computing,
    damaged_and_scrubbed,
]
NAMES = [getattr(path, "__name__", "") + str(i) for i, path in enumerate(PATHS)]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
@pytest.mark.parametrize("sink_blocks", [0, 1, 2])
def test_nothing_stale_is_remembered(path: Callable[[CertifiedQuantizedCache], None], sink_blocks: int) -> None:
    cache = filled(sink_blocks=sink_blocks)
    for layer in cache.certified_layers:
        remembered(layer)
    path(cache)
    for layer in cache.certified_layers:
        assert_same(remembered(layer), numbers(layer))
    copied = copy.deepcopy(cache)
    for layer in copied.certified_layers:
        assert layer._memo is not cache.certified_layers[layer.layer_idx]._memo and not layer._memo._kept
    copied.reset()
    for layer in cache.certified_layers:
        assert_same(remembered(layer), numbers(layer))


def test_it_is_computed_once_as_long_as_blocks_stay_as_they_are() -> None:
    cache, computed = filled(), []
    layer = cache.certified_layers[0]
    for _ in range(9):
        append(cache, 1)
        assert layer.memo("a", lambda: computed.append("a")) is None
        layer.memo("b", lambda: computed.append("b"))
    assert computed == ["a", "b"] and layer.store.blocks == 7
    append(cache, 1)
    layer.memo("a", lambda: computed.append("again"))
    assert computed == ["a", "b", "again"] and layer.store.blocks == 8


def test_another_store_or_another_number_of_blocks_is_never_mixed_up() -> None:
    """Even where whoever changed them told nobody."""
    layer = filled().certified_layers[0]
    remembered(layer)
    layer.store.truncate(3)
    assert remembered(layer).shape[2] == 3
    held, layer.store = layer.store, layer.store.selected(torch.tensor([1, 1]))
    assert_same(remembered(layer), numbers(layer))
    assert isinstance(held, BlockStore) and not torch.equal(remembered(layer)[0], held.keys["numbers"].view[0])


def test_views_may_be_remembered() -> None:
    cache = filled()
    layer = cache.certified_layers[0]

    def codes() -> Any:
        return layer.memo("codes", lambda: layer.store.keys["codes"].view.numpy())

    for _ in range(40):
        append(cache, 1)
        assert codes().ctypes.data == layer.store.keys["codes"].view.data_ptr() and codes().shape[2] == layer.store.blocks


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
@pytest.mark.parametrize("sink_blocks", [0, 1, 2])
@pytest.mark.parametrize("recent_window", [0, 16, 40])
def test_exact_tokens_are_a_view(path: Callable[[CertifiedQuantizedCache], None], sink_blocks: int, recent_window: int) -> None:
    cache = filled(sink_blocks=sink_blocks, recent_window=recent_window)
    path(cache)
    for layer in cache.certified_layers:
        if not layer.sequence_length:
            continue
        blocks, sink = layer.store.blocks, layer.sink_tokens
        assert sink == (16 * sink_blocks if blocks else 0)
        for kind in (KEYS, VALUES):
            exact, plain = layer.exact_tokens(kind), layer.materialise(kind)
            expected = torch.cat([plain[:, :, :sink], plain[:, :, sink + 16 * blocks :]], dim=2)
            assert_same(exact.contiguous(), expected)
            assert layer.exact[kind].data is not None
            assert exact.data_ptr() == layer.exact_tokens(kind).data_ptr() == layer.exact[kind].data.data_ptr()
            assert_same(layer.unit_originals(kind, layer.batch - 1, 1).contiguous(), plain[layer.batch - 1 :, 1:].contiguous())


@pytest.mark.parametrize("sink_blocks", [0, 1, 2])
@pytest.mark.parametrize("recent_window", [0, 16, 40])
def test_exact_tokens_take_what_there_can_be_of_them(sink_blocks: int, recent_window: int) -> None:
    """The storage follows from the length: sink, window and a block, whatever came before."""
    room = 16 * sink_blocks + recent_window + 16
    cache = filled(sink_blocks=sink_blocks, recent_window=recent_window)
    for _ in range(40):
        append(cache, 1)
        for layer in cache.certified_layers:
            assert layer.nbytes()["exact"] == 2 * 2 * 2 * room * 16 * 4
    cache.crop(-50)
    other = filled(sink_blocks=sink_blocks, recent_window=recent_window)
    append(other, 40)
    other.crop(-50)
    for ours, theirs in zip(cache.certified_layers, other.certified_layers, strict=True):
        assert ours.nbytes() == theirs.nbytes() and layer_state(ours)["blocks"] == layer_state(theirs)["blocks"]
        assert ours.nbytes()["exact"] == 2 * 2 * 2 * room * 16 * 4
