"""Planted bugs in what a cache holds after a crop, a reorder, a copy or a promotion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from plants_base import Apply, Detect, Patch, Plant, in_state, instead, longer, step
from torch import Tensor

from hf_certkv import CorruptedPageError, StaleHandleError
from hf_certkv.handle import Handle
from hf_certkv.layers import CertifiedLayer
from hf_certkv.shadow import ShadowPages
from hf_certkv.store import BlockStore, GrowingBuffer, HotSlots
from hf_certkv.verify.cases import Case, call_on, tensors
from hf_certkv.verify.worst_cases import above, equal_values

ORDER = torch.tensor([1, 0])


def beams(**changes: Any) -> Case:
    """Two batch rows, the second with values of the other sign and fifty times as large."""
    case = equal_values(**changes)
    query, keys = (part.expand(2, -1, -1, -1).clone() for part in (case.query, case.keys))
    return replace(case, query=query, keys=keys, values=torch.cat([case.values, -50 * case.values]))


def crossed(case: Case) -> Case:
    """The same where keys are worth promoting as well, and promoted blocks are kept."""
    keys = case.keys.clone().index_fill_(2, torch.tensor(20), 1.0)
    return above(replace(case, keys=keys), atol=0.0, rtol=1e-3, refine="off", hot_blocks=8)


def dense_beams() -> Case:
    """Two batch rows, dense."""
    return above(beams(), atol=0.0, rtol=0.0)


def ordinary() -> Case:
    """Ordinary numbers, served as they are read."""
    q, k, v = tensors("normal", torch.float32, 81, 8, 8, 1, 1, 3)
    return Case(q, k, v, settings={"rtol": 0.5})


def unlike_tails() -> Case:
    """Two batch rows whose exact tokens are unlike and weigh nearly everything."""
    case = beams(recent_window=8)
    keys, values = case.keys.clone(), case.values.clone()
    keys[:, :, -8:], values[0, :, -8:], values[1, :, -8:] = 4.0, 1.0, -1.0
    return replace(case, query=case.query + 1.0, keys=keys, values=values)


def reordered(cache: Any, case: Case) -> tuple[Case, None]:
    """Beam search swaps the rows."""
    cache.reorder_cache(ORDER)
    return longer(case, case.keys[ORDER], case.values[ORDER]), None


def used_and_reordered(cache: Any, case: Case) -> tuple[Case, None]:
    """The same after two steps: what the first one promotes is kept from the second one on."""
    case = longer(case)
    step(cache, case)
    return reordered(cache, case)


def repeated(cache: Any, case: Case) -> tuple[Case, None]:
    """Every row twice, side by side."""
    cache.batch_repeat_interleave(2)
    index = torch.tensor([0, 0, 1, 1])
    return longer(case, case.keys[index], case.values[index], case.query[index]), None


def refilled(cache: Any, case: Case) -> tuple[Case, None]:
    """Two steps, a crop to the first token, and other tokens: values fifty times as large."""
    for _ in range(2):
        case = longer(case)
        step(cache, case)
    cache.crop(1 - case.keys.shape[2])
    values = case.values.clone()
    values[:, :, 1:] *= -50
    cache.update(case.keys[:, :, 1:], values[:, :, 1:], 0)
    return longer(case, values=values), None


def cropped(cache: Any, case: Case) -> tuple[Case, None]:
    """A crop into the last block but one."""
    cache.crop(-30)
    return longer(case, case.keys[:, :, :-30], case.values[:, :, :-30]), None


def copied(cache: Any, case: Case) -> tuple[Case, Tensor]:
    """A copy goes on while the cache that it was made of is cropped and filled with other tokens."""
    other = copy.deepcopy(cache)
    refilled(cache, case)
    after = longer(case)
    output = step(other, after)
    other.recorder.commit()
    cache.recorder.commit()
    cache.recorder.records.extend(other.recorder.records)
    return after, output


def kept_handles(cache: Any, case: Case) -> tuple[Case, Tensor | None]:
    """Handles used after a reorder: either refused, or they stand for what they stood for."""
    after = longer(case)
    handles = cache.update(after.keys[:, :, -1:], after.values[:, :, -1:], 0)
    cache.reorder_cache(ORDER)
    try:
        return after, call_on(after, *handles)
    except StaleHandleError:
        again = longer(after, after.keys[ORDER], after.values[ORDER])
        return again, None


def overwritten(cache: Any, case: Case) -> tuple[Case, Tensor | None]:
    """One byte of a page of originals changed: either refused, or the output is right all the same."""
    (layer,) = cache.certified_layers
    page = layer.shadow.slabs[0].pages[1][0, 0, 0]
    page.view(-1).view(torch.uint8)[2] ^= 0x40
    try:
        return longer(case), step(cache, longer(case))
    except CorruptedPageError:
        page.view(-1).view(torch.uint8)[2] ^= 0x40
        # The step that failed is undone: the same token once more.
        return longer(case), None


def not_selected(*names: str) -> Apply:
    """Parts of the store that keep their batch rows where others are reordered."""

    def apply(patch: Patch) -> None:
        original = BlockStore.selected

        def selected(self: BlockStore, index: Tensor) -> BlockStore:
            new = original(self, index)
            for own, others in ((new.keys, self.keys), (new.values, self.values)):
                for name in names:
                    own[name] = others[name]
            return new

        patch.setattr(BlockStore, "selected", selected)

    return apply


def kept_numbers(patch: Patch) -> None:
    """The numbers that a place had first, whatever is written there later."""
    original = BlockStore.append
    kept: dict[int, Tensor] = {}

    def append(self: BlockStore, keys: Tensor, values: Tensor) -> None:
        original(self, keys, values)
        view = self.values["numbers"].view
        old = kept.setdefault(id(self), view.clone())
        count = min(old.shape[2], view.shape[2])
        view[:, :, :count] = old[:, :, :count]

    patch.setattr(BlockStore, "append", append)


def rows_of_the_tail(patch: Patch) -> None:
    """The exact tokens keep their batch rows where the blocks are reordered."""
    original = CertifiedLayer._select_batch

    def select(self: CertifiedLayer, index: Tensor) -> None:
        exact = self.exact
        original(self, index)
        self.exact = exact

    patch.setattr(CertifiedLayer, "_select_batch", select)


def pages_in_place(patch: Patch) -> None:
    """Pages of originals keep their batch rows where the codes are reordered."""
    original = ShadowPages.selected
    patch.setattr(ShadowPages, "selected", lambda self, index: original(self, torch.arange(self.batch)))


def tail_from_codes(patch: Patch) -> None:
    """What a crop brings back to the device comes from the codes."""
    original = CertifiedLayer._exact_of

    def exact_of(self: CertifiedLayer, length: int, target: int) -> tuple[GrowingBuffer, GrowingBuffer]:
        made = original(self, length, target)
        heads = torch.arange(self.heads)
        sink = self.sink_tokens if target else 0
        for kind, exact in zip(("keys", "values"), made, strict=True):
            index = (torch.zeros_like(heads), heads, torch.full_like(heads, target))
            read = self.store.decode(kind, 0, index, exact.view.shape[-1])
            count = min(exact.length - sink, self.block)
            exact.view[0, :, sink : sink + count] = read[:, :count]
        return made

    patch.setattr(CertifiedLayer, "_exact_of", exact_of)


def hot_of_another_block(patch: Patch) -> None:
    """Originals put into the slot of another block."""
    original = HotSlots.insert
    patch.setattr(
        HotSlots, "insert", lambda self, index, keys, values, *rest: original(self, index, keys, values.flip(0), *rest)
    )


def shared_buffers(patch: Patch) -> None:
    """A copied cache whose codes lie in the buffers of the first."""
    original = CertifiedLayer.__deepcopy__

    def shallow(self: CertifiedLayer, memo: dict[int, Any]) -> CertifiedLayer:
        new = original(self, memo)
        for own, others in ((new.store.keys, self.store.keys), (new.store.values, self.store.values)):
            own.update({name: _twin(buffer) for name, buffer in others.items()})
        return new

    patch.setattr(CertifiedLayer, "__deepcopy__", shallow)


def _twin(buffer: GrowingBuffer) -> GrowingBuffer:
    new = GrowingBuffer(buffer.room)
    new.data, new.length = buffer.data, buffer.length
    return new


def steady_handles(patch: Patch) -> None:
    """A handle counts as current whatever happened to its layer."""
    patch.setattr(Handle, "is_current", property(lambda self: self.length == self.layer.sequence_length))


def repeated_in_turn(patch: Patch) -> None:
    """Rows repeated one after the other where each was to be repeated side by side."""
    patch.setattr(
        CertifiedLayer,
        "batch_repeat_interleave",
        lambda self, repeats: self._select_batch(torch.arange(self.batch).repeat(repeats)),
    )


def twice(cache: Any, case: Case) -> tuple[Case, None]:
    """One more step, and another: what the first one promoted is hot."""
    case = longer(case)
    step(cache, case)
    return longer(case), None


def plant(name: str, text: str, apply: Apply, change: Callable[..., Any], build: Callable[..., Case]) -> Plant:
    """A bug in what is held, found by the oracle after a change of state."""
    detect: Detect = in_state(change, build)
    return Plant(name, "state", text, apply, detect)


STATE = [
    plant(
        "numbers that outlive a crop",
        "blocks written after a crop with the numbers of those before",
        kept_numbers,
        refilled,
        equal_values,
    ),
    plant(
        "hot blocks that outlive a crop",
        "originals of cropped blocks served for those in their place",
        instead(HotSlots, "truncate", lambda self, blocks: None),
        refilled,
        lambda: crossed(equal_values()),
    ),
    plant("numbers of another beam", "numbers not reordered with their blocks", not_selected("numbers"), reordered, beams),
    plant("codes of another beam", "codes not reordered with the numbers", not_selected("codes"), reordered, beams),
    plant(
        "steps of another beam",
        "steps and offsets not reordered with the codes",
        not_selected("scale", "offset"),
        reordered,
        beams,
    ),
    plant("tail of another beam", "exact tokens not reordered with the blocks", rows_of_the_tail, reordered, unlike_tails),
    plant("pages of another beam", "originals not reordered with the codes", pages_in_place, reordered, dense_beams),
    plant(
        "hot blocks of another beam",
        "hot blocks not reordered with the codes",
        instead(HotSlots, "selected", lambda self, index: self),
        used_and_reordered,
        lambda: crossed(beams()),
    ),
    plant("rows repeated in turn", "0101 where 0011 was asked for", repeated_in_turn, repeated, beams),
    plant("tail from codes", "what a crop brings back was quantised", tail_from_codes, cropped, equal_values),
    plant(
        "hot block of another block",
        "originals kept under another block's number",
        hot_of_another_block,
        twice,
        lambda: above(ordinary(), rtol=1e-3, refine="off", hot_blocks=8),
    ),
    plant("a copy that shares", "a copied cache written to by the first", shared_buffers, copied, beams),
    plant("a handle that outlives a reorder", "old handles served from new rows", steady_handles, kept_handles, beams),
    plant(
        "pages not verified",
        "originals used whatever their checksum says",
        instead(ShadowPages, "_verify", lambda *given: None),
        overwritten,
        dense_beams,
    ),
]
