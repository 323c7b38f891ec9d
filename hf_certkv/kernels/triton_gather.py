"""Pages by their addresses into hot slots, each compared with its checksum on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checksums import multipliers
from .triton_common import power_of_two

if TYPE_CHECKING:
    from ..shadow import PageTable

CHUNK = 4096  # numbers in flight at a time
WARPS = 8
INTEGERS = {2: torch.int16, 4: torch.int32}


@triton.jit
def page_address(slabs, rows_per_slab, units, block, unit, offset, PAGE_BYTES: tl.constexpr):
    """Where a page begins, int64. Args: offset: 0 for keys, the table's `value_offset` for values."""
    slab = tl.load(slabs + block // rows_per_slab)
    place = (block % rows_per_slab).to(tl.int64) * units + unit
    return slab + offset + place * PAGE_BYTES


@triton.jit
def copy_page(address, target, multiplier, COUNT: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr):
    """Copy a page of COUNT 16-bit (WIDE: 32-bit) numbers to `target`; its checksum, int64 (checksums.page_sums)."""
    if WIDE:
        source = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
        mask = 0xFFFFFFFF
    else:
        source = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)
        mask = 0xFFFF
    total = tl.zeros([STEP], tl.int64)
    for start in range(0, COUNT, STEP):
        at = start + tl.arange(0, STEP)
        inside = at < COUNT
        word = tl.load(source + at, mask=inside, other=0)
        tl.store(target + at, word, mask=inside)
        factor = tl.load(multiplier + at, mask=inside, other=0)
        total += (word.to(tl.int64) & mask) * factor
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["step", "room", "sums_room"])  # they change as the cache grows
def _gather(
    picked, slot_picked, slabs, sums, blocks, used, slot_of, keys, values, key_multiplier, value_multiplier,
    step, value_offset, rows_per_slab, units, picks, slots, room, sums_room,
    KEY_COUNT: tl.constexpr, VALUE_COUNT: tl.constexpr, WIDE: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr,
):  # fmt: skip
    """One program a slot to fill. A slot names no block while it is written, nor one whose page is not right."""
    program = tl.program_id(0)
    unit = program // picks
    block = tl.load(picked + program)
    if block >= 0:
        slot = unit.to(tl.int64) * slots + tl.load(slot_picked + program)
        before = tl.load(blocks + slot)
        tl.store(blocks + slot, -1)
        tl.store(used + slot, -1)
        map_row = slot_of + unit.to(tl.int64) * room
        tl.store(map_row + before, -1, mask=(before >= 0) & (before < room))
        size: tl.constexpr = 4 if WIDE else 2
        key_page = page_address(slabs, rows_per_slab, units, block, unit, 0, KEY_COUNT * size)
        value_page = page_address(slabs, rows_per_slab, units, block, unit, value_offset, VALUE_COUNT * size)
        key_sum = copy_page(key_page, keys + slot * KEY_COUNT, key_multiplier, KEY_COUNT, WIDE, KEY_STEP)
        value_sum = copy_page(value_page, values + slot * VALUE_COUNT, value_multiplier, VALUE_COUNT, WIDE, VALUE_STEP)
        own = sums + (unit.to(tl.int64) * sums_room + block) * 2
        right = (key_sum == tl.load(own)) & (value_sum == tl.load(own + 1))
        tl.store(map_row + block, (slot - unit.to(tl.int64) * slots).to(tl.int32), mask=right)
        tl.store(used + slot, step, mask=right)
        tl.store(blocks + slot, block, mask=right)


def gather(
    block: Tensor,
    slot: Tensor,
    step: int,
    table: PageTable,
    sums: Tensor,
    which: tuple[Tensor, Tensor, Tensor],
    pages: tuple[Tensor, Tensor],
) -> None:
    """Copy pages into slots, on the current stream.

    A slot whose page has a wrong checksum is left empty.

    Args:
        block, slot: int64 `[batch, kv_heads, picks]`, the block to fetch, or -1, and where to, no slot twice.
        step: of the use; table: of the pages; sums: int64 `[batch, kv_heads, room, 2]`, their checksums.
        which: `blocks`, `used`, `slot_of` of the slots; pages: their `keys`, `values`; all contiguous.
    """
    blocks, used, slot_of = which
    counts = [part.shape[-2] * part.shape[-1] for part in pages]
    item = pages[0].element_size()
    keys, values = (part.view(INTEGERS[item]) for part in pages)
    factors = [multipliers(kind, count, block.device) for kind, count in enumerate(counts)]
    steps = [min(CHUNK, power_of_two(count)) for count in counts]
    units, picks = block.shape[0] * block.shape[1], block.shape[2]
    _gather[(units * picks,)](
        block.contiguous(), slot.contiguous(), table.slabs, sums, blocks, used, slot_of, keys, values, *factors,
        step, table.value_offset, table.rows_per_slab, units, picks, blocks.shape[2], slot_of.shape[2], sums.shape[2],
        KEY_COUNT=counts[0], VALUE_COUNT=counts[1], WIDE=item == 4, KEY_STEP=steps[0], VALUE_STEP=steps[1],
        num_warps=WARPS,
    )  # fmt: skip
