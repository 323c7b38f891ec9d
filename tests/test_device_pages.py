"""Originals as kernels read them: addresses, checksums that the device takes, copies that the host does not wait for."""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import where
from conftest import BareCache, random_states
from fake_streams import FakeGpu
from torch import Tensor
from transformers import LlamaConfig

from hf_certkv import CertifiedQuantizedCache, CorruptedPageError, checksums, shadow
from hf_certkv.checksums import multipliers, page_sums
from hf_certkv.handle import KEYS, VALUES
from hf_certkv.shadow import ShadowPages

pytest.importorskip("triton")

import triton
import triton.language as tl

from hf_certkv.kernels.triton_gather import copy_page, page_address

HERE = torch.device(where.DEVICE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = [(64, 64), (80, 33), (20, 100)]
EVERY = slice(None)


@pytest.fixture(autouse=True)
def _device_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "DEVICE_SUMS", True)


def blocks_of(count: int, dtype: torch.dtype, widths: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random blocks of 16 tokens, 2 rows and 3 heads, in a layout as a layer's buffers give them."""
    states = random_states(16 * count + 5, batch=2, heads=3, widths=widths, dtype=dtype, seed=seed)
    keys, values = (part.to(HERE)[:, :, 5:].unflatten(2, (count, 16)) for part in states)
    return keys, values


def pages_of(dtype: torch.dtype, widths: tuple[int, int]) -> ShadowPages:
    return ShadowPages(0, 2, 3, 16, widths, dtype, HERE)


def sum_in_python(page: Tensor, kind: int) -> int:
    """The checksum as its definition has it, in whole numbers without end."""
    factors = multipliers(kind, page.numel(), page.device).tolist()
    size = page.element_size()
    whole = page.contiguous().view({2: torch.int16, 4: torch.int32}[size]).flatten().tolist()
    total = sum(m * (w % 2 ** (8 * size)) for m, w in zip(factors, whole, strict=True)) % 2**64
    return total - 2**64 if total >= 2**63 else total


def expected_sums(keys: Tensor, values: Tensor) -> Tensor:
    return torch.stack([page_sums(keys, KEYS), page_sums(values, VALUES)], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_page_sums_are_what_their_definition_says(
    dtype: torch.dtype, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = blocks_of(5, dtype, widths)
    parts[0][0, 0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, -float("inf")])
    for scratch in (2**22, 2 * 3 * 16 * 2 * max(widths), 1):  # all at once, two blocks at a time, one
        monkeypatch.setattr(checksums, "SCRATCH", scratch)
        for kind, part in enumerate(parts):
            found = page_sums(part, kind)
            assert found.shape == (2, 3, 5) and found.dtype == torch.int64
            for at in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
                assert int(found[at]) == sum_in_python(part[at], kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_flipped_bit_changes_the_sum(dtype: torch.dtype) -> None:
    part = blocks_of(1, dtype, (4, 4))[0][:1, :1].contiguous()
    whole = {2: torch.int16, 4: torch.int32}[part.element_size()]
    before, places = page_sums(part, KEYS), 0
    for number in range(part.numel()):
        for bit in range(8 * part.element_size()):
            changed = part.clone()
            mask = (1 << bit) - (1 << (8 * part.element_size()) if bit == 8 * part.element_size() - 1 else 0)
            changed.view(whole).view(-1)[number] ^= mask
            assert int(page_sums(changed, KEYS)) != int(before)
            places += 1
    assert places == 8 * part.nbytes


def test_only_a_gpu_has_sums_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "DEVICE_SUMS", False)
    bare = BareCache()
    bare.update(*random_states(400))
    without = bare.layer.nbytes()
    assert bare.layer.shadow is not None and bare.layer.shadow.device_sums.data is None
    monkeypatch.setattr(shadow, "DEVICE_SUMS", True)
    bare = BareCache()
    bare.update(*random_states(400))
    more = {name: size - without[name] for name, size in bare.layer.nbytes().items() if size != without[name]}
    assert more == {"checksums": 2 * bare.layer.store.blocks * 16}


def test_sums_follow_their_blocks() -> None:
    """Through appends, truncation, selection, copies, checkpoints."""
    dtype, widths = torch.float16, (20, 33)
    pages, (keys, values) = pages_of(dtype, widths), blocks_of(40, dtype, widths)
    done = 0
    for count in (1, 7, 1, 12):
        pages.append(keys[:, :, done : done + count], values[:, :, done : done + count])
        done += count
    expected = expected_sums(keys, values)
    assert torch.equal(pages.device_sums.view, expected[:, :, :21])
    index = torch.tensor([1, 0, 1])
    assert torch.equal(pages.selected(index).device_sums.view, expected[index, :, :21])
    undo = pages.checkpoint()
    pages.truncate(9)
    assert torch.equal(pages.device_sums.view, expected[:, :, :9])
    undo()
    assert pages.blocks == 21 and torch.equal(pages.device_sums.view, expected[:, :, :21])
    pages.truncate(9)
    pages.append(keys[:, :, 30:], values[:, :, 30:])
    now = torch.cat([expected[:, :, :9], expected[:, :, 30:]], dim=2)
    assert torch.equal(pages.device_sums.view, now)
    twin = pages.selected(torch.arange(2))
    pages.truncate(0)
    assert torch.equal(twin.device_sums.view, now) and pages.device_sums.view.shape[2] == 0


def test_sums_of_a_layer() -> None:
    """What a layer's operations leave is the sums of what it then holds."""
    bare = BareCache(block_size=16, recent_window=16, exact_below=0)
    states = random_states(300, batch=2)
    bare.update(*(part[:, :, :200] for part in states))
    for i in range(200, 300):
        bare.update(*(part[:, :, i : i + 1] for part in states))

    def assert_right(cache: CertifiedQuantizedCache) -> None:
        (layer,) = cache.certified_layers
        assert layer.shadow is not None
        parts = [layer.shadow.read_range(kind, 0, layer.store.blocks, EVERY, EVERY) for kind in (KEYS, VALUES)]
        keys, values = (part.unflatten(2, (-1, 16)) for part in parts)
        assert torch.equal(layer.shadow.device_sums.view, expected_sums(keys, values)) and layer.store.blocks > 3

    assert_right(bare.cache)
    bare.cache.crop(-77)
    assert_right(bare.cache)
    assert_right(copy.deepcopy(bare.cache))
    bare.cache.reorder_cache(torch.tensor([1, 1]))
    assert_right(bare.cache)
    with failing_step(bare.cache):
        bare.update(*(part[:, :, :64] for part in states))
    assert_right(bare.cache)
    bare.cache.reset()
    bare.update(*(part[:, :, :150] for part in states))
    assert_right(bare.cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_addresses_of_all_pages(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    pages, parts = pages_of(dtype, widths), blocks_of(37, dtype, widths)
    pages.append(*parts)
    pages._settle()
    table = pages.table()
    assert len(pages.slabs) == len(table.slabs) > 1 and table.slabs.dtype == torch.int64 and table.units == 6
    for row in range(37):
        for unit in range(6):
            for kind in (KEYS, VALUES):
                size = table.page_bytes[kind]
                place = (row % table.rows_per_slab) * table.units + unit
                address = int(table.slabs[row // table.rows_per_slab]) + (table.value_offset if kind else 0) + place * size
                page = parts[kind][unit // 3, unit % 3, row].contiguous().cpu().view(torch.uint8).numpy().tobytes()
                assert ctypes.string_at(address, size) == page and address % 16 == 0


def test_the_table_is_made_anew_only_for_other_slabs() -> None:
    pages, (keys, values) = pages_of(torch.float32, (64, 64)), blocks_of(60, torch.float32, (64, 64))
    assert len(pages.table().slabs) == 0
    pages.append(keys[:, :, :1], values[:, :, :1])
    table = pages.table()
    rows = pages.rows_per_slab
    pages.append(keys[:, :, 1:rows], values[:, :, 1:rows])
    pages.truncate(1)
    assert pages.table() is table
    pages.append(keys[:, :, 1:40], values[:, :, 1:40])
    addresses = [slab.memory.data_ptr() for slab in pages.slabs]
    assert pages.table() is not table and pages.table().slabs.tolist() == addresses
    undo = pages.checkpoint()
    pages.truncate(rows + 1)
    assert pages.table().slabs.tolist() == addresses[:2]
    undo()
    assert pages.table().slabs.tolist() == addresses


@contextmanager
def failing_step(cache: CertifiedQuantizedCache) -> Iterator[None]:
    """What runs inside is undone."""
    with pytest.raises(RuntimeError, match="fails"), cache.step_guard():  # noqa: PT012
        yield
        raise RuntimeError("fails")


@triton.jit
def _read(slabs, rows_per_slab, units, value_offset, out, sums, factors, KIND: tl.constexpr, COUNT: tl.constexpr,
          WIDE: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    unit, block = tl.program_id(0), tl.program_id(1)
    size: tl.constexpr = COUNT * (4 if WIDE else 2)
    address = page_address(slabs, rows_per_slab, units, block, unit, value_offset * KIND, size)
    place = unit * tl.num_programs(1) + block
    tl.store(sums + place, copy_page(address, out + place * COUNT, factors, COUNT, WIDE, STEP))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS[1:], ids=str)
def test_a_kernel_reads_pages_by_their_addresses(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    pages, parts = pages_of(dtype, widths), blocks_of(11, dtype, widths)
    pages.append(*parts)
    table = pages.table()
    pages.ready()
    for kind, part in enumerate(parts):
        out, sums = (
            torch.empty_like(part, memory_format=torch.contiguous_format),
            torch.empty(2, 3, 11, dtype=torch.int64, device=HERE),
        )
        wide, count = dtype == torch.float32, 16 * widths[kind]
        _read[(6, 11)](
            table.slabs, table.rows_per_slab, table.units, table.value_offset, out.view(torch.int32 if wide else torch.int16),
            sums, multipliers(kind, count, HERE), KIND=kind, COUNT=count, WIDE=wide, STEP=512,
        )  # fmt: skip
        assert torch.equal(out, part)
        assert torch.equal(sums, pages.device_sums.view[..., kind]) and torch.equal(sums, page_sums(part, kind))


# Copies on a side stream, with streams that are late.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    if HERE.type != "cpu":
        pytest.skip("these streams are not real")
    return FakeGpu(monkeypatch)


def host_sums(pages: ShadowPages) -> list[list[int]]:
    return [
        slab.sums[kind][place].flatten().tolist() for slab, place in map(pages._place, range(pages.blocks)) for kind in (0, 1)
    ]


def test_appending_waits_for_nothing(gpu: FakeGpu) -> None:
    dtype, widths = torch.float16, (20, 33)
    pages, (keys, values) = pages_of(dtype, widths), blocks_of(30, dtype, widths)
    for first, last in ((0, 3), (3, 4), (4, 30)):
        gpu.log.clear()
        pages.append(keys[:, :, first:last], values[:, :, first:last])
        pages.table()
        # Behind what the current stream has computed; the sources stay; the event comes last.
        assert gpu.log[0] == "wait_stream" and gpu.log[-2:] == ["keep", "record"] and set(gpu.log[1:-2]) == {"copy"}
    assert len(pages._pending) == 3 and gpu.waits() == 0
    assert torch.equal(pages.device_sums.view, expected_sums(keys, values))
    pages.flush()  # nothing has arrived
    assert len(pages._pending) == 3 and gpu.waits() == 0
    assert not any(any(part) for part in host_sums(pages))
    gpu.streams[0].run(pages._pending[1].event.at)
    pages.flush()
    assert len(pages._pending) == 1 and gpu.waits() == 0
    # The host reads: now it waits.
    assert torch.equal(pages.read_range(KEYS, 0, 30, EVERY, EVERY), keys.flatten(2, 3))
    assert gpu.waits() == 1 and not pages._pending
    index = tuple(torch.tensor(part) for part in ([1, 0], [2, 1], [29, 3]))
    assert torch.equal(pages.read_pages(VALUES, *index), values[index])


def test_late_copies_get_the_checksums_of_early_ones(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = blocks_of(20, torch.bfloat16, (64, 64))
    pages = pages_of(torch.bfloat16, (64, 64))
    pages.append(keys, values)
    gpu.finish()
    pages.flush()
    monkeypatch.undo()
    plain = pages_of(torch.bfloat16, (64, 64))
    plain.append(keys, values)
    assert host_sums(pages) == host_sums(plain)


def test_sources_live_until_they_are_copied(gpu: FakeGpu) -> None:
    pages = pages_of(torch.float32, (64, 64))
    keys, values = (part.contiguous() for part in blocks_of(4, torch.float32, (64, 64)))
    expected, kept = keys.clone(), keys.data_ptr()
    pages.append(keys, values)
    del keys
    gc.collect()
    assert pages._pending[0].sources[0].untyped_storage().data_ptr() == kept
    gpu.finish()
    pages.flush()
    assert not pages._pending
    assert torch.equal(pages.read_range(KEYS, 0, 4, EVERY, EVERY), expected.flatten(2, 3))


def test_kernels_wait_for_copies_and_the_host_does_not(gpu: FakeGpu) -> None:
    pages, (keys, values) = pages_of(torch.float32, (20, 33)), blocks_of(3, torch.float32, (20, 33))
    pages.ready()
    pages.append(keys[:, :, :1], values[:, :, :1])
    pages.append(keys[:, :, 1:], values[:, :, 1:])
    gpu.log.clear()
    pages.ready()
    assert gpu.log == ["wait_event", "wait_event"]
    table = pages.table()
    assert ctypes.string_at(int(table.slabs[0]), 4) == keys[0, 0, 0, 0, :1].numpy().tobytes()  # it has come


def test_a_cut_waits_only_for_copies_that_it_concerns(gpu: FakeGpu) -> None:
    pages, (keys, values) = pages_of(torch.float32, (20, 33)), blocks_of(40, torch.float32, (20, 33))
    pages.append(keys[:, :, :10], values[:, :, :10])
    pages.truncate(10)
    assert gpu.waits() == 0 and len(pages._pending) == 1
    pages.append(keys[:, :, 10:20], values[:, :, 10:20])
    pages.truncate(14)
    assert gpu.waits() == 2 and not pages._pending
    pages.append(keys[:, :, 30:], values[:, :, 30:])
    now = torch.cat([keys[:, :, :14], keys[:, :, 30:]], dim=2)
    assert torch.equal(pages.read_range(KEYS, 0, 24, EVERY, EVERY), now.flatten(2, 3))
    pages.append(keys[:, :, :1], values[:, :, :1])
    rows = torch.tensor([1, 1, 0])
    twin = pages.selected(rows)
    expected = torch.cat([now, keys[:, :, :1]], dim=2)[rows]
    assert torch.equal(twin.read_range(KEYS, 0, 25, EVERY, EVERY), expected.flatten(2, 3))
    assert torch.equal(twin.device_sums.view, pages.device_sums.view[rows])


def test_slabs_that_kernels_may_read_are_let_go_behind_them(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    original = ShadowPages._let_go
    monkeypatch.setattr(ShadowPages, "_let_go", lambda self, slabs: (freed.append(len(slabs)), original(self, slabs)))
    pages, parts = pages_of(torch.float32, (64, 64)), blocks_of(40, torch.float32, (64, 64))
    pages.append(*parts)
    pages.table()
    held = len(pages.slabs)
    pages.truncate(3)
    assert freed == [held - 1]
    del pages
    gc.collect()
    assert freed == [held - 1, 1]


def two_layers(**changes: Any) -> CertifiedQuantizedCache:
    settings = {"block_size": 16, "recent_window": 16, "exact_below": 0, "certify_queries": 4, **changes}
    return CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=2), **settings)


Step = Callable[[int, int], None]


def chunks(cache: CertifiedQuantizedCache, states: list[tuple[Tensor, Tensor]], first: int, last: int) -> None:
    """One exact step of two layers: each is updated, and its originals are read as exact attention does."""
    for i, parts in enumerate(states):
        handles = cache.update(*(part[:, :, first:last] for part in parts), i)
        for kind in (KEYS, VALUES):
            found = handles[kind] if first == 0 else handles[kind].materialise()
            assert torch.equal(found, parts[kind][:, :, :last]), (i, kind)


def test_prefill_in_chunks_fetches_the_next_layer_ahead(gpu: FakeGpu) -> None:
    states = [random_states(400, batch=2, seed=seed) for seed in (1, 2)]
    cache = two_layers()
    first, second = cache.certified_layers
    chunks(cache, states, 0, 100)
    gpu.finish()
    cache.update(*(part[:, :, 100:200] for part in states[0]), 0)[0]
    gpu.log.clear()
    for kind in (KEYS, VALUES):
        assert torch.equal(first.materialise(kind), states[0][kind][:, :, :200])
    # Blocks of this very step come from the device; those before have arrived: the host has not waited.
    assert gpu.waits() == 0 and first.ahead is None
    assert second.ahead is not None and second.ahead.blocks == 4 and set(second.ahead.pages) == {KEYS, VALUES}
    assert second.shadow is not None
    second.shadow.flush()
    gpu.log.clear()
    cache.update(*(part[:, :, 100:200] for part in states[1]), 1)
    assert torch.equal(second.materialise(KEYS), states[1][KEYS][:, :, :200])
    assert set(second.ahead.pages) == {VALUES}
    assert torch.equal(second.materialise(VALUES), states[1][VALUES][:, :, :200])
    assert second.ahead is None and gpu.waits() == 0 and "wait_event" in gpu.log
    for step in range(200, 400, 50):
        chunks(cache, states, step, step + 50)
    assert first.ahead is None and second.ahead is None


@pytest.mark.parametrize("what", ["crop", "reorder", "reset", "undone", "one token"])
def test_what_was_fetched_ahead_is_dropped_with_what_it_was_of(gpu: FakeGpu, what: str) -> None:
    states = [random_states(300, batch=2, seed=seed) for seed in (1, 2)]
    cache = two_layers()
    _, second = cache.certified_layers
    chunks(cache, states, 0, 100)
    if what == "undone":
        with failing_step(cache):
            for i, parts in enumerate(states):
                cache.update(*(part[:, :, 100:200] for part in parts), i)
                second.fetch_ahead()
        assert second.ahead is None
        return chunks(cache, states, 100, 200)
    chunks(cache, states, 100, 200)
    second.fetch_ahead()
    assert second.ahead is not None
    if what == "crop":
        cache.crop(-100)
        assert second.ahead is None
        return chunks(cache, states, 100, 300)
    if what == "reset":
        cache.reset()
        assert second.ahead is None
        return chunks(cache, states, 0, 300)
    if what == "reorder":
        cache.reorder_cache(torch.tensor([1, 1]))
        states = [tuple(part[[1, 1]] for part in parts) for parts in states]  # type: ignore[misc]
        assert second.ahead is None
        return chunks(cache, states, 200, 300)
    chunks(cache, states, 200, 201)
    assert second.ahead is None
    return chunks(cache, states, 201, 300)


def test_what_was_fetched_ahead_is_verified_before_it_is_used(gpu: FakeGpu) -> None:
    states = [random_states(300, batch=2, seed=seed) for seed in (1, 2)]
    cache = two_layers()
    _, second = cache.certified_layers
    chunks(cache, states, 0, 200)
    second.fetch_ahead()
    gpu.finish()
    assert second.shadow is not None
    second.shadow.flush()
    second.shadow.slabs[0].pages[VALUES].view(torch.int32)[3, 1, 1, 2, 7] ^= 4
    assert torch.equal(second.materialise(KEYS), states[1][KEYS][:, :, :200])
    with pytest.raises(CorruptedPageError, match="block 3"):
        second.materialise(VALUES)


def test_a_copy_has_nothing_on_its_way(gpu: FakeGpu) -> None:
    states = [random_states(200, seed=seed) for seed in (1, 2)]
    cache = two_layers()
    chunks(cache, states, 0, 200)
    cache.certified_layers[1].fetch_ahead()
    twin = copy.deepcopy(cache)
    assert twin.certified_layers[1].ahead is None
    for layer, parts in zip(twin.certified_layers, states, strict=True):
        assert torch.equal(layer.materialise(KEYS), parts[KEYS])
