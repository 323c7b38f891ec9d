"""Hot slots: what is in them is what they say, whatever is done to them, by the host or by the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import where
from conftest import BareCache, random_states
from fake_streams import FakeGpu
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_certkv import hot_slots, layers, shadow
from hf_certkv.handle import KEYS, VALUES
from hf_certkv.hot_slots import HOT_SHARE, HotSlots, hot_budget, map_room
from hf_certkv.shadow import ShadowPages
from hf_certkv.store import Index

pytest.importorskip("triton")
HERE = torch.device(where.DEVICE)
BATCH, HEADS, BLOCK, WIDTHS = 2, 2, 16, (6, 10)


@pytest.fixture(autouse=True)
def _device_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "DEVICE_SUMS", True)


def originals(count: int, dtype: torch.dtype, widths: tuple[int, int] = WIDTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks `[batch, heads, count, block, channels]`, no two alike."""
    states = random_states(BLOCK * count, batch=BATCH, heads=HEADS, widths=widths, dtype=dtype, seed=seed)
    keys, values = (part.to(HERE).unflatten(2, (count, BLOCK)) for part in states)
    return keys, values


def pages_of(parts: tuple[Tensor, Tensor]) -> ShadowPages:
    pages = ShadowPages(0, *parts[0].shape[:2], BLOCK, (parts[0].shape[-1], parts[1].shape[-1]), parts[0].dtype, HERE)
    pages.append(*parts)
    return pages


def named(hot: HotSlots) -> list[list[list[int]]]:
    """The blocks in the slots of every row and head, in the order of the slots."""
    return [] if hot.blocks is None else hot.blocks.tolist()


def assert_consistent(hot: HotSlots, parts: tuple[Tensor, Tensor]) -> None:
    """Slots hold what they name, each block once; the map says where, and nothing else."""
    if hot.blocks is None:
        assert hot.slot_of is None and hot.nbytes == 0 and hot.slot_map(5) is None
        return
    assert hot.keys is not None and hot.values is not None and hot.used is not None
    assert hot.blocks.shape == hot.used.shape and hot.blocks.shape[2] == hot.slots == hot.keys.shape[2] == hot.values.shape[2]
    expected: dict[tuple[int, int, int], int] = {}
    for row, heads in enumerate(named(hot)):
        for head, blocks in enumerate(heads):
            for slot, block in enumerate(blocks):
                assert -1 <= block < parts[0].shape[2]
                assert (block >= 0) == (int(hot.used[row, head, slot]) >= 0)
                if block >= 0:
                    assert (row, head, block) not in expected
                    expected[row, head, block] = slot
                    for held, part in zip((hot.keys, hot.values), parts, strict=True):
                        assert torch.equal(held[row, head, slot], part[row, head, block])
    if hot.slot_of is not None:
        assert hot.slot_of.dtype == torch.int32 and hot.slot_of.is_contiguous()
        assert hot.slot_of.shape[:2] == hot.blocks.shape[:2]
        found = {tuple(at): int(hot.slot_of[tuple(at)]) for at in (hot.slot_of >= 0).nonzero().tolist()}
        assert found == {at: slot for at, slot in expected.items() if at[2] < hot.slot_of.shape[2]}


def index_of(chosen: list[tuple[int, int, int]]) -> Index:
    rows, heads, blocks = (torch.tensor(part, dtype=torch.int64, device=HERE) for part in zip(*chosen, strict=True))
    return rows, heads, blocks


class Story:
    """Slots, the originals they are of, and what was done to them: each step is checked against what lists say."""

    def __init__(self, slots: int, dtype: torch.dtype, data: Any) -> None:
        self.hot, self.parts, self.data, self.step = HotSlots(slots), originals(11, dtype), data, 0
        self.pages = pages_of(self.parts)

    def draw(self, strategy: Any) -> Any:
        return self.data.draw(strategy)

    def insert(self) -> None:
        absent = [
            (row, head, block)
            for row in range(len(self.parts[0]))
            for head in range(HEADS)
            for block in range(self.pages.blocks)
            if self.hot.blocks is None or block not in named(self.hot)[row][head]
        ]
        chosen = self.draw(st.lists(st.sampled_from(absent), max_size=5, unique=True)) if absent else []
        if not chosen:
            return
        index = index_of(chosen)
        self.hot.insert(index, self.parts[0][index], self.parts[1][index], len(self.parts[0]), HEADS, self.step)
        for row, head in {at[:2] for at in chosen} if self.hot.slots else ():
            new = [at[2] for at in chosen if at[:2] == (row, head)]
            assert len(set(new) & set(named(self.hot)[row][head])) == min(len(new), self.hot.slots)

    def refill(self) -> None:
        shape = (len(self.parts[0]), HEADS, self.pages.blocks)
        generator = torch.Generator().manual_seed(self.draw(st.integers(0, 1000)))
        mass = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
        promoted: Tensor = self.draw(st.sampled_from([mass, mass > 0]))
        per_step = self.draw(st.integers(1, 4))
        before = None if self.hot.blocks is None or self.hot.used is None else (named(self.hot), self.hot.used.tolist())
        self.hot.refill(promoted.to(HERE), self.pages, self.step, per_step)
        if not self.hot.slots or not self.pages.blocks:
            return
        for row in range(shape[0]):
            for head in range(HEADS):
                given = mass[row, head].tolist()
                blocks, used = ([-1], [-1]) if before is None else (before[0][row][head], before[1][row][head])
                if before is None:
                    blocks, used = [-1] * self.hot.slots, [-1] * self.hot.slots
                used = [self.step if b >= 0 and given[b] > 0 else u for b, u in zip(blocks, used, strict=True)]
                absent = sorted((b for b in range(shape[2]) if given[b] > 0 and b not in blocks), key=lambda b: -given[b])
                free = [u for u in used if u < self.step]
                count = min(per_step, len(absent), len(free))
                now = named(self.hot)[row][head]
                fresh = {b for b in now if b >= 0} - set(blocks)
                assert len(fresh) == count and fresh <= set(absent)
                if promoted.dtype != torch.bool:
                    assert fresh == set(absent[:count])
                gone = [u for b, u, n in zip(blocks, used, now, strict=True) if b != n]
                assert sorted(gone) == sorted(used)[: len(gone)] and len(gone) == count
                assert self.hot.used is not None
                times = self.hot.used[row, head].tolist()
                for b, u, n, t in zip(blocks, used, now, times, strict=True):
                    assert t == (u if b == n else self.step)

    def truncate(self) -> None:
        kept = self.draw(st.integers(0, self.pages.blocks))
        before = named(self.hot)
        self.hot.truncate(kept)
        assert named(self.hot) == [[[b if b < kept else -1 for b in bs] for bs in heads] for heads in before]
        self.pages.truncate(kept)
        more = originals(self.draw(st.integers(0, 6)), self.parts[0].dtype, seed=self.step + 1)
        chosen = [part[: len(self.parts[0])] for part in more]
        if chosen[0].shape[0] < len(self.parts[0]):
            chosen = [part[torch.zeros(len(self.parts[0]), dtype=torch.int64, device=HERE)] for part in more]
        self.pages.append(chosen[0], chosen[1])
        self.parts = tuple(torch.cat([old[:, :, :kept], new], dim=2) for old, new in zip(self.parts, chosen, strict=True))  # type: ignore[assignment]

    def select(self) -> None:
        rows = self.draw(st.lists(st.integers(0, len(self.parts[0]) - 1), min_size=1, max_size=3))
        index, before = torch.tensor(rows, device=HERE), named(self.hot)
        self.hot, self.pages = self.hot.selected(index), self.pages.selected(index)
        self.parts = (self.parts[0][index], self.parts[1][index])
        assert not before or named(self.hot) == [before[row] for row in rows]

    def clear(self) -> None:
        self.hot.clear()
        assert all(b == -1 for heads in named(self.hot) for blocks in heads for b in blocks)

    def resize(self) -> None:
        slots, before = self.draw(st.integers(0, 4)), named(self.hot)
        used = [] if self.hot.used is None else self.hot.used.tolist()
        self.hot.resize(slots)
        assert self.hot.slots == slots
        for row, heads in enumerate(before if self.hot.blocks is not None else []):
            for head, blocks in enumerate(heads):
                times = dict(zip(blocks, used[row][head], strict=True))
                kept = [b for b in named(self.hot)[row][head] if b >= 0]
                filled = sorted((t for b, t in times.items() if b >= 0), reverse=True)
                assert set(kept) <= set(times) and sorted((times[b] for b in kept), reverse=True) == filled[:slots]

    def touch(self) -> None:
        held = [(r, h, b) for r, hs in enumerate(named(self.hot)) for h, bs in enumerate(hs) for b in bs if b >= 0]
        chosen = self.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        if not chosen:
            return
        assert self.hot.used is not None and self.hot.blocks is not None
        before = self.hot.used.clone()
        self.hot.touch(index_of(chosen), self.step)
        for row, head, slot in (self.hot.blocks >= -1).nonzero().tolist():
            here = (row, head, int(self.hot.blocks[row, head, slot])) in chosen
            assert int(self.hot.used[row, head, slot]) == (self.step if here else int(before[row, head, slot]))

    def copied(self) -> None:
        old, self.hot = self.hot, copy.deepcopy(self.hot)
        assert named(old) == named(self.hot)
        old.clear()

    def mapped(self) -> None:
        made = self.hot.slot_map(self.pages.blocks)
        assert (made is None) == (self.hot.blocks is None) and (made is None or made.shape[2] >= self.pages.blocks)


def play(data: Any, names: list[str], dtype: torch.dtype) -> None:
    story = Story(data.draw(st.integers(0, 3)), dtype, data)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=12)):
        story.step += 1
        if data.draw(st.booleans()):  # from here on there is a map to be kept right
            story.mapped()
        getattr(story, name)()
        assert_consistent(story.hot, story.parts)


BY_HOST = ["insert", "insert", "insert", "truncate", "truncate", "select", "clear", "resize", "touch", "copied"]
UNSHRUNK = [phase for phase in Phase if phase is not Phase.shrink]  # that takes minutes in the interpreter
QUICK = settings(phases=UNSHRUNK, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(QUICK, max_examples=40)
@given(st.data())
def test_whatever_the_host_does(data: Any) -> None:
    play(data, BY_HOST, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_the_device_does_too(dtype: torch.dtype) -> None:
    @settings(QUICK, max_examples=12)
    @given(st.data())
    def run(data: Any) -> None:
        play(data, ["refill"] * 7 + BY_HOST, dtype)

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pages_of_many_sizes_arrive(dtype: torch.dtype) -> None:
    for widths in ((80, 33), (300, 20)):  # the last is more than one step of the loop
        parts = originals(19, dtype, widths)
        parts[0][0, 0, 3, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
        pages, hot = pages_of(parts), HotSlots(5)
        promoted = torch.zeros(BATCH, HEADS, 19, dtype=torch.bool, device=HERE)
        promoted[:, :, [0, 3, 8, 18]] = True
        hot.refill(promoted, pages, 0)
        found = hot.lookup(19)
        assert found is not None and len(found[0][0]) == 4 * BATCH * HEADS
        for held, part in zip(found[1:], parts, strict=True):
            whole = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(held.view(whole), part[found[0]].view(whole))


@pytest.mark.parametrize("kind", [KEYS, VALUES])
@pytest.mark.parametrize("of_sum", [False, True])
def test_a_page_with_a_wrong_checksum_gets_no_slot(kind: int, of_sum: bool) -> None:
    parts = originals(9, torch.float16)
    pages, hot = pages_of(parts), HotSlots(2)
    hot.refill(torch.eye(9, dtype=torch.bool, device=HERE)[[1, 2]].any(0).expand(BATCH, HEADS, 9), pages, 0)
    assert named(hot)[1][0] == named(hot)[0][0] and set(named(hot)[1][0]) == {1, 2}
    if of_sum:
        pages.device_sums.view[1, 0, 7, kind] ^= 1 << 63 - 3
    else:
        pages._settle()
        slab, place = pages._place(7)
        slab.pages[kind].view(torch.int16)[place, 1, 0, 5, 3] ^= 1
    promoted = torch.zeros(BATCH, HEADS, 9, device=HERE)
    promoted[:, :, 7], promoted[:, :, 8] = 0.5, 0.25
    hot.refill(promoted, pages, 1)
    assert sorted(named(hot)[1][0]) == [-1, 8] and set(named(hot)[0][1]) == {7, 8}
    found = hot.slot_map(9)
    assert found is not None and found[1, 0].tolist().count(-1) == found.shape[2] - 1 and int(found[1, 0, 7]) == -1
    assert_consistent(hot, parts)


def test_a_damaged_number_of_a_block_harms_no_other_memory() -> None:
    parts = originals(6, torch.float32)
    pages, hot = pages_of(parts), HotSlots(2)
    every = torch.ones(BATCH, HEADS, 6, device=HERE)
    hot.refill(every, pages, 0)
    for damaged in (2**62, 10**6, -(2**40)):
        assert hot.blocks is not None and hot.used is not None
        hot.blocks[0, 0, 1], hot.used[0, 0, 1] = damaged, -1
        hot.slot_of = None
        hot.refill(every, pages, 5)
        assert all(0 <= b < 6 for b in named(hot)[0][0])
        assert_consistent(hot, parts)


def test_masses_that_are_no_numbers_promote_nothing() -> None:
    parts = originals(4, torch.float32)
    pages, hot = pages_of(parts), HotSlots(2)
    promoted = torch.full((BATCH, HEADS, 4), float("nan"), device=HERE)
    promoted[0, 0, 2] = 1e-30
    hot.refill(promoted, pages, 0)
    assert named(hot) == [[[2, -1], [-1, -1]], [[-1, -1], [-1, -1]]]


def test_a_refill_is_waited_for_by_streams_only(monkeypatch: pytest.MonkeyPatch) -> None:
    if HERE.type != "cpu":
        pytest.skip("these streams are not real")
    gpu = FakeGpu(monkeypatch)
    parts = originals(9, torch.float16)
    pages, hot = pages_of(parts), HotSlots(2)
    gpu.finish()
    pages.flush()
    promoted = torch.ones(BATCH, HEADS, 9)
    pages.table()
    gpu.log.clear()
    hot.refill(promoted, pages, 0)
    assert gpu.log == ["wait_stream", "keep", "record"]
    gpu.streams[0].queue.append(lambda: None)  # as if the refill were still under way
    assert hot._refilled is not None
    hot._refilled.at += 1  # type: ignore[attr-defined]
    event = hot._refilled
    for use in (hot.lookup, hot.truncate, hot.slot_map):
        gpu.log.clear()
        hot._refilled, gpu.streams[0].done = event, event.at - 1  # type: ignore[attr-defined]
        use(8)
        assert gpu.log[0] == "wait_event" and gpu.waits() == 0
    gpu.log.clear()
    hot._refilled, gpu.streams[0].done = event, event.at - 1  # type: ignore[attr-defined]
    hot.selected(torch.tensor([1]))
    assert gpu.log[0] == "wait_event" and gpu.waits() == 0
    assert hot._refilled is None  # it has come: nobody asks again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["reference"] + ["triton"] * (HERE.type != "cpu"))  # minutes in the interpreter
def test_steps_of_a_layer_with_refills(kernel: str, dtype: torch.dtype) -> None:
    """Decode steps whose promotions the device keeps: certified, audited, and the slots are right in the end."""
    keys, values = random_states(150, batch=2, widths=(16, 32), dtype=dtype)
    states = keys.to(HERE), values.to(HERE)
    shares = {"dense_head_share": 1.0, "dense_layer_share": 1.0}
    small = {"block_size": 16, "recent_window": 16, "exact_below": 0}
    bare = BareCache(**small, hot_blocks=3, rtol=0.02, refine="off", audit=True, kernel=kernel, **shares)
    bare.update(*(part[:, :, :138] for part in states))
    assert bare.layer.refills
    hot_steps = 0
    for i in range(138, 150):
        handles = bare.update(*(part[:, :, i : i + 1] for part in states))
        query = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(i // 3)).to(HERE, dtype)
        F.scaled_dot_product_attention(query, *handles, enable_gqa=True)
        assert bare.layer.wanted is None
        hot_steps += bare.layer.hot.lookup(10**6) is not None
        if i == 142:
            bare.cache.reorder_cache(torch.tensor([1, 0]))
            states = (states[0][[1, 0]], states[1][[1, 0]])
        if i == 146:
            bare.cache.crop(-30)
            bare.update(*(part[:, :, 117:147] for part in states))
    report = bare.cache.scrub()
    assert hot_steps > 5 and report.hot > 0 and report.hot_damaged == 0
    found = bare.layer.hot.lookup(10**6)
    assert found is not None and bare.layer.sink_tokens == 16
    for kind, held in ((KEYS, found[1]), (VALUES, found[2])):
        whole = states[kind][:, :, 16 : 16 + 16 * bare.layer.store.blocks].unflatten(2, (-1, 16))
        assert torch.equal(held, whole[found[0]])
    twin = copy.deepcopy(bare.cache)
    assert twin.certified_layers[0].hot.lookup(10**6) is not None


def test_the_budget_keeps_its_share() -> None:
    for tokens in (0, 100, 1599, 1700, 4096, 100_000, 131_072):
        for block, widths, item in ((64, (128, 128), 2), (16, (64, 64), 4), (128, (80, 33), 2)):
            slots, token = hot_budget(tokens, block, widths, item), sum(widths) * item

            def size(count: int, token: int = token, block: int = block, tokens: int = tokens) -> int:
                return count * (block * token + 16) + 4 * map_room(tokens // block)

            assert slots == 0 or size(slots) <= HOT_SHARE * tokens * token < size(slots + 1)
    assert hot_budget(131_072, 64, (128, 128), 2) == 81
    assert [map_room(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


def test_slots_grow_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody says how many: none on a CPU; elsewhere as many as fit, reallocated when they can be doubled."""
    states = random_states(6000, heads=1, widths=(16, 16))
    bare = BareCache(block_size=16)
    bare.layer.config = bare.cache.settings.replace(hot_blocks=None)
    bare.update(*states)
    assert bare.layer.hot.slots == 0
    monkeypatch.setattr(layers, "AUTOMATIC", ("cpu",))
    bare = BareCache(block_size=16)
    bare.layer.config = bare.cache.settings.replace(hot_blocks=None)
    seen = []
    for first in range(0, 6000, 200):
        bare.update(*(part[:, :, first : first + 200] for part in states))
        budget = hot_budget(first + 200, 16, (16, 16), 4)
        assert budget / 2 < bare.layer.hot.slots <= budget or budget == bare.layer.hot.slots == 0
        seen.append(bare.layer.hot.slots)
        dense = bare.layer.dense_nbytes()
        bare.layer.hot.insert(index_of([(0, 0, 1)]), *(part[:, 0, 16:32] for part in states), 1, 1, first)
        bare.layer.hot.slot_map(bare.layer.store.blocks)
        assert bare.layer.nbytes()["hot"] <= HOT_SHARE * dense
    assert seen == sorted(seen) and len(set(seen)) < 6 and seen[-1] > 4
    bare.cache.crop(-3000)
    bare.update(*(part[:, :, 3000:3001] for part in states))
    assert bare.layer.hot.slots <= hot_budget(3001, 16, (16, 16), 4)
    explicit = BareCache(block_size=16, hot_blocks=2)
    explicit.update(*states)
    assert explicit.layer.hot.slots == 2


def test_no_memory_for_more_slots_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, hot = originals(4, torch.float32), HotSlots(1)
    index = index_of([(0, 1, 2)])
    hot.insert(index, parts[0][index], parts[1][index], BATCH, HEADS, 0)

    def refuse(*given: Any) -> None:
        raise torch.OutOfMemoryError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(HotSlots, "_make", refuse)
        hot.fit(5)
    assert hot.slots == 1
    assert_consistent(hot, parts)
    hot.fit(5)
    assert hot.slots == 5 and named(hot)[0][1].count(2) == 1


def test_the_host_refills_where_the_device_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = BareCache(hot_blocks=2)
    bare.update(*random_states(400))
    assert bare.layer.refills == (HERE.type == "cpu")  # in the interpreter, since DEVICE_SUMS is on
    assert hot_slots.gathers(torch.device("cuda", 0))
    monkeypatch.setattr(hot_slots, "_triton_installed", lambda: False)
    assert not bare.layer.refills and not hot_slots.gathers(torch.device("cuda", 0))
    monkeypatch.undo()
    bare = BareCache(hot_blocks=2)
    bare.update(*random_states(400))
    assert not bare.layer.refills  # nobody asked for checksums that kernels can use


def test_the_map_follows_what_is_cut_and_cleared() -> None:
    parts, hot = originals(5, torch.float32), HotSlots(2)
    index = index_of([(0, 0, 1), (0, 0, 4), (1, 1, 3)])
    hot.insert(index, parts[0][index], parts[1][index], BATCH, HEADS, 0)
    made = hot.slot_map(5)
    assert made is not None and (made >= 0).nonzero().tolist() == [[0, 0, 1], [0, 0, 4], [1, 1, 3]]
    hot.truncate(3)
    assert hot.slot_of is made and (made >= 0).nonzero().tolist() == [[0, 0, 1]]
    assert_consistent(hot, parts)
    hot.clear()
    assert hot.slot_of is made and not bool((made >= 0).any())
